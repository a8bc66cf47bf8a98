"""A replay in several shards: tables in processes of their own, and one desk for all there is only one of.

    worker ----admit---> ReplayRouter <---settle--- ReplayShard <--insert-- worker
    learner ---sample--> ReplayRouter               ReplayShard <---draw--- learner

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
from dataclasses import replace
from typing import Protocol

import psutil

from replay.messages import Batch, Push, SampleIndices, ShardReport
from replay.push_ledger import PushLedger
from replay.remote import actor_class
from replay.seeds import spawn_seed
from replay.server import Counters, ReplaySpec, ReplayStats
from replay.table import TransitionTable
from replay.types import Array


class ShardReportSink(Protocol):
    """Whom a shard tells: the desk, or what calls it across processes without waiting."""

    def report(self, shard: int, shard_report: ShardReport, push: Push | None = None) -> None:
        """See `ReplayRouter.report`."""
        ...


class ReplayShard:
    """One of a replay's tables. Every call is short; calls are served one at a time."""

    def __init__(
        self,
        spec: ReplaySpec,
        *,
        shard: int,
        shards: int,
        router: ShardReportSink,
        run_seed: int,
        incarnation: int = 0,
        with_others: bool = False,
    ) -> None:
        """Allocate the table.

        Args:
            spec: of the whole replay.
            shard: which this is.
            shards: how many there are.
            router: told of all that changes.
            run_seed: the run's seed.
            incarnation: how often this shard was recreated.
            with_others: whether all shards begin now, on this node, so that it must have memory for all of them.

        Raises:
            NotEnoughMemory: the machine cannot hold the table.
        """
        if with_others:
            spec.table.check_memory()
        self._shard, self._incarnation, self._to = shard, incarnation, router
        self._table = TransitionTable(
            spec.table.shard(shard, shards),
            seed=spawn_seed(run_seed, "replay", shard, incarnation),
            shard=shard,
            incarnation=incarnation,
            shared=True,
        )
        self._seen = PushLedger()
        self._inserted = 0
        self._tell()

    def _tell(self, *push: Push) -> None:
        table = self._table
        held = ShardReport(self._incarnation, table.size, table.mass, table.highest_priority, self._inserted)
        self._to.report(self._shard, held, *push)

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

    def sample_at(self, fractions: Array, rows_only: bool = False) -> Batch | SampleIndices | None:
        """Return `TransitionTable.sample_at`; None for an empty table. `rows_only` is that of `ReplayServer.sample`."""
        if not self._table.size:
            return None
        if rows_only and self._table.frames_token is not None:
            return self._table.sample_indices_at(fractions)
        return self._table.sample_at(fractions)

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
            empty_stats(),
            size=table.size,
            capacity=table.spec.capacity,
            bytes=table.bytes,
            evicted=table.evicted,
            stale_updates=table.stale_updates,
            repeated_pushes=self._seen.repeated_pushes,
            highest_priority=table.highest_priority,
            sample_age=table.sample_age,
        )


def empty_stats() -> ReplayStats:
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


ReplayShardActor = actor_class(ReplayShard)
