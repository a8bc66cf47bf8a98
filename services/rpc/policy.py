"""Policy over gRPC: an acting module that answers many callers, those of one moment with one forward pass."""

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

MOST_ROWS = 1_024
"""Observations in one forward pass, and in one request."""
MOST_WAITING = 8_192
"""Observations that wait for a forward pass; what would be more is turned away."""
REFRESH_SECONDS = 0.1


class ServedPolicy:
    """An acting module and what a server tells of it. One thread at a time may use it."""

    def __init__(
        self, policy: Policy, algorithm: str, *, version: int = -1, step: int = 0, weights: WeightClient | None = None
    ) -> None:
        """Serve `policy`.

        Args:
            policy: the module.
            algorithm: what trained it.
            version: of its weights; -1 if it has none of a run's yet.
            step: the run's step count, which exploration follows.
            weights: where newer weights come from, for a live run.

        Raises:
            ConfigurationError: its observations or actions have a dtype that has no place in the protocol.
        """
        self.policy, self.algorithm, self.version, self.step = policy, algorithm, version, step
        self._weights = weights
        self.live = weights is not None
        self.spaces = spaces_of(self.environment)

    @property
    def environment(self) -> EnvironmentSpec:
        """Whose observations it takes and whose actions it gives."""
        return self.policy.spec.environment

    def refresh(self) -> None:
        """Take newer weights if they have arrived, and ask for the next; never waits."""
        newer = None if self._weights is None else self._weights.poll()
        if newer is not None:
            unpack(newer, self.policy)
            self.version = newer.version

    def act(self, observations: Array, explore: bool) -> tuple[Array, int]:
        """Return actions `[B, *action_shape]` and the version of the weights that chose them.

        Discrete actions are numbered from 0; others lie in the environment's box and have its dtype.

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
class _Waiting:
    observations: Array
    answer: asyncio.Future[tuple[Array, int]]


class Batcher:
    """Lets requests that come at the same time share a forward pass. Used on one event loop.

    When nothing is under way a request starts at once; those that come meanwhile wait for the end of that pass and
    are the next one. So nobody waits for a batch to fill, and the batches grow with the load.
    """

    def __init__(
        self,
        forward: Callable[[Array, bool], tuple[Array, int]],
        executor: Executor,
        *,
        most_rows: int = MOST_ROWS,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        """Call `forward`, with observations and whether to explore, in `executor`.

        Args:
            forward: returns the actions and the version of the weights.
            executor: one thread, unless `forward` may run in several.
            most_rows: observations in one pass; a request with more is a pass of its own.
            most_waiting: observations that may wait.
        """
        self._forward, self._executor = forward, executor
        self._most_rows, self._most_waiting = most_rows, most_waiting
        self._queues: dict[bool, deque[_Waiting]] = {False: deque(), True: deque()}
        self._rows_waiting = 0
        self._running: asyncio.Task[None] | None = None
        self.passes = 0
        self.requests = 0

    async def act(self, observations: Array, explore: bool) -> tuple[Array, int]:
        """Return the actions for `[B, ...]` observations, and the version of the weights.

        Raises:
            Overloaded: too many observations wait already.
        """
        rows = len(observations)
        if self._rows_waiting and self._rows_waiting + rows > self._most_waiting:
            raise Overloaded(f"{self._rows_waiting} observations wait for the policy, and {self._most_waiting} may")
        self.requests += 1
        waiting = _Waiting(observations, asyncio.get_running_loop().create_future())
        self._queues[explore].append(waiting)
        self._rows_waiting += rows
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await waiting.answer

    async def _run(self) -> None:
        """Make passes, greedy and exploring ones in turn, until nobody waits."""
        try:
            while any(self._queues.values()):
                for explore in (False, True):
                    batch = self._take(explore)
                    if batch:
                        await self._pass(batch, explore)
        finally:
            self._running = None

    def _take(self, explore: bool) -> list[_Waiting]:
        queue, rows = self._queues[explore], 0
        batch: list[_Waiting] = []
        while queue and (not batch or rows + len(queue[0].observations) <= self._most_rows):
            waiting = queue.popleft()
            self._rows_waiting -= len(waiting.observations)
            if not waiting.answer.done():  # its caller may have gone
                batch.append(waiting)
                rows += len(waiting.observations)
        return batch

    async def _pass(self, batch: list[_Waiting], explore: bool) -> None:
        self.passes += 1
        observations = np.concatenate([waiting.observations for waiting in batch])
        loop = asyncio.get_running_loop()
        try:
            actions, version = await loop.run_in_executor(self._executor, self._forward, observations, explore)
        except Exception as error:
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
            return
        start = 0
        for waiting in batch:
            end = start + len(waiting.observations)
            if not waiting.answer.done():
                waiting.answer.set_result((actions[start:end], version))
            start = end


class PolicyService(squall_pb2_grpc.PolicyServicer, Service):
    """Serves one policy."""

    name = "squall.v1.Policy"

    def __init__(self, served: ServedPolicy, run: str, *, most_rows: int = MOST_ROWS) -> None:
        """Serve `served` as that of `run`; `most_rows` observations share a pass."""
        self.served, self._run = served, run
        # The one thread that touches the module.
        self._executor = ThreadPoolExecutor(1, "policy")
        self.batcher = Batcher(served.act, self._executor, most_rows=most_rows)
        self._refreshing: asyncio.Task[None] | None = None

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register this service's methods."""
        squall_pb2_grpc.add_PolicyServicer_to_server(self, server)

    async def start(self) -> None:
        """Begin to fetch newer weights, for a live run."""
        if self.served.live:
            self._refreshing = asyncio.create_task(self._refresh())

    async def stop(self) -> None:
        """End that, and begin no more passes."""
        if self._refreshing is not None:
            self._refreshing.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _refresh(self) -> None:
        # By the clock, not by the calls: who asks seldom wants the newest weights too.
        loop = asyncio.get_running_loop()
        while True:
            await loop.run_in_executor(self._executor, self.served.refresh)
            await asyncio.sleep(REFRESH_SECONDS)

    def note_progress(self, env_steps: int) -> None:
        """Take note of how far the run is: exploration follows it."""
        self.served.step = env_steps

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        """Return what the policy is."""
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
        if not 1 <= len(observations) <= MOST_ROWS:
            raise ConfigurationError(f"a request has 1 to {MOST_ROWS} observations, got {len(observations)}")
        if observations.dtype.kind == "f" and not np.isfinite(observations).all():
            raise ConfigurationError("observations must be finite, got NaN or infinity")
        count = environment.observation_count
        # One that is out of range would fail the pass for all who share it.
        if count is not None and not np.all((observations >= 0) & (observations < count)):
            raise ConfigurationError(f"observations must lie in 0 .. {count - 1}, got others")
        return observations

    def _check_run(self, run: str) -> None:
        if self._refreshing is not None and self._refreshing.done():
            self._refreshing.result()  # raises what ended it: old weights must not pass for the newest
        if run not in ("", self._run):
            raise UnknownRun(f"this server has the policy of {self._run!r} alone, not of {run!r}")
