"""The Python client of runs and policies over gRPC. It raises the exceptions that the server has raised."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import grpc
import numpy as np
from gymnasium import spaces

from replay.errors import ConfigurationError
from replay.types import Array
from services.rpc import squall_pb2 as pb
from services.rpc import squall_pb2_grpc
from services.rpc.auth import TOKEN_VARIABLE, split_address
from services.rpc.codec import DTYPES, decode_array, decode_space, encode_array
from services.rpc.errors import from_status
from services.rpc.server import CHANNEL_OPTIONS

CALL_SECONDS = 60.0


@dataclass(frozen=True)
class Description:
    """The description of a policy.

    Attributes:
        algorithm: name of the algorithm that trains or trained the policy.
        environment: Gymnasium id of the environment, or an empty text.
        observation_space: space of one observation.
        action_space: space of one action; Discrete actions are numbered from 0.
        weights_version: version of the current weights; -1 before the first.
    """

    algorithm: str
    environment: str
    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    weights_version: int


class Acted(NamedTuple):
    """The answer to `SquallClient.act`: actions `[B, ...]`, and the version of the weights that chose them."""

    actions: Array
    weights_version: int


class Closeable:
    """A base class of clients: a `with` block closes the client at its end."""

    def close(self) -> object:
        """Close the client."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class SquallClient(Closeable):
    """The client of a gateway, a run's endpoint, or `squall serve`; use it as a `with` block. It is thread-safe.

    Every method raises the exception that the server has raised (`UnknownRun`, `CommandRefused`, ...), and also:

        Unauthenticated: the server requires a token, or another token.
        ServerUnavailable: no server answers at the address.
        DeadlineExceeded: no answer within `call_seconds`.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls: bool = False,
        tls_authority: Path | None = None,
        call_seconds: float = CALL_SECONDS,
    ) -> None:
        """Create a client, which connects at the first call.

        Args:
            address: `host:port` of the server.
            token: the server's token; default SQUALL_GRPC_TOKEN. Without TLS, anybody on the network path can read it.
            tls: whether the server uses TLS.
            tls_authority: PEM file of the trusted certificate authority, in place of the system's; implies `tls`.
            call_seconds: deadline of a call in seconds.

        Raises:
            ConfigurationError: an invalid address, or a file that cannot be read.
        """
        split_address(address)
        self.address, self._seconds = address, call_seconds
        token = token or os.environ.get(TOKEN_VARIABLE) or None
        self.metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        if tls or tls_authority is not None:
            credentials = grpc.ssl_channel_credentials(_read(tls_authority))
            self.channel = grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
        else:
            self.channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._control = squall_pb2_grpc.RunControlStub(self.channel)
        self._policy = squall_pb2_grpc.PolicyStub(self.channel)

    def close(self) -> None:
        """Close the connection."""
        self.channel.close()

    def list_runs(self) -> list[pb.Run]:
        """Return all runs, newest first."""
        return list(self._call(self._control.ListRuns, pb.ListRunsRequest()).runs)

    def status(self, run: str, *, events: int = 10) -> pb.RunStatus:
        """Return the status of a run, with its last `events` events. Raises `UnknownRun`."""
        status: pb.RunStatus = self._call(self._control.Status, pb.StatusRequest(run=run, events=events))
        return status

    def watch(self, run: str) -> Iterator[pb.RunStatus]:
        """Yield the status of a run with its new events, once a second, until the run has ended or is lost.

        Raises:
            UnknownRun: no run has this name.
        """
        call = self._control.Watch(pb.WatchRequest(run=run), metadata=self.metadata)
        try:
            with self.errors():
                yield from call
        finally:
            call.cancel()

    def scale(self, run: str, actors: int) -> pb.ScaleResponse:
        """Change the number of a live run's rollout workers. Raises `RunIsNotLive`, `CommandRefused`."""
        scaled: pb.ScaleResponse = self._call(self._control.Scale, pb.ScaleRequest(run=run, actors=actors))
        return scaled

    def checkpoint(self, run: str) -> pb.CheckpointResponse:
        """Make a live run write a checkpoint. Raises `RunIsNotLive`, `CommandRefused`."""
        written: pb.CheckpointResponse = self._call(self._control.Checkpoint, pb.CheckpointRequest(run=run))
        return written

    def stop(self, run: str) -> None:
        """Stop a live run gracefully, with a checkpoint. Raises `RunIsNotLive`."""
        self._call(self._control.Stop, pb.StopRequest(run=run))

    def describe(self, run: str = "") -> Description:
        """Return the description of a run's policy; `run` may be omitted if the server has only one policy."""
        answer: pb.DescribeResponse = self._call(self._policy.Describe, pb.DescribeRequest(run=run))
        return Description(
            answer.algorithm,
            answer.environment,
            decode_space(answer.observation_space, "the observation space"),
            decode_space(answer.action_space, "the action space"),
            answer.weights_version,
        )

    def act(self, observations: Array, run: str = "", *, explore: bool = False) -> Acted:
        """Return the policy's actions.

        Args:
            observations: `[B, *observation_shape]`, of the observation space's dtype.
            run: name of the run; may be omitted if the server has only one policy.
            explore: whether to explore as a rollout worker does, instead of acting greedily.

        Raises:
            ConfigurationError: observations of another shape or dtype; the error names both.
            Overloaded: too many requests are waiting.
        """
        request = pb.ActRequest(run=run, observations=encode_array(np.asarray(observations)), explore=explore)
        answer: pb.ActResponse = self._call(self._policy.Act, request)
        dtype = DTYPES.get(answer.actions.dtype, np.dtype("int64")).name
        shape = (None,) * len(answer.actions.shape)
        return Acted(decode_array(answer.actions, "actions", dtype=dtype, shape=shape), answer.weights_version)

    def _call(self, method: Any, request: Any) -> Any:
        with self.errors():
            return method(request, timeout=self._seconds, metadata=self.metadata)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Raise the exceptions of the calls inside a `with` block as the exceptions that the server has raised."""
        try:
            yield
        except grpc.RpcError as error:
            call: Any = error  # the error object is also the call
            raise from_status(call.code(), call.details(), call.trailing_metadata(), self.address) from error


def _read(file: Path | None) -> bytes | None:
    if file is None:
        return None
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"cannot read a TLS file: {error}") from error
