"""The replay server: the process with a replay table and its rate limiter.

A call never blocks the server. If a call may not proceed, the server replies immediately with the reason to wait, and
the client repeats the call until its deadline. A blocked call would occupy the actor, and the actor could not serve the
calls that the blocked call waits for.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil

from replay.errors import ConfigurationError
from replay.messages import InsertReply, Push, SampleReply
from replay.push_ledger import PushLedger
from replay.rate_limiter import RateLimiter
from replay.remote import actor_class
from replay.seeds import spawn_seed
from replay.table import MAX_SHARDS, TableSpec, TransitionTable
from replay.types import Array, EpisodeResult


@dataclass(frozen=True)
class ReplaySpec:
    """Configuration of a `ReplayServer`.

    Attributes:
        table: configuration of the table.
        samples_per_insert: see `RateLimiter`.
        minimum_size: transitions that must be inserted before the first sample.
        largest_push: maximum number of transitions in a push.
        batch_size: transitions in a batch.
        batches_per_sample: maximum number of batches k in a sample call.
    """

    table: TableSpec
    samples_per_insert: float
    minimum_size: int
    largest_push: int
    batch_size: int
    batches_per_sample: int

    def __post_init__(self) -> None:
        capacity = self.table.capacity
        for name in ("minimum_size", "largest_push", "batch_size", "batches_per_sample"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be positive, got {getattr(self, name)}")
        if self.batch_size > capacity:
            raise ConfigurationError(f"a replay of {capacity} transitions is smaller than a batch of {self.batch_size}")
        if self.largest_push > capacity:
            raise ConfigurationError(
                f"a replay of {capacity} transitions is smaller than one push of {self.largest_push}"
            )
        if self.minimum_size > capacity:
            raise ConfigurationError(
                f"the first sample waits for {self.minimum_size} transitions, but the replay holds only {capacity}: "
                f"the learner could never start"
            )
        self.limiter()

    def check_shards(self, shards: int) -> None:
        """Raise `ConfigurationError` unless the replay can be divided into `shards` shards."""
        if not 1 <= shards <= MAX_SHARDS:
            raise ConfigurationError(f"replay_shards must lie in [1, {MAX_SHARDS}], got {shards}")
        required = max(self.largest_push, self.table.layout.segment_length)
        smallest = self.table.capacity // shards
        if smallest < required:
            raise ConfigurationError(
                f"a replay of {self.table.capacity:,} transitions has shards of {smallest:,} with replay_shards "
                f"{shards}, and each must hold one push of {required:,}; use fewer shards, or a larger replay_size"
            )

    def limiter(self) -> RateLimiter:
        """Return the run's rate limiter, with the least tolerance that cannot deadlock."""
        return RateLimiter.for_calls(
            self.samples_per_insert, self.minimum_size, self.largest_push, self.batch_size * self.batches_per_sample
        )


@dataclass(frozen=True)
class Counters:
    """Totals of a run, which are carried over when a replay server is recreated.

    Attributes:
        env_steps: environment steps accepted.
        samples: transitions sampled.
        counted_inserts: transitions inserted beyond the minimum size of each server.
    """

    env_steps: int = 0
    samples: int = 0
    counted_inserts: int = 0

    @property
    def samples_per_insert(self) -> float:
        """Samples / (inserts - minimum size), or 0 if no insert is counted yet."""
        return self.samples / self.counted_inserts if self.counted_inserts else 0.0


@dataclass(frozen=True)
class ReplayStats:
    """Statistics of a replay server.

    Attributes:
        counters: totals of the run, including earlier servers.
        size: transitions in the table.
        capacity: maximum number of transitions.
        bytes: memory of the transitions in the table, in bytes.
        due: transitions that the learner has yet to sample; negative if the learner is ahead.
        evicted: transitions evicted.
        stale_updates: priority updates ignored because their id was stale.
        repeated_pushes: pushes that arrived again after they were accepted.
        waiting: caller -> the reason why it waits.
        highest_priority: highest priority seen.
        sample_age: mean age of the last sampled transitions, in steps inserted since; None before the first sample.
        pid: process ID of the server.
        node: host name of the server's node.
        resident_bytes: resident memory of the server's process, in bytes.
        counted: for a sharded replay, the shards' inserts that `counters` includes, as (shard, incarnation,
            `ShardReport.inserted`).
    """

    counters: Counters
    size: int
    capacity: int
    bytes: int
    due: float
    evicted: int
    stale_updates: int
    repeated_pushes: int
    waiting: dict[str, str]
    highest_priority: float
    sample_age: float | None
    pid: int
    node: str
    resident_bytes: int
    counted: tuple[tuple[int, int, int], ...] = ()


class ReplayServer:
    """Server of a replay table behind a rate limiter. Each call is short; the server handles one call at a time."""

    def __init__(
        self,
        spec: ReplaySpec,
        *,
        run_seed: int,
        incarnation: int = 0,
        carried: Counters | None = None,
        highest_priority: float = 1.0,
        max_env_steps: int | None = None,
    ) -> None:
        """Allocate the table.

        Args:
            spec: configuration of the table and the rate limiter.
            run_seed: seed of the run.
            incarnation: number of times this server was recreated.
            carried: totals of the run before this server. The rate limiter does not continue from these totals: the
                table first refills to its minimum size. Samples and inserts that were due at the previous server are
                not made up, so that no burst follows.
            highest_priority: highest priority seen since the start of the run.
            max_env_steps: number of accepted environment steps after which the run is finished. The server then rejects
                pushes, and serves sample calls only while enough samples are due.

        Raises:
            NotEnoughMemory: the machine cannot hold the table.
        """
        self.spec = spec
        self._table = TransitionTable(
            spec.table, seed=spawn_seed(run_seed, "replay", 0, incarnation), incarnation=incarnation, shared=True
        )
        self._table.highest_priority = highest_priority
        self._limiter = spec.limiter()
        self._carried = carried or Counters()
        self._max_env_steps = max_env_steps
        self._ledger = PushLedger()

    @property
    def _counters(self) -> Counters:
        carried, limiter = self._carried, self._limiter
        return Counters(
            carried.env_steps + limiter.inserts,
            carried.samples + limiter.samples,
            carried.counted_inserts + limiter.counted_inserts,
        )

    @property
    def _finished(self) -> bool:
        return self._max_env_steps is not None and self._counters.env_steps >= self._max_env_steps

    def finish(self) -> None:
        """Accept no more pushes; serve sample calls only while enough samples are due."""
        self._max_env_steps = 0

    def insert(self, push: Push) -> InsertReply:
        """Insert the segments of a push; acknowledge and ignore a repeated push.

        Raises:
            LayoutMismatch: a segment does not fit the layout; no segment of the push is inserted.
            ValueError: the push is larger than `largest_push`, and could therefore wait forever.
        """
        caller = f"worker-{push.worker}"
        if self._finished:
            return self._reply(caller, finished=True)
        if self._ledger.has_seen(push):
            return self._reply(caller, repeated=True)
        if push.steps > self.spec.largest_push:
            raise ValueError(f"a push must have at most {self.spec.largest_push} transitions, got {push.steps}")
        wait = self._limiter.insert_waits_for(push.steps)
        if wait is not None:
            return self._reply(caller, wait=wait)
        self._table.insert(push.segments)
        self._ledger.accept(push)
        self._limiter.record_insert(push.steps)
        return self._reply(caller, accepted=True)

    def _reply(self, caller: str, **fields: Any) -> InsertReply:
        self._ledger.record_wait(caller, fields.get("wait"))
        return InsertReply(env_steps=self._counters.env_steps, **fields)

    def sample(self, k: int, batch_size: int, indices_only: bool = False, retry_of: int | None = None) -> SampleReply:
        """Sample k batches, or return the reason to wait.

        Args:
            k: number of batches.
            batch_size: transitions in each batch.
            indices_only: whether to return frame indices in place of observations, for a caller that reads the frames
                from shared memory.
            retry_of: `SharedMemoryHandle.token` of an earlier reply whose frames the caller could not read. If the
                token is that of this server, the rate limiter has already counted the sample.

        Raises:
            ValueError: k or batch_size is not positive, or the call samples more than `batches_per_sample *
                batch_size` transitions of the spec, and could therefore wait forever.
        """
        count, largest = k * batch_size, self.spec.batches_per_sample * self.spec.batch_size
        if min(k, batch_size) < 1 or count > largest:
            raise ValueError(f"a sample call must sample 1 to {largest} transitions, got {k} x {batch_size}")
        if retry_of is None or retry_of != self._table.frames_token:
            if self._finished and (self._limiter.due < count or not self._table.size):
                self._ledger.record_wait("learner", None)
                return SampleReply(finished=True)
            wait = self._limiter.sample_waits_for(count)
            self._ledger.record_wait("learner", wait)
            if wait is not None:
                return SampleReply(wait=wait)
            self._limiter.record_sample(count)
        if indices_only and self._table.frames_token is not None:
            return SampleReply(indices=self._table.sample_indices(k, batch_size), returns=self._ledger.returns)
        return SampleReply(batch=self._table.sample(k, batch_size), returns=self._ledger.returns)

    def update_priorities(self, ids: Array, priorities: Array) -> int:
        """Set new priorities in the table; see `TransitionTable.update_priorities`."""
        return self._table.update_priorities(ids, priorities)

    def drain_episodes(self) -> tuple[EpisodeResult, ...]:
        """Return the episodes that ended since the last call, and forget them."""
        return self._ledger.drain_episodes()

    def stats(self) -> ReplayStats:
        """Return the statistics that `squall status` displays."""
        table = self._table
        return ReplayStats(
            counters=self._counters,
            size=table.size,
            capacity=table.spec.capacity,
            bytes=table.bytes,
            due=self._limiter.due,
            evicted=table.evicted,
            stale_updates=table.stale_updates,
            repeated_pushes=self._ledger.repeated_pushes,
            waiting=self._ledger.waiting(),
            highest_priority=table.highest_priority,
            sample_age=table.sample_age,
            pid=os.getpid(),
            node=socket.gethostname(),
            resident_bytes=psutil.Process().memory_info().rss,
        )


ReplayActor = actor_class(ReplayServer)
