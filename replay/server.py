"""ReplayServer: the process that holds a table; ReplayClient: what everyone else holds.

The server never parks a call: one that may not proceed is answered at once with the reason to wait, and the
client asks again until its deadline. A parked call would occupy the very actor whose other calls release it.
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
from replay.table import MOST_SHARDS, TableSpec, TransitionTable
from replay.types import Array, EpisodeResult


@dataclass(frozen=True)
class ReplaySpec:
    """What a `ReplayServer` is made from.

    Attributes:
        table: the table it holds.
        samples_per_insert: see `RateLimiter`.
        minimum_size: transitions inserted before the first sample.
        largest_push: transitions in the largest push.
        batch_size: transitions in a batch.
        batches_per_sample: the largest k of a sample call.
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
        """Raise `ConfigurationError`, naming the figures, unless the replay can be divided among `shards`."""
        if not 1 <= shards <= MOST_SHARDS:
            raise ConfigurationError(f"replay_shards must lie in [1, {MOST_SHARDS}], got {shards}")
        least = max(self.largest_push, self.table.layout.segment_length)
        smallest = self.table.capacity // shards
        if smallest < least:
            raise ConfigurationError(
                f"a replay of {self.table.capacity:,} transitions has shards of {smallest:,} with replay_shards "
                f"{shards}, and each must hold one push of {least:,}; use fewer, or a larger replay_size"
            )

    def limiter(self) -> RateLimiter:
        """Make the run's rate limiter, with the least tolerance that cannot deadlock."""
        return RateLimiter.for_calls(
            self.samples_per_insert, self.minimum_size, self.largest_push, self.batch_size * self.batches_per_sample
        )


@dataclass(frozen=True)
class Counters:
    """Totals of a run that outlive one replay server.

    Attributes:
        env_steps: environment steps accepted.
        samples: transitions drawn.
        counted_inserts: transitions inserted beyond each server's minimum size.
    """

    env_steps: int = 0
    samples: int = 0
    counted_inserts: int = 0

    @property
    def samples_per_insert(self) -> float:
        """Samples / (inserts - minimum size); 0 before anything counts."""
        return self.samples / self.counted_inserts if self.counted_inserts else 0.0


@dataclass(frozen=True)
class ReplayStats:
    """What a replay server says of itself.

    Attributes:
        counters: the run's totals, earlier servers included.
        size: transitions held.
        capacity: transitions it can hold.
        bytes: memory of what is held.
        due: samples that the learner has yet to draw, negative when it is ahead.
        evicted: transitions evicted.
        stale_updates: priority updates ignored because their item was gone.
        repeated_pushes: pushes that arrived a second time.
        waiting: caller -> what it waits for.
        highest_priority: highest priority seen.
        sample_age: mean age of the transitions drawn last, in steps inserted since; None before the first draw.
        pid: of the server's process.
        node: host it runs on.
        resident_bytes: resident memory of the server's process.
        counted: for a replay in shards, the `ShardReport.inserted` that the counters include, as (shard, incarnation,
            steps).
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
    """A table behind a rate limiter. Every call is short; calls are served one at a time."""

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
            spec: what to hold and at which rate.
            run_seed: the run's seed.
            incarnation: how often this server was recreated.
            carried: totals of the run before this server. The limiter starts anew beside them: the table
                refills to its minimum size first, and nothing is owed, so there is no burst.
            highest_priority: the highest priority seen since the run began.
            max_env_steps: once this many steps are accepted the run is finished: later pushes are turned
                away, and samples are handed out only as far as they are due.

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
        """Accept no more experience; samples go on as far as they are due."""
        self._max_env_steps = 0

    def insert(self, push: Push) -> InsertReply:
        """Add a push's segments, once; a repeat is acknowledged and ignored.

        Raises:
            LayoutMismatch: a segment does not fit; none of the push is inserted.
            ValueError: the push is larger than the largest there should be, so it might wait for ever.
        """
        caller = f"worker-{push.worker}"
        if self._finished:
            return self._reply(caller, finished=True)
        if self._ledger.has_seen(push):
            return self._reply(caller, repeated=True)
        if push.steps > self.spec.largest_push:
            raise ValueError(f"a push holds at most {self.spec.largest_push} transitions, got {push.steps}")
        wait = self._limiter.insert_waits_for(push.steps)
        if wait is not None:
            return self._reply(caller, wait=wait)
        self._table.insert(push.segments)
        self._ledger.accept(push)
        self._limiter.record_insert(push.steps)
        return self._reply(caller, accepted=True)

    def _reply(self, caller: str, **answer: Any) -> InsertReply:
        self._ledger.note(caller, answer.get("wait"))
        return InsertReply(env_steps=self._counters.env_steps, **answer)

    def sample(self, k: int, batch_size: int, rows_only: bool = False, instead_of: int | None = None) -> SampleReply:
        """SampleIndices k batches, or say what to wait for.

        Args:
            k: batches.
            batch_size: transitions in each.
            rows_only: whether rows are enough, because the caller reads the frames where they lie.
            instead_of: the `SharedMemoryHandle.token` of a draw that could not be read: it was granted, and counted, by
                the server whose frames those are.

        Raises:
            ValueError: k or batch_size is not positive, or they ask for more than the largest sample there
                should be, so that it might wait for ever.
        """
        count, largest = k * batch_size, self.spec.batches_per_sample * self.spec.batch_size
        if min(k, batch_size) < 1 or count > largest:
            raise ValueError(f"a sample call draws 1 to {largest} transitions, got {k} x {batch_size}")
        if instead_of is None or instead_of != self._table.frames_token:
            if self._finished and (self._limiter.due < count or not self._table.size):
                self._ledger.note("learner", None)
                return SampleReply(finished=True)
            wait = self._limiter.sample_waits_for(count)
            self._ledger.note("learner", wait)
            if wait is not None:
                return SampleReply(wait=wait)
            self._limiter.record_sample(count)
        if rows_only and self._table.frames_token is not None:
            return SampleReply(indices=self._table.sample_indices(k, batch_size), returns=self._ledger.returns)
        return SampleReply(batch=self._table.sample(k, batch_size), returns=self._ledger.returns)

    def update_priorities(self, ids: Array, priorities: Array) -> int:
        """See `TransitionTable.update_priorities`."""
        return self._table.update_priorities(ids, priorities)

    def drain_episodes(self) -> tuple[EpisodeResult, ...]:
        """Return and forget the episodes that ended since the last call."""
        return self._ledger.drain_episodes()

    def stats(self) -> ReplayStats:
        """Return what `squall status` shows."""
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
