"""The replay router: plans the samples and admits the pushes of a sharded replay; see `replay.sharding`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from replay.messages import Push, ReserveReply, SamplePlan, SamplePlanReply, ShardReport
from replay.push_ledger import PushLedger
from replay.remote import actor_class
from replay.seeds import spawn_seed
from replay.server import Counters, ReplaySpec, ReplayStats
from replay.sharding.shard import empty_stats
from replay.types import EpisodeResult

_MISSING_REPORTS = "a report from every shard of the replay"


class ReplayRouter:
    """Router of a sharded replay: admits pushes and plans samples for all shards together.

    Each call is short; the router handles one call at a time.
    """

    def __init__(
        self,
        spec: ReplaySpec,
        *,
        shards: int,
        run_seed: int,
        incarnation: int = 0,
        carried: Counters | None = None,
        highest_priority: float = 1.0,
        max_env_steps: int | None = None,
        counted: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        """Create a router that serves calls once each shard has reported.

        Args:
            spec: configuration of the whole replay.
            shards: number of shards.
            run_seed: seed of the run.
            incarnation: number of times this router was recreated.
            carried: see `ReplayServer`.
            highest_priority: see `ReplayServer`.
            max_env_steps: see `ReplayServer`.
            counted: shards' inserts that `carried` includes, see `ReplayStats`. Further inserts are added when the
                shards report them.
        """
        self.spec, self._shards = spec, shards
        self._rng = np.random.default_rng(spawn_seed(run_seed, "replay-desk", 0, incarnation))
        self._limiter = spec.limiter()
        self._inherited_inserts = 0  # inserts of this limiter that an earlier limiter has counted too
        self._carried = carried or Counters()
        self._highest_priority = highest_priority
        self._max_env_steps = max_env_steps
        self._ledger = PushLedger()
        # (shard, incarnation) -> inserts that the totals include
        self._counted = {(shard, incarnation): steps for shard, incarnation, steps in counted}
        self._shard_reports: dict[int, ShardReport] = {}
        self._lost: dict[int, int] = {}  # shard -> newest incarnation that died
        self._reserved: dict[int, tuple[int, int, int]] = {}  # worker -> (incarnation, sequence, steps) of its push
        self._exited: dict[int, int] = {}  # worker -> newest incarnation that exited
        # (index, incarnation): the workers from this index on have exited, up to this incarnation
        self._exited_from = (0, -1)
        self._has_all_reports = False

    @property
    def _counters(self) -> Counters:
        carried, limiter = self._carried, self._limiter
        return Counters(
            carried.env_steps + limiter.inserts - self._inherited_inserts,
            carried.samples + limiter.samples,
            carried.counted_inserts + limiter.counted_inserts,
        )

    @property
    def _size(self) -> int:
        return sum(report.size for report in self._shard_reports.values())

    def _has_enough_steps(self, reserved_steps: int = 0) -> bool:
        return self._max_env_steps is not None and self._counters.env_steps + reserved_steps >= self._max_env_steps

    def finish(self) -> None:
        """Admit no more pushes; serve sample calls only while enough samples are due."""
        self._max_env_steps = 0

    # Calls of workers.

    def reserve(self, worker: int, incarnation: int, sequence: int, steps: int) -> ReserveReply:
        """Admit a worker's push, so that the worker may send it to a shard, or return the reason to wait.

        The router reserves the push's steps until a shard reports the push. A repeated call reserves them only once.

        Raises:
            ValueError: the push is larger than `largest_push`, and could therefore wait forever.
        """
        caller, push = f"worker-{worker}", (incarnation, sequence, steps)
        if self._has_enough_steps():
            return self._reply(caller, finished=True)
        if self._has_exited(worker, incarnation) or self._ledger.has_seen(Push(worker, incarnation, sequence)):
            return self._reply(caller, repeated=True)
        if steps > self.spec.largest_push:
            raise ValueError(f"a push must have at most {self.spec.largest_push} transitions, got {steps}")
        wait = None if self._reserved.get(worker) == push else self._insert_waits_for(worker, steps)
        if wait is None and not self._shard_reports:
            wait = _MISSING_REPORTS
        if wait is not None:
            return self._reply(caller, wait=wait)
        self._reserved[worker] = push
        return self._reply(caller, shards=tuple(sorted(self._shard_reports)), highest_priority=self._highest_priority)

    def _insert_waits_for(self, worker: int, steps: int) -> str | None:
        if not self._has_all_reports:
            return _MISSING_REPORTS
        reserved_steps = sum(push[2] for other, push in self._reserved.items() if other != worker)
        if self._has_enough_steps(reserved_steps):
            return "reserved pushes, which contain the run's last steps"
        # Apply the rate limiter as if the reserved pushes had been inserted.
        return replace(self._limiter, inserts=self._limiter.inserts + reserved_steps).insert_waits_for(steps)

    def _reply(self, caller: str, **fields: Any) -> ReserveReply:
        self._ledger.record_wait(caller, fields.get("wait"))
        return ReserveReply(env_steps=self._counters.env_steps, **fields)

    def revoke(self, worker: int, incarnation: int, sequence: int | None = None) -> None:
        """Release the reservation of a push that the worker will not send.

        Without `sequence`, release the reservation of a worker that has exited, and admit no later call of this
        incarnation.
        """
        if sequence is None:
            self._exited[worker] = max(incarnation, self._exited.get(worker, -1))
        reservation = self._reserved.get(worker)
        if reservation is not None and reservation[:2] <= (incarnation, np.inf if sequence is None else sequence):
            del self._reserved[worker]

    def revoke_from(self, first: int, incarnation: int) -> None:
        """Release the reservations of all workers with index `first` or higher, whose common process has exited."""
        self._exited_from = first, max(incarnation, self._exited_from[1])
        self._reserved = {
            worker: push for worker, push in self._reserved.items() if not self._has_exited(worker, push[0])
        }

    def _has_exited(self, worker: int, incarnation: int) -> bool:
        """Return whether a worker has exited. A call made before the exit may reach the router after it."""
        first, last = self._exited_from
        return incarnation <= self._exited.get(worker, -1) or (worker >= first and incarnation <= last)

    # Calls of shards.

    def report(self, shard: int, shard_report: ShardReport, push: Push | None = None) -> None:
        """Record the state of a shard, and a push that the shard has inserted; a repeated push counts once."""
        steps = self._count_new_steps(shard, shard_report)
        if push is not None:
            reservation = self._reserved.get(push.worker)
            if reservation is not None and reservation[:2] <= (push.incarnation, push.sequence):
                del self._reserved[push.worker]
            if self._ledger.has_accepted(push):
                steps = 0  # another shard has inserted the push too
            else:
                self._ledger.accept(push)
        admitted_earlier = not self._has_all_reports
        self._update_shard(shard, shard_report)
        if admitted_earlier:  # admitted by a previous router, whose rate limiter is lost
            self._carried = replace(self._carried, env_steps=self._carried.env_steps + steps)
        else:
            self._limiter.record_insert(steps)

    def _count_new_steps(self, shard: int, shard_report: ShardReport) -> int:
        """Return the number of steps inserted since the shard's last report, and mark them as counted."""
        key = shard, shard_report.incarnation
        before = self._counted.get(key, 0)
        self._counted[key] = max(before, shard_report.inserted)
        return self._counted[key] - before

    def _update_shard(self, shard: int, shard_report: ShardReport) -> None:
        """Record the state of a shard, unless the report is from an incarnation that has died."""
        self._highest_priority = max(self._highest_priority, shard_report.highest_priority)
        before = self._shard_reports.get(shard)
        if shard_report.incarnation <= self._lost.get(shard, -1) or (
            before and shard_report.incarnation < before.incarnation
        ):
            return
        self._shard_reports[shard] = shard_report
        if before is not None and shard_report.incarnation > before.incarnation:
            self._restart_limiter_if_short()
        if not self._has_all_reports and len(self._shard_reports) == self._shards:
            self._has_all_reports = True
            if self._size:
                self._restart_limiter()  # the shards contain experience that a previous router admitted

    def lost(self, shard: int, incarnation: int) -> None:
        """Record that a shard has died, and that its experience is lost."""
        self._lost[shard] = max(incarnation, self._lost.get(shard, -1))
        if shard in self._shard_reports and self._shard_reports[shard].incarnation <= incarnation:
            del self._shard_reports[shard]
            self._restart_limiter_if_short()

    def _restart_limiter_if_short(self) -> None:
        """Restart the rate limiter if the shards contain fewer transitions than it assumes."""
        if self._size < min(self._limiter.inserts, self.spec.minimum_size):
            self._restart_limiter()

    def _restart_limiter(self) -> None:
        """Carry the totals over to a new rate limiter.

        The transitions in the shards count as its first inserts, up to the minimum size, and no samples are due.
        """
        self._carried = self._counters
        self._limiter = self.spec.limiter()
        self._inherited_inserts = min(self._size, self.spec.minimum_size)
        self._limiter.record_insert(self._inherited_inserts)

    # Calls of the learner.

    def sample(
        self, k: int, batch_size: int, retry: bool = False, lost: Sequence[tuple[int, int]] = ()
    ) -> SamplePlanReply:
        """Return a plan for sampling k batches, or the reason to wait.

        Args:
            k: number of batches.
            batch_size: transitions in each batch.
            retry: whether the call repeats a sample that the rate limiter has already counted, because a shard of the
                earlier plan did not reply.
            lost: (shard, incarnation) of each shard that has no process, as the caller has observed.

        Raises:
            ValueError: see `ReplayServer.sample`.
        """
        count, largest = k * batch_size, self.spec.batches_per_sample * self.spec.batch_size
        if min(k, batch_size) < 1 or count > largest:
            raise ValueError(f"a sample call must sample 1 to {largest} transitions, got {k} x {batch_size}")
        for shard, incarnation in lost:
            self.lost(shard, incarnation)
        if self._has_enough_steps() and (not self._size or (not retry and self._limiter.due < count)):
            self._ledger.record_wait("learner", None)
            return SamplePlanReply(finished=True)
        wait = None if retry else self._limiter.sample_waits_for(count)
        if not self._has_all_reports:
            wait = _MISSING_REPORTS
        elif not self._size:
            wait = wait or "experience: all transitions of the replay are lost"
        self._ledger.record_wait("learner", wait)
        if wait is not None:
            return SamplePlanReply(wait=wait)
        if not retry:
            self._limiter.record_sample(count)
        return self._plan(k, batch_size)

    def _plan(self, k: int, batch_size: int) -> SamplePlanReply:
        shards = sorted(shard for shard, report in self._shard_reports.items() if report.mass > 0.0)
        masses = np.array([self._shard_reports[shard].mass for shard in shards])
        ends = masses.cumsum()
        total, uniform = float(ends[-1]), self._rng.random((k, batch_size))
        if self.spec.table.priority_exponent is not None:
            uniform = (np.arange(batch_size) + uniform) / batch_size  # stratified, as in a single table
        targets = uniform.ravel() * total
        # By rounding, a target may reach the total.
        index = np.minimum(np.searchsorted(ends, targets, side="right"), len(shards) - 1)
        fraction = (targets - (ends - masses)[index]) / masses[index]
        plan = SamplePlan(
            shard=np.array(shards, np.int64)[index],
            fraction=fraction.clip(0.0, np.nextafter(1.0, 0.0)),
            share={shard: float(mass / total) for shard, mass in zip(shards, masses, strict=True)},
            incarnations={shard: self._shard_reports[shard].incarnation for shard in shards},
            size=self._size,
            returns=self._ledger.returns,
        )
        return SamplePlanReply(plan)

    # Calls of the coordinator.

    def drain_episodes(self) -> tuple[EpisodeResult, ...]:
        """Return the episodes that ended since the last call, and forget them."""
        return self._ledger.drain_episodes()

    def stats(self) -> ReplayStats:
        """Return the router's part of the statistics that `squall status` displays; see `add_up`."""
        return replace(
            empty_stats(),
            counters=self._counters,
            due=self._limiter.due,
            repeated_pushes=self._ledger.repeated_pushes,
            waiting=self._ledger.waiting(),
            highest_priority=self._highest_priority,
            counted=tuple((*key, steps) for key, steps in self._counted.items()),
        )


def add_up(router: ReplayStats, shards: Sequence[ReplayStats]) -> ReplayStats:
    """Return the statistics of a sharded replay from those of its router and its shards."""
    summed = ("size", "capacity", "bytes", "evicted", "stale_updates", "repeated_pushes", "resident_bytes")
    sums = {name: sum(getattr(part, name) for part in (router, *shards)) for name in summed}
    ages = [shard.sample_age for shard in shards if shard.sample_age is not None]
    # Pushes go to the shards in turn: for each step that one shard inserts, each other shard inserts one too.
    age = len(shards) * sum(ages) / len(ages) if ages else None
    return replace(router, **sums, sample_age=age)


ReplayRouterActor = actor_class(ReplayRouter)
