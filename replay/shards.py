"""A replay in several shards: tables in processes of their own, and one desk for all there is only one of.

    worker ----admit---> ReplayDesk <---settle--- ReplayShard <--insert-- worker
    learner ---sample--> ReplayDesk               ReplayShard <---draw--- learner

The desk holds the rate limiter, the totals, the highest priority and the random numbers, but no experience. It
answers a sample with places in the whole replay's mass, shard laid beside shard; so a draw is that of one table,
whatever each shard holds. A push counts when the shard that took it says so; the words of two shards about two pushes
of one worker may overtake each other. Until then its steps are set aside: workers that are admitted at once cannot
together insert more than the limiter allows.

When a shard dies the desk draws from the others. Only if these hold less than what the limiter takes for granted
does it begin anew, and owes nothing for what was lost.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import psutil

from replay.desk import Desk
from replay.remote import actor_class
from replay.seeds import spawn_seed
from replay.server import Counters, ReplaySpec, ReplayStats
from replay.table import TransitionTable
from replay.types import AdmitReply, Array, Batch, Draw, EpisodeResult, Holding, Places, PlacesReply, Push

_NO_WORD = "word from every shard of the replay"


class ReplayDesk:
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
        self._desk = Desk()
        self._counted = {(shard, of): steps for shard, of, steps in counted}
        self._held: dict[int, Holding] = {}
        self._lost: dict[int, int] = {}
        self._admitted: dict[int, tuple[int, int, int]] = {}
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
        return sum(held.size for held in self._held.values())

    def _has_enough(self, under_way: int = 0) -> bool:
        return self._max_env_steps is not None and self._counters.env_steps + under_way >= self._max_env_steps

    def finish(self) -> None:
        """Admit no more experience; samples go on as far as they are due."""
        self._max_env_steps = 0

    # Workers.

    def admit(self, worker: int, incarnation: int, sequence: int, steps: int) -> AdmitReply:
        """Let a worker send a push to a shard, or say what to wait for; asked twice, it sets the steps aside once.

        Raises:
            ValueError: the push is larger than the largest there should be, so it might wait for ever.
        """
        caller, push = f"worker-{worker}", (incarnation, sequence, steps)
        if self._has_enough():
            return self._reply(caller, finished=True)
        if self._is_gone(worker, incarnation) or self._desk.has_seen(Push(worker, incarnation, sequence)):
            return self._reply(caller, repeated=True)
        if steps > self.spec.largest_push:
            raise ValueError(f"a push holds at most {self.spec.largest_push} transitions, got {steps}")
        wait = None if self._admitted.get(worker) == push else self._insert_waits_for(worker, steps)
        if wait is None and not self._held:
            wait = _NO_WORD
        if wait is not None:
            return self._reply(caller, wait=wait)
        self._admitted[worker] = push
        return self._reply(caller, shards=tuple(sorted(self._held)), highest_priority=self._highest_priority)

    def _insert_waits_for(self, worker: int, steps: int) -> str | None:
        if not self._heard_all:
            return _NO_WORD
        under_way = sum(push[2] for other, push in self._admitted.items() if other != worker)
        if self._has_enough(under_way):
            return "pushes under way, which bring the run's last steps"
        # As if they had arrived: one by one they would have.
        return replace(self._limiter, inserts=self._limiter.inserts + under_way).insert_waits_for(steps)

    def _reply(self, caller: str, **answer: Any) -> AdmitReply:
        self._desk.note(caller, answer.get("wait"))
        return AdmitReply(env_steps=self._counters.env_steps, **answer)

    def revoke(self, worker: int, incarnation: int, sequence: int | None = None) -> None:
        """Set nothing aside any more for a push that will not come, or, without `sequence`, a worker that is gone."""
        if sequence is None:
            self._gone[worker] = max(incarnation, self._gone.get(worker, -1))
        admitted = self._admitted.get(worker)
        if admitted is not None and admitted[:2] <= (incarnation, np.inf if sequence is None else sequence):
            del self._admitted[worker]

    def revoke_from(self, first: int, incarnation: int) -> None:
        """Do so for workers numbered `first` and up: the process that sent for them is gone."""
        self._gone_from = first, max(incarnation, self._gone_from[1])
        self._admitted = {worker: push for worker, push in self._admitted.items() if not self._is_gone(worker, push[0])}

    def _is_gone(self, worker: int, incarnation: int) -> bool:
        """Return whether a worker's call was under way when it died; what it asks for will not come."""
        first, last = self._gone_from
        return incarnation <= self._gone.get(worker, -1) or (worker >= first and incarnation <= last)

    # Shards.

    def settle(self, shard: int, holding: Holding, push: Push | None = None) -> None:
        """Take a shard's word of what it holds now, and of a push that it took, which counts once."""
        steps = self._steps_since_its_last_word(shard, holding)
        if push is not None:
            admitted = self._admitted.get(push.worker)
            if admitted is not None and admitted[:2] <= (push.incarnation, push.sequence):
                del self._admitted[push.worker]
            if self._desk.has_accepted(push):
                steps = 0  # another shard has it too
            else:
                self._desk.accept(push)
        from_before = not self._heard_all
        self._hold(shard, holding)
        if from_before:  # an earlier desk let them in, and its limiter is gone
            self._carried = replace(self._carried, env_steps=self._carried.env_steps + steps)
        else:
            self._limiter.record_insert(steps)

    def _steps_since_its_last_word(self, shard: int, holding: Holding) -> int:
        which = shard, holding.incarnation
        before = self._counted.get(which, 0)
        self._counted[which] = max(before, holding.inserted)
        return self._counted[which] - before

    def _hold(self, shard: int, holding: Holding) -> None:
        self._highest_priority = max(self._highest_priority, holding.highest_priority)
        before = self._held.get(shard)
        if holding.incarnation <= self._lost.get(shard, -1) or (before and holding.incarnation < before.incarnation):
            return  # said before it died
        self._held[shard] = holding
        if before is not None and holding.incarnation > before.incarnation:
            self._begin_anew_if_short()
        if not self._heard_all and len(self._held) == self._shards:
            self._heard_all = True
            if self._size:
                self._begin_anew()  # the shards outlived an earlier desk

    def lost(self, shard: int, incarnation: int) -> None:
        """Take note that a shard is gone, with what it held."""
        self._lost[shard] = max(incarnation, self._lost.get(shard, -1))
        if shard in self._held and self._held[shard].incarnation <= incarnation:
            del self._held[shard]
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

    def sample(self, k: int, batch_size: int, again: bool = False, lost: Sequence[tuple[int, int]] = ()) -> PlacesReply:
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
            self._desk.note("learner", None)
            return PlacesReply(finished=True)
        wait = None if again else self._limiter.sample_waits_for(count)
        if not self._heard_all:
            wait = _NO_WORD
        elif not self._size:
            wait = wait or "experience: what the replay held is lost"
        self._desk.note("learner", wait)
        if wait is not None:
            return PlacesReply(wait=wait)
        if not again:
            self._limiter.record_sample(count)
        return self._places(k, batch_size)

    def _places(self, k: int, batch_size: int) -> PlacesReply:
        shards = sorted(shard for shard, held in self._held.items() if held.mass > 0.0)
        masses = np.array([self._held[shard].mass for shard in shards])
        ends = masses.cumsum()
        total, uniform = float(ends[-1]), self._rng.random((k, batch_size))
        if self.spec.table.priority_exponent is not None:
            uniform = (np.arange(batch_size) + uniform) / batch_size  # stratified, as one table's
        targets = uniform.ravel() * total
        # Rounding may leave a target at the very end.
        which = np.minimum(np.searchsorted(ends, targets, side="right"), len(shards) - 1)
        place = (targets - (ends - masses)[which]) / masses[which]
        places = Places(
            shard=np.array(shards, np.int64)[which],
            place=place.clip(0.0, np.nextafter(1.0, 0.0)),
            share={shard: float(mass / total) for shard, mass in zip(shards, masses, strict=True)},
            incarnations={shard: self._held[shard].incarnation for shard in shards},
            size=self._size,
            returns=self._desk.returns,
        )
        return PlacesReply(places)

    # The coordinator.

    def drain_episodes(self) -> tuple[EpisodeResult, ...]:
        """Return and forget the episodes that ended since the last call."""
        return self._desk.drain_episodes()

    def stats(self) -> ReplayStats:
        """Return this desk's part of what `squall status` shows; see `add_up`."""
        return replace(
            _empty_stats(),
            counters=self._counters,
            due=self._limiter.due,
            repeated_pushes=self._desk.repeated_pushes,
            waiting=self._desk.waiting(),
            highest_priority=self._highest_priority,
            counted=tuple((*which, steps) for which, steps in self._counted.items()),
        )


class Settles(Protocol):
    """Whom a shard tells: the desk, or what calls it across processes without waiting."""

    def settle(self, shard: int, holding: Holding, push: Push | None = None) -> None:
        """See `ReplayDesk.settle`."""
        ...


class ReplayShard:
    """One of a replay's tables. Every call is short; calls are served one at a time."""

    def __init__(
        self,
        spec: ReplaySpec,
        *,
        shard: int,
        shards: int,
        desk: Settles,
        run_seed: int,
        incarnation: int = 0,
        with_others: bool = False,
    ) -> None:
        """Allocate the table.

        Args:
            spec: of the whole replay.
            shard: which this is.
            shards: how many there are.
            desk: told of all that changes.
            run_seed: the run's seed.
            incarnation: how often this shard was recreated.
            with_others: whether all shards begin now, on this node, so that it must have memory for all of them.

        Raises:
            NotEnoughMemory: the machine cannot hold the table.
        """
        if with_others:
            spec.table.check_memory()
        self._shard, self._incarnation, self._to = shard, incarnation, desk
        self._table = TransitionTable(
            spec.table.shard(shard, shards),
            seed=spawn_seed(run_seed, "replay", shard, incarnation),
            shard=shard,
            incarnation=incarnation,
            shared=True,
        )
        self._seen = Desk()
        self._inserted = 0
        self._tell()

    def _tell(self, *push: Push) -> None:
        table = self._table
        held = Holding(self._incarnation, table.size, table.mass, table.highest_priority, self._inserted)
        self._to.settle(self._shard, held, *push)

    def insert(self, push: Push, highest_priority: float = 1.0) -> bool:
        """Add a push's segments, once, with the highest priority of all shards; return False for a repeat.

        Raises:
            LayoutMismatch: a segment does not fit; none of the push is inserted.
        """
        if self._seen.has_seen(push):
            return False
        self._table.highest_priority = max(self._table.highest_priority, highest_priority)
        self._table.insert(push.segments)
        self._seen.accept(Push(push.worker, push.incarnation, push.sequence))
        self._inserted += push.steps
        self._tell(replace(push, segments=()))
        return True

    def draw(self, places: Array, rows_only: bool = False) -> Batch | Draw | None:
        """See `TransitionTable.draw`, and of `rows_only` `ReplayServer.sample`; None if there is nothing to draw."""
        if not self._table.size:
            return None
        if rows_only and self._table.frames_token is not None:
            return self._table.choose_at(places)
        return self._table.draw(places)

    def update_priorities(self, ids: Array, priorities: Array) -> int:
        """See `TransitionTable.update_priorities`."""
        stale = self._table.update_priorities(ids, priorities)
        self._tell()
        return stale

    def stats(self) -> ReplayStats:
        """Return this shard's part of what `squall status` shows, and tell the desk, which may be a new one."""
        self._tell()
        table = self._table
        return replace(
            _empty_stats(),
            size=table.size,
            capacity=table.spec.capacity,
            bytes=table.bytes,
            evicted=table.evicted,
            stale_updates=table.stale_updates,
            repeated_pushes=self._seen.repeated_pushes,
            highest_priority=table.highest_priority,
            sample_age=table.sample_age,
        )


def _empty_stats() -> ReplayStats:
    """Return stats of this process, with no experience in it."""
    return ReplayStats(
        counters=Counters(),
        size=0,
        capacity=0,
        bytes=0,
        due=0.0,
        evicted=0,
        stale_updates=0,
        repeated_pushes=0,
        waiting={},
        highest_priority=1.0,
        sample_age=None,
        pid=os.getpid(),
        node=socket.gethostname(),
        resident_bytes=psutil.Process().memory_info().rss,
    )


def add_up(desk: ReplayStats, shards: Sequence[ReplayStats]) -> ReplayStats:
    """Return the stats of a whole replay from those of its desk and its shards."""
    summed = ("size", "capacity", "bytes", "evicted", "stale_updates", "repeated_pushes", "resident_bytes")
    sums = {name: sum(getattr(part, name) for part in (desk, *shards)) for name in summed}
    ages = [shard.sample_age for shard in shards if shard.sample_age is not None]
    # Pushes go to the shards in turn, so that while one takes a step the others take one each.
    age = len(shards) * sum(ages) / len(ages) if ages else None
    return replace(desk, **sums, sample_age=age)


ReplayDeskActor = actor_class(ReplayDesk)
ReplayShardActor = actor_class(ReplayShard)
