"""The replay shard: the process with one table of a sharded replay; see `replay.sharding`."""

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
    """Receiver of a shard's reports: a `ReplayRouter`, or a `ShardReporter` that calls a router in another process."""

    def report(self, shard: int, shard_report: ShardReport, push: Push | None = None) -> None:
        """Receive a report; see `ReplayRouter.report`."""
        ...


class ReplayShard:
    """Server of one table of a sharded replay. Each call is short; the server handles one call at a time."""

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
            spec: configuration of the whole replay.
            shard: index of this shard.
            shards: number of shards.
            router: receiver of a report after each change.
            run_seed: seed of the run.
            incarnation: number of times this shard was recreated.
            with_others: whether all shards start now on this node, which must then have memory for all of them.

        Raises:
            NotEnoughMemory: the machine cannot hold the table.
        """
        if with_others:
            spec.table.check_memory()
        self._shard, self._incarnation, self._router = shard, incarnation, router
        self._table = TransitionTable(
            spec.table.shard(shard, shards),
            seed=spawn_seed(run_seed, "replay", shard, incarnation),
            shard=shard,
            incarnation=incarnation,
            shared=True,
        )
        self._ledger = PushLedger()
        self._inserted = 0
        self._report()

    def _report(self, *push: Push) -> None:
        table = self._table
        report = ShardReport(self._incarnation, table.size, table.mass, table.highest_priority, self._inserted)
        self._router.report(self._shard, report, *push)

    def insert(self, push: Push, highest_priority: float = 1.0) -> bool:
        """Insert the segments of a push; ignore a repeated push.

        Args:
            push: the push.
            highest_priority: highest priority that any shard has seen; the new transitions get at least this priority.

        Returns:
            Whether the push was inserted; False for a repeated push.

        Raises:
            LayoutMismatch: a segment does not fit the layout; no segment of the push is inserted.
        """
        if self._ledger.has_seen(push):
            return False
        self._table.highest_priority = max(self._table.highest_priority, highest_priority)
        self._table.insert(push.segments)
        self._ledger.accept(Push(push.worker, push.incarnation, push.sequence))
        self._inserted += push.steps
        self._report(replace(push, segments=()))
        return True

    def sample_at(self, fractions: Array, indices_only: bool = False) -> Batch | SampleIndices | None:
        """Return the transitions at fractions of the table's mass, or None if the table is empty.

        See `TransitionTable.sample_at` for `fractions`, and `ReplayServer.sample` for `indices_only`.
        """
        if not self._table.size:
            return None
        if indices_only and self._table.frames_token is not None:
            return self._table.sample_indices_at(fractions)
        return self._table.sample_at(fractions)

    def update_priorities(self, ids: Array, priorities: Array) -> int:
        """Set new priorities in the table; see `TransitionTable.update_priorities`."""
        stale = self._table.update_priorities(ids, priorities)
        self._report()
        return stale

    def stats(self) -> ReplayStats:
        """Return this shard's part of the statistics that `squall status` displays."""
        self._report()  # the router may have been recreated since the last report
        table = self._table
        return replace(
            empty_stats(),
            size=table.size,
            capacity=table.spec.capacity,
            bytes=table.bytes,
            evicted=table.evicted,
            stale_updates=table.stale_updates,
            repeated_pushes=self._ledger.repeated_pushes,
            highest_priority=table.highest_priority,
            sample_age=table.sample_age,
        )


def empty_stats() -> ReplayStats:
    """Return the statistics of this process with all experience fields at zero."""
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
