"""TrajectoryServer: the process that holds a `TrajectoryQueue`; TrajectoryClient: what everyone else holds.

As everywhere, a call that may not proceed is answered at once with the reason to wait.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from replay.messages import InsertReply, PermitReply, Push, TakeReply
from replay.push_ledger import PushLedger
from replay.remote import actor_class
from replay.server import Counters
from replay.trajectory_queue import TrajectoryQueue
from replay.types import EpisodeResult, Layout


@dataclass(frozen=True)
class QueueSpec:
    """What a `TrajectoryServer` is made from.

    Attributes:
        layout: shapes and dtypes of what it holds.
        units_per_batch: trajectories in a global batch.
        max_policy_lag: versions that a trained trajectory may be older than the weights it trains.
    """

    layout: Layout
    units_per_batch: int
    max_policy_lag: int = 0


@dataclass(frozen=True)
class QueueStats:
    """What a trajectory server says of itself.

    Attributes:
        counters: the run's totals; what was accepted counts as inserted, what was taken as sampled.
        size: trajectories held.
        capacity: trajectories it can hold.
        bytes: memory of what is held.
        version: of the weights that permits are issued for.
        complete_batches: batches that wait for the learner.
        discarded_steps: steps of trajectories that came too late.
        repeated_pushes: pushes that arrived a second time.
        waiting: caller -> what it waits for.
        pid: of the server's process.
        node: host it runs on.
    """

    counters: Counters
    size: int
    capacity: int
    bytes: int
    version: int
    complete_batches: int
    discarded_steps: int
    repeated_pushes: int
    waiting: dict[str, str]
    pid: int
    node: str


class TrajectoryServer:
    """A queue of global batches with permits. Every call is short; calls are served one at a time."""

    def __init__(
        self, spec: QueueSpec, *, version: int = 0, carried: Counters | None = None, max_env_steps: int | None = None
    ) -> None:
        """Open the first batch.

        Args:
            spec: what to hold.
            version: of the weights now published.
            carried: totals of the run before this server.
            max_env_steps: once this many steps are accepted no more permits are issued.

        Raises:
            ConfigurationError: a number of units or a lag that cannot work.
        """
        self.spec = spec
        self._queue = TrajectoryQueue(spec.units_per_batch, max_policy_lag=spec.max_policy_lag, version=version)
        self._counters = carried or Counters()
        self._max_env_steps = max_env_steps
        self._ledger = PushLedger()

    @property
    def _finished(self) -> bool:
        """Whether no batch will come any more. One that was begun when the steps were reached is completed first."""
        return self._enough and not self._queue.begun

    @property
    def _enough(self) -> bool:
        return self._max_env_steps is not None and self._counters.env_steps >= self._max_env_steps

    def finish(self) -> None:
        """Begin no more batches; one that was begun is completed, and can be taken."""
        self._max_env_steps = 0

    def request_permits(self, worker: int, incarnation: int, count: int) -> PermitReply:
        """Issue up to `count` permits, or say what to wait for."""
        caller = f"worker-{worker}"
        self._queue.forget_earlier(worker, incarnation)
        if self._enough and not self._queue.incomplete:
            self._ledger.note(caller, None)
            return PermitReply(finished=True)
        issued = self._queue.request_permits(worker, incarnation, count, may_begin=not self._enough)
        self._ledger.note(caller, issued if isinstance(issued, str) else None)
        return PermitReply(wait=issued) if isinstance(issued, str) else PermitReply(issued)

    def revoke(self, worker: int, incarnation: int) -> int:
        """Take back the permits of a dead worker, to be issued again; return how many."""
        return self._queue.revoke(worker, incarnation)

    def insert(self, push: Push) -> InsertReply:
        """Add a push's trajectories, once; those whose permit is void are discarded and counted.

        Raises:
            LayoutMismatch: a trajectory does not fit; none of the push is inserted.
        """
        if self._ledger.has_seen(push):
            return InsertReply(self._counters.env_steps, repeated=True)
        for _, trajectory in push.trajectories:
            trajectory.check(self.spec.layout)
        steps = sum(
            trajectory.steps
            for permit, trajectory in push.trajectories
            if self._queue.put(permit, push.worker, push.incarnation, trajectory)
        )
        self._ledger.accept(push)
        before = self._counters
        self._counters = Counters(before.env_steps + steps, before.samples, before.counted_inserts + steps)
        return InsertReply(self._counters.env_steps, accepted=True)

    def take(self) -> TakeReply:
        """Return the oldest batch and forget it, or say what to wait for."""
        taken = self._queue.take()
        wait = taken if isinstance(taken, str) else None
        finished = wait is not None and self._finished
        self._ledger.note("learner", None if finished else wait)
        if isinstance(taken, str):
            return TakeReply(finished=True) if finished else TakeReply(wait=taken)
        before, steps = self._counters, sum(trajectory.steps for trajectory in taken)
        self._counters = Counters(before.env_steps, before.samples + steps, before.counted_inserts)
        return TakeReply(taken, returns=self._ledger.returns)

    def publish(self, version: int) -> None:
        """See `TrajectoryQueue.publish`."""
        self._queue.publish(version)

    def drain_episodes(self) -> tuple[EpisodeResult, ...]:
        """See `PushLedger.drain_episodes`."""
        return self._ledger.drain_episodes()

    def stats(self) -> QueueStats:
        """Return what `squall status` shows."""
        return QueueStats(
            counters=self._counters,
            size=len(self._queue),
            capacity=self.spec.units_per_batch * (1 + self.spec.max_policy_lag),
            bytes=self._queue.bytes,
            version=self._queue.version,
            complete_batches=self._queue.complete_batches,
            discarded_steps=self._queue.discarded_steps,
            repeated_pushes=self._ledger.repeated_pushes,
            waiting=self._ledger.waiting(),
            pid=os.getpid(),
            node=socket.gethostname(),
        )


TrajectoryActor = actor_class(TrajectoryServer)
