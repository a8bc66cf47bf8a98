"""Router."""

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

_NO_WORD = "word from every shard of the replay"


class ReplayRouter:
    """Says who may insert and sample, for all shards together. Every call is short; served one at a time."""

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
        """Wait for word from the shards.

        Args:
            spec: of the whole replay.
            shards: how many there are.
            run_seed: the run's seed.
            incarnation: how often this desk was recreated.
            carried: see `ReplayServer`.
            highest_priority: see `ReplayServer`.
            max_env_steps: see `ReplayServer`.
            counted: what of the shards' steps is in `carried`, see `ReplayStats`; the rest is added when they speak.
        """
        self.spec, self._shards = spec, shards
        self._rng = np.random.default_rng(spawn_seed(run_seed, "replay-desk", 0, incarnation))
        self._limiter = spec.limiter()
        self._known = 0  # of the limiter's inserts, those that an earlier limiter counted
        self._carried = carried or Counters()
        self._highest_priority = highest_priority
        self._max_env_steps = max_env_steps
        self._ledger = PushLedger()
        self._counted = {(shard, of): steps for shard, of, steps in counted}
        self._shard_reports: dict[int, ShardReport] = {}
        self._lost: dict[int, int] = {}
        self._reserved: dict[int, tuple[int, int, int]] = {}
        self._gone: dict[int, int] = {}
        self._gone_from = (0, -1)
        self._heard_all = False

    @property
    def _counters(self) -> Counters:
        carried, limiter = self._carried, self._limiter
        return Counters(
            carried.env_steps + limiter.inserts - self._known,
            carried.samples + limiter.samples,
            carried.counted_inserts + limiter.counted_inserts,
        )

    @property
    def _size(self) -> int:
        return sum(held.size for held in self._shard_reports.values())

    def _has_enough(self, under_way: int = 0) -> bool:
        return self._max_env_steps is not None and self._counters.env_steps + under_way >= self._max_env_steps

    def finish(self) -> None:
        """Admit no more experience; samples go on as far as they are due."""
        self._max_env_steps = 0

    # Workers.

    def reserve(self, worker: int, incarnation: int, sequence: int, steps: int) -> ReserveReply:
        """Let a worker send a push to a shard, or say what to wait for; asked twice, it sets the steps aside once.

        Raises:
            ValueError: the push is larger than the largest there should be, so it might wait for ever.
        """
        caller, push = f"worker-{worker}", (incarnation, sequence, steps)
        if self._has_enough():
            return self._reply(caller, finished=True)
        if self._is_gone(worker, incarnation) or self._ledger.has_seen(Push(worker, incarnation, sequence)):
            return self._reply(caller, repeated=True)
        if steps > self.spec.largest_push:
            raise ValueError(f"a push holds at most {self.spec.largest_push} transitions, got {steps}")
        wait = None if self._reserved.get(worker) == push else self._insert_waits_for(worker, steps)
        if wait is None and not self._shard_reports:
            wait = _NO_WORD
        if wait is not None:
            return self._reply(caller, wait=wait)
        self._reserved[worker] = push
        return self._reply(caller, shards=tuple(sorted(self._shard_reports)), highest_priority=self._highest_priority)

    def _insert_waits_for(self, worker: int, steps: int) -> str | None:
        if not self._heard_all:
            return _NO_WORD
        under_way = sum(push[2] for other, push in self._reserved.items() if other != worker)
        if self._has_enough(under_way):
            return "pushes under way, which bring the run's last steps"
        # As if they had arrived: one by one they would have.
        return replace(self._limiter, inserts=self._limiter.inserts + under_way).insert_waits_for(steps)

    def _reply(self, caller: str, **answer: Any) -> ReserveReply:
        self._ledger.note(caller, answer.get("wait"))
        return ReserveReply(env_steps=self._counters.env_steps, **answer)

    def revoke(self, worker: int, incarnation: int, sequence: int | None = None) -> None:
        """Set nothing aside any more for a push that will not come, or, without `sequence`, a worker that is gone."""
        if sequence is None:
            self._gone[worker] = max(incarnation, self._gone.get(worker, -1))
        reservation = self._reserved.get(worker)
        if reservation is not None and reservation[:2] <= (incarnation, np.inf if sequence is None else sequence):
            del self._reserved[worker]

    def revoke_from(self, first: int, incarnation: int) -> None:
        """Do so for workers numbered `first` and up: the process that sent for them is gone."""
        self._gone_from = first, max(incarnation, self._gone_from[1])
        self._reserved = {worker: push for worker, push in self._reserved.items() if not self._is_gone(worker, push[0])}

    def _is_gone(self, worker: int, incarnation: int) -> bool:
        """Return whether a worker's call was under way when it died; what it asks for will not come."""
        first, last = self._gone_from
        return incarnation <= self._gone.get(worker, -1) or (worker >= first and incarnation <= last)

    # Shards.

    def report(self, shard: int, shard_report: ShardReport, push: Push | None = None) -> None:
        """Take a shard's word of what it holds now, and of a push that it took, which counts once."""
        steps = self._steps_since_its_last_word(shard, shard_report)
        if push is not None:
            reservation = self._reserved.get(push.worker)
            if reservation is not None and reservation[:2] <= (push.incarnation, push.sequence):
                del self._reserved[push.worker]
            if self._ledger.has_accepted(push):
                steps = 0  # another shard has it too
            else:
                self._ledger.accept(push)
        from_before = not self._heard_all
        self._hold(shard, shard_report)
        if from_before:  # an earlier desk let them in, and its limiter is gone
            self._carried = replace(self._carried, env_steps=self._carried.env_steps + steps)
        else:
            self._limiter.record_insert(steps)

    def _steps_since_its_last_word(self, shard: int, shard_report: ShardReport) -> int:
        which = shard, shard_report.incarnation
        before = self._counted.get(which, 0)
        self._counted[which] = max(before, shard_report.inserted)
        return self._counted[which] - before

    def _hold(self, shard: int, shard_report: ShardReport) -> None:
        self._highest_priority = max(self._highest_priority, shard_report.highest_priority)
        before = self._shard_reports.get(shard)
        if shard_report.incarnation <= self._lost.get(shard, -1) or (
            before and shard_report.incarnation < before.incarnation
        ):
            return  # said before it died
        self._shard_reports[shard] = shard_report
        if before is not None and shard_report.incarnation > before.incarnation:
            self._begin_anew_if_short()
        if not self._heard_all and len(self._shard_reports) == self._shards:
            self._heard_all = True
            if self._size:
                self._begin_anew()  # the shards outlived an earlier desk

    def lost(self, shard: int, incarnation: int) -> None:
        """Take note that a shard is gone, with what it held."""
        self._lost[shard] = max(incarnation, self._lost.get(shard, -1))
        if shard in self._shard_reports and self._shard_reports[shard].incarnation <= incarnation:
            del self._shard_reports[shard]
            self._begin_anew_if_short()

    def _begin_anew_if_short(self) -> None:
        if self._size < min(self._limiter.inserts, self.spec.minimum_size):
            self._begin_anew()

    def _begin_anew(self) -> None:
        """Carry the totals over to a new limiter, which takes what is held for the first inserts and owes nothing."""
        self._carried = self._counters
        self._limiter = self.spec.limiter()
        self._known = min(self._size, self.spec.minimum_size)
        self._limiter.record_insert(self._known)

    # The learner.

    def sample(
        self, k: int, batch_size: int, again: bool = False, lost: Sequence[tuple[int, int]] = ()
    ) -> SamplePlanReply:
        """Say where to draw k batches, or what to wait for.

        Args:
            k: batches.
            batch_size: transitions in each.
            again: these were granted and counted before, but could not be drawn.
            lost: shards, with their incarnations, that are gone.

        Raises:
            ValueError: see `ReplayServer.sample`.
        """
        count, largest = k * batch_size, self.spec.batches_per_sample * self.spec.batch_size
        if min(k, batch_size) < 1 or count > largest:
            raise ValueError(f"a sample call draws 1 to {largest} transitions, got {k} x {batch_size}")
        for shard, incarnation in lost:
            self.lost(shard, incarnation)
        if self._has_enough() and (not self._size or (not again and self._limiter.due < count)):
            self._ledger.note("learner", None)
            return SamplePlanReply(finished=True)
        wait = None if again else self._limiter.sample_waits_for(count)
        if not self._heard_all:
            wait = _NO_WORD
        elif not self._size:
            wait = wait or "experience: what the replay held is lost"
        self._ledger.note("learner", wait)
        if wait is not None:
            return SamplePlanReply(wait=wait)
        if not again:
            self._limiter.record_sample(count)
        return self._plan(k, batch_size)

    def _plan(self, k: int, batch_size: int) -> SamplePlanReply:
        shards = sorted(shard for shard, held in self._shard_reports.items() if held.mass > 0.0)
        masses = np.array([self._shard_reports[shard].mass for shard in shards])
        ends = masses.cumsum()
        total, uniform = float(ends[-1]), self._rng.random((k, batch_size))
        if self.spec.table.priority_exponent is not None:
            uniform = (np.arange(batch_size) + uniform) / batch_size  # stratified, as one table's
        targets = uniform.ravel() * total
        # Rounding may leave a target at the very end.
        which = np.minimum(np.searchsorted(ends, targets, side="right"), len(shards) - 1)
        fraction = (targets - (ends - masses)[which]) / masses[which]
        plan = SamplePlan(
            shard=np.array(shards, np.int64)[which],
            fraction=fraction.clip(0.0, np.nextafter(1.0, 0.0)),
            share={shard: float(mass / total) for shard, mass in zip(shards, masses, strict=True)},
            incarnations={shard: self._shard_reports[shard].incarnation for shard in shards},
            size=self._size,
            returns=self._ledger.returns,
        )
        return SamplePlanReply(plan)

    # The coordinator.

    def drain_episodes(self) -> tuple[EpisodeResult, ...]:
        """Return and forget the episodes that ended since the last call."""
        return self._ledger.drain_episodes()

    def stats(self) -> ReplayStats:
        """Return this desk's part of what `squall status` shows; see `add_up`."""
        return replace(
            empty_stats(),
            counters=self._counters,
            due=self._limiter.due,
            repeated_pushes=self._ledger.repeated_pushes,
            waiting=self._ledger.waiting(),
            highest_priority=self._highest_priority,
            counted=tuple((*which, steps) for which, steps in self._counted.items()),
        )


def add_up(router: ReplayStats, shards: Sequence[ReplayStats]) -> ReplayStats:
    """Return the stats of a whole replay from those of its desk and its shards."""
    summed = ("size", "capacity", "bytes", "evicted", "stale_updates", "repeated_pushes", "resident_bytes")
    sums = {name: sum(getattr(part, name) for part in (router, *shards)) for name in summed}
    ages = [shard.sample_age for shard in shards if shard.sample_age is not None]
    # Pushes go to the shards in turn, so that while one takes a step the others take one each.
    age = len(shards) * sum(ages) / len(ages) if ages else None
    return replace(router, **sums, sample_age=age)


ReplayRouterActor = actor_class(ReplayRouter)
