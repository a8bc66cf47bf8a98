"""SquallClient: runs and policies over gRPC, from Python. Errors come back as the exceptions that the server raised."""

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
from services.rpc.auth import TOKEN, split_address
from services.rpc.codec import DTYPES, decode_array, decode_space, encode_array
from services.rpc.errors import from_status
from services.rpc.server import CHANNEL_OPTIONS

CALL_SECONDS = 60.0


@dataclass(frozen=True)
class Description:
    """What a policy is.

    Attributes:
        algorithm: what trained it.
        environment: Gymnasium id of the environment, or empty.
        observation_space: of one observation.
        action_space: of one action; a Discrete one is numbered from 0.
        weights_version: of the weights that it has now; -1 before the first.
    """

    algorithm: str
    environment: str
    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    weights_version: int


class Acted(NamedTuple):
    """Actions `[B, ...]`, and the version of the weights that chose them."""

    actions: Array
    weights_version: int


class Closing:
    """What a `with` block closes."""

    def close(self) -> object:
        """End it."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class SquallClient(Closing):
    """Talks to a gateway, a run's endpoint or `squall serve`; use as a `with` block. Safe to use from several threads.

    Every method raises what the server raised, by type (`UnknownRun`, `CommandRefused`, ...), and besides:

        Unauthenticated: the server wants a token, or another one.
        ServerUnavailable: nobody answers there.
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
        """Connect at the first call.

        Args:
            address: `host:port`.
            token: what to show; default SQUALL_GRPC_TOKEN. Without TLS others on the way can read it.
            tls: whether the server speaks TLS.
            tls_authority: PEM file of the certificate authority to trust, instead of the system's; means TLS too.
            call_seconds: deadline of a call.

        Raises:
            ConfigurationError: no such address, or a file that cannot be read.
        """
        split_address(address)
        self.address, self._seconds = address, call_seconds
        token = token or os.environ.get(TOKEN) or None
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
        """Return what is known of a run, with its last `events`. Raises `UnknownRun`."""
        status: pb.RunStatus = self._call(self._control.Status, pb.StatusRequest(run=run, events=events))
        return status

    def watch(self, run: str) -> Iterator[pb.RunStatus]:
        """Yield what is known of a run, once a second, until it has ended or is lost; each with the new events.

        Raises:
            UnknownRun: there is no such run.
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
        """Have a live run write a checkpoint. Raises `RunIsNotLive`, `CommandRefused`."""
        written: pb.CheckpointResponse = self._call(self._control.Checkpoint, pb.CheckpointRequest(run=run))
        return written

    def stop(self, run: str) -> None:
        """End a live run in order. Raises `RunIsNotLive`."""
        self._call(self._control.Stop, pb.StopRequest(run=run))

    def describe(self, run: str = "") -> Description:
        """Return what the policy of a run is; the run may be left out where the server has one policy only."""
        told: pb.DescribeResponse = self._call(self._policy.Describe, pb.DescribeRequest(run=run))
        return Description(
            told.algorithm,
            told.environment,
            decode_space(told.observation_space, "the observation space"),
            decode_space(told.action_space, "the action space"),
            told.weights_version,
        )

    def act(self, observations: Array, run: str = "", *, explore: bool = False) -> Acted:
        """Return the policy's actions.

        Args:
            observations: `[B, *observation_shape]`, of the observation space's dtype.
            run: whose policy; may be left out where the server has one only.
            explore: act as a rollout worker does, instead of greedily.

        Raises:
            ConfigurationError: observations of another shape or dtype; the text names both.
            Overloaded: too many requests wait.
        """
        request = pb.ActRequest(run=run, observations=encode_array(np.asarray(observations)), explore=explore)
        told: pb.ActResponse = self._call(self._policy.Act, request)
        dtype = DTYPES.get(told.actions.dtype, np.dtype("int64")).name
        shape = (None,) * len(told.actions.shape)
        return Acted(decode_array(told.actions, "actions", dtype=dtype, shape=shape), told.weights_version)

    def _call(self, method: Any, request: Any) -> Any:
        with self.errors():
            return method(request, timeout=self._seconds, metadata=self.metadata)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn a call's status into the exception that it stands for, within a `with` block."""
        try:
            yield
        except grpc.RpcError as error:
            call: Any = error  # it is the call, too
            raise from_status(call.code(), call.details(), call.trailing_metadata(), self.address) from error


def _read(file: Path | None) -> bytes | None:
    if file is None:
        return None
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"cannot read what TLS needs: {error}") from error
