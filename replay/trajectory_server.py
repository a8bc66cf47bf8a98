"""The trajectory server: the process with the trajectory queue of an on-policy run.

As in the replay server, a call that may not proceed gets an immediate reply with the reason to wait.
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
    """Configuration of a `TrajectoryServer`.

    Attributes:
        layout: shapes and dtypes of the trajectories.
        units_per_batch: number of trajectories in a global batch.
        max_policy_lag: maximum number of versions between a trajectory and the weights that train on it.
    """

    layout: Layout
    units_per_batch: int
    max_policy_lag: int = 0


@dataclass(frozen=True)
class QueueStats:
    """Statistics of a trajectory server.

    Attributes:
        counters: totals of the run; accepted steps count as inserted, and steps taken by the learner as sampled.
        size: trajectories in the queue.
        capacity: maximum number of trajectories in the queue.
        bytes: memory of the trajectories in the queue, in bytes.
        version: version of the weights for which permits are issued.
        complete_batches: batches that the learner can take now.
        discarded_steps: environment steps of the trajectories that were discarded.
        repeated_pushes: pushes that arrived again after they were accepted.
        waiting: caller -> the reason why it waits.
        pid: process ID of the server.
        node: host name of the server's node.
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
    """Server of a trajectory queue. Each call is short; the server handles one call at a time."""

    def __init__(
        self, spec: QueueSpec, *, version: int = 0, carried: Counters | None = None, max_env_steps: int | None = None
    ) -> None:
        """Open the first batches.

        Args:
            spec: configuration of the queue.
            version: newest published version of the weights.
            carried: totals of the run before this server.
            max_env_steps: number of accepted environment steps after which the server starts no more batches.

        Raises:
            ConfigurationError: `units_per_batch` is not positive, or `max_policy_lag` is negative.
        """
        self.spec = spec
        self._queue = TrajectoryQueue(spec.units_per_batch, max_policy_lag=spec.max_policy_lag, version=version)
        self._counters = carried or Counters()
        self._max_env_steps = max_env_steps
        self._ledger = PushLedger()

    @property
    def _finished(self) -> bool:
        """Whether no more batches will follow; a batch that was started before the last step is completed first."""
        return self._has_enough_steps and not self._queue.started

    @property
    def _has_enough_steps(self) -> bool:
        return self._max_env_steps is not None and self._counters.env_steps >= self._max_env_steps

    def finish(self) -> None:
        """Start no more batches; started batches are still completed and can be taken."""
        self._max_env_steps = 0

    def request_permits(self, worker: int, incarnation: int, count: int) -> PermitReply:
        """Issue up to `count` permits, or return the reason to wait."""
        caller = f"worker-{worker}"
        self._queue.revoke_earlier(worker, incarnation)
        if self._has_enough_steps and not self._queue.incomplete:
            self._ledger.record_wait(caller, None)
            return PermitReply(finished=True)
        issued = self._queue.request_permits(worker, incarnation, count, may_start=not self._has_enough_steps)
        self._ledger.record_wait(caller, issued if isinstance(issued, str) else None)
        return PermitReply(wait=issued) if isinstance(issued, str) else PermitReply(issued)

    def revoke(self, worker: int, incarnation: int) -> int:
        """Revoke the unused permits of a worker, so that they can be issued again; return their number."""
        return self._queue.revoke(worker, incarnation)

    def insert(self, push: Push) -> InsertReply:
        """Store the trajectories of a push; acknowledge and ignore a repeated push.

        A trajectory whose permit is no longer valid is discarded, and its steps count as discarded.

        Raises:
            LayoutMismatch: a trajectory does not fit the layout; no trajectory of the push is stored.
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
        """Remove the oldest batch and return it, or return the reason to wait."""
        taken = self._queue.take()
        wait = taken if isinstance(taken, str) else None
        finished = wait is not None and self._finished
        self._ledger.record_wait("learner", None if finished else wait)
        if isinstance(taken, str):
            return TakeReply(finished=True) if finished else TakeReply(wait=taken)
        before, steps = self._counters, sum(trajectory.steps for trajectory in taken)
        self._counters = Counters(before.env_steps, before.samples + steps, before.counted_inserts)
        return TakeReply(taken, returns=self._ledger.returns)

    def publish(self, version: int) -> None:
        """Record that the learner published `version`; see `TrajectoryQueue.publish`."""
        self._queue.publish(version)

    def drain_episodes(self) -> tuple[EpisodeResult, ...]:
        """Return the episodes that ended since the last call, and forget them."""
        return self._ledger.drain_episodes()

    def stats(self) -> QueueStats:
        """Return the statistics that `squall status` displays."""
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
