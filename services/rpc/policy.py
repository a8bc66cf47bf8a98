"""The Policy service: it answers concurrent requests for actions with shared forward passes of one policy."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from actors.environments import DiscreteActions, EnvironmentSpec
from actors.policies import Policy
from actors.weights import WeightClient, unpack
from replay.errors import ConfigurationError
from replay.types import Array
from services.errors import NotReady, Overloaded, UnknownRun
from services.rpc import squall_pb2 as pb
from services.rpc import squall_pb2_grpc
from services.rpc.codec import decode_array, encode_array, spaces_of
from services.rpc.server import Service

MAX_BATCH_SIZE = 1_024
"""Maximum number of observations in one forward pass, and in one request."""
MAX_WAITING = 8_192
"""Maximum number of observations that wait for a forward pass; further requests are rejected."""
REFRESH_SECONDS = 0.1


class ServedPolicy:
    """A policy with the properties that a server reports about it. Only one thread at a time may use it."""

    def __init__(
        self, policy: Policy, algorithm: str, *, version: int = -1, step: int = 0, weights: WeightClient | None = None
    ) -> None:
        """Serve `policy`.

        Args:
            policy: the acting module.
            algorithm: name of the algorithm that trains or trained it.
            version: version of its weights; -1 before the run's first weights have arrived.
            step: the run's number of environment steps, on which exploration depends.
            weights: source of newer weights, for a live run.

        Raises:
            ConfigurationError: observations or actions with a dtype that the protocol does not support.
        """
        self.policy, self.algorithm, self.version, self.step = policy, algorithm, version, step
        self._weights = weights
        self.live = weights is not None
        self.spaces = spaces_of(self.environment)

    @property
    def environment(self) -> EnvironmentSpec:
        """The environment that the policy acts in."""
        return self.policy.spec.environment

    def refresh(self) -> None:
        """Load newer weights if they have arrived, and request the next; never waits."""
        newer = None if self._weights is None else self._weights.poll()
        if newer is not None:
            unpack(newer, self.policy)
            self.version = newer.version

    def act(self, observations: Array, explore: bool) -> tuple[Array, int]:
        """Return actions `[B, *action_shape]` and the version of the weights that chose them.

        Discrete actions are numbered from 0; continuous actions lie in the environment's box and have its dtype.

        Raises:
            NotReady: the run has published no weights yet.
        """
        if self.version < 0:
            raise NotReady("the run has no weights yet: its learner is starting")
        actions = self.policy.act(observations, step=self.step, greedy=not explore).action
        if not isinstance(self.environment.actions, DiscreteActions):
            actions = self.environment.to_environment(actions)
        return actions, self.version


@dataclass(frozen=True)
class _Request:
    observations: Array
    future: asyncio.Future[tuple[Array, int]]


class Batcher:
    """Combines concurrent requests into shared forward passes. All calls come from one event loop.

    A request that arrives while no pass is running starts a pass immediately. Requests that arrive during a pass form
    the next one. Therefore no request waits for a batch to fill, and the batches grow with the load.
    """

    def __init__(
        self,
        forward: Callable[[Array, bool], tuple[Array, int]],
        executor: Executor,
        *,
        max_batch_size: int = MAX_BATCH_SIZE,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        """Create a batcher that calls `forward(observations, explore)` in `executor`.

        Args:
            forward: function that returns the actions and the version of the weights.
            executor: executor of one thread, unless `forward` is thread-safe.
            max_batch_size: maximum number of observations in one pass; a larger request is a pass of its own.
            max_waiting: maximum number of waiting observations.
        """
        self._forward, self._executor = forward, executor
        self._max_batch_size, self._max_waiting = max_batch_size, max_waiting
        self._queues: dict[bool, deque[_Request]] = {False: deque(), True: deque()}
        self._observations_waiting = 0
        self._running: asyncio.Task[None] | None = None
        self.passes = 0
        self.requests = 0

    async def act(self, observations: Array, explore: bool) -> tuple[Array, int]:
        """Return the actions for `[B, ...]` observations, and the version of the weights.

        Raises:
            Overloaded: too many observations wait already.
        """
        size = len(observations)
        if self._observations_waiting and self._observations_waiting + size > self._max_waiting:
            raise Overloaded(
                f"{self._observations_waiting} of at most {self._max_waiting} observations are waiting for the policy "
                f"already; try again later"
            )
        self.requests += 1
        request = _Request(observations, asyncio.get_running_loop().create_future())
        self._queues[explore].append(request)
        self._observations_waiting += size
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await request.future

    async def _run(self) -> None:
        """Run passes, greedy and exploring ones in turn, until no request waits."""
        try:
            while any(self._queues.values()):
                for explore in (False, True):
                    batch = self._take(explore)
                    if batch:
                        await self._pass(batch, explore)
        finally:
            self._running = None

    def _take(self, explore: bool) -> list[_Request]:
        queue, size = self._queues[explore], 0
        batch: list[_Request] = []
        while queue and (not batch or size + len(queue[0].observations) <= self._max_batch_size):
            request = queue.popleft()
            self._observations_waiting -= len(request.observations)
            if not request.future.done():  # done if its caller has cancelled the call
                batch.append(request)
                size += len(request.observations)
        return batch

    async def _pass(self, batch: list[_Request], explore: bool) -> None:
        self.passes += 1
        observations = np.concatenate([request.observations for request in batch])
        loop = asyncio.get_running_loop()
        try:
            actions, version = await loop.run_in_executor(self._executor, self._forward, observations, explore)
        except Exception as error:
            for request in batch:
                if not request.future.done():
                    request.future.set_exception(error)
            return
        start = 0
        for request in batch:
            end = start + len(request.observations)
            if not request.future.done():
                request.future.set_result((actions[start:end], version))
            start = end


class PolicyService(squall_pb2_grpc.PolicyServicer, Service):
    """The service of one policy."""

    name = "squall.v1.Policy"

    def __init__(self, served: ServedPolicy, run: str, *, max_batch_size: int = MAX_BATCH_SIZE) -> None:
        """Serve `served` as the policy of `run`, with up to `max_batch_size` observations in a pass."""
        self.served, self._run = served, run
        # Only this thread uses the policy.
        self._executor = ThreadPoolExecutor(1, "policy")
        self.batcher = Batcher(served.act, self._executor, max_batch_size=max_batch_size)
        self._refresh_task: asyncio.Task[None] | None = None

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the methods of this service with a server."""
        squall_pb2_grpc.add_PolicyServicer_to_server(self, server)

    async def start(self) -> None:
        """Start to fetch newer weights, for a live run."""
        if self.served.live:
            self._refresh_task = asyncio.create_task(self._refresh())

    async def stop(self) -> None:
        """Stop fetching weights, and start no further pass."""
        if self._refresh_task is not None:
            self._refresh_task.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _refresh(self) -> None:
        # Periodically rather than at each call, so that rare calls get the newest weights too.
        loop = asyncio.get_running_loop()
        while True:
            await loop.run_in_executor(self._executor, self.served.refresh)
            await asyncio.sleep(REFRESH_SECONDS)

    def note_progress(self, env_steps: int) -> None:
        """Set the run's number of environment steps, on which exploration depends."""
        self.served.step = env_steps

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        """Return the description of the policy."""
        self._check_run(request.run)
        observations, actions = self.served.spaces
        return pb.DescribeResponse(
            algorithm=self.served.algorithm,
            environment=self.served.environment.id or "",
            observation_space=observations,
            action_space=actions,
            weights_version=self.served.version,
        )

    async def Act(self, request: pb.ActRequest, context: Any) -> pb.ActResponse:
        """Return actions for a batch of observations."""
        self._check_run(request.run)
        actions, version = await self.batcher.act(self._observations(request.observations), request.explore)
        return pb.ActResponse(actions=encode_array(actions), weights_version=version)

    def _observations(self, message: pb.Array) -> Array:
        environment = self.served.environment
        shape = (None, *environment.observation_shape)
        observations = decode_array(message, "observations", dtype=environment.observation_dtype, shape=shape)
        if not 1 <= len(observations) <= MAX_BATCH_SIZE:
            raise ConfigurationError(f"a request has 1 to {MAX_BATCH_SIZE} observations, got {len(observations)}")
        if observations.dtype.kind == "f" and not np.isfinite(observations).all():
            raise ConfigurationError("observations must be finite, got NaN or infinity")
        count = environment.observation_count
        # An observation outside this range would fail the pass for all requests that share it.
        if count is not None and not np.all((observations >= 0) & (observations < count)):
            raise ConfigurationError(f"observations must lie in 0 .. {count - 1}, got others")
        return observations

    def _check_run(self, run: str) -> None:
        if self._refresh_task is not None and self._refresh_task.done():
            self._refresh_task.result()  # raises its error, because stale weights must not be served as the newest
        if run not in ("", self._run):
            raise UnknownRun(f"this server serves the policy of {self._run!r} only, not of {run!r}")
