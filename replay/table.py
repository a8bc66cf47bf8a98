"""The replay table: a preallocated ring buffer of segments, sampled uniformly or by priority.

The table has two rings: frames (the frame of each row, stored once) and transitions (one per start position, pointing
to frames). Each ring is addressed by a counter that only increases; the slot of a counter is its remainder by the
ring's size. Therefore a segment may wrap around the end of a ring. One comparison decides whether a transition is still
in the table, because a counter identifies both a slot and the transition in that slot. Eviction removes the oldest
segment as a whole, without a search.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from replay.errors import ConfigurationError, NotEnoughMemory
from replay.frames import FrameRing, write_ring
from replay.memory import available_memory, gibibytes
from replay.messages import Batch, SampleIndices
from replay.sum_tree import SumTree
from replay.types import Array, Layout, Segment, Segments, join_segments

# Id of a transition, from the highest bit: 0, shard, incarnation, sequence number (the counter of the transition).
_SEQUENCE_BITS = 43
_INCARNATION_BITS = 12
_SHARD_BITS = 8
MAX_SHARDS = 1 << _SHARD_BITS

# Extra frames per transition, for frames at which no transition starts: the last row of each episode. Environments with
# vector observations have short episodes and small frames. Environments with image observations have long episodes, and
# their slack keeps segments of 64 rows with n <= 5 below 1.15 frames per transition. If episodes are even shorter, the
# table evicts slightly early.
_SLACK_SMALL, _SLACK_LARGE = 0.30, 0.0125
_LARGE_FRAME_BYTES = 1024


@dataclass(frozen=True)
class TableSpec:
    """Configuration of a `TransitionTable`.

    Attributes:
        layout: shapes and dtypes of the experience.
        capacity: maximum number of transitions.
        priority_exponent: alpha of prioritized replay; with None, sampling is uniform.
    """

    layout: Layout
    capacity: int
    priority_exponent: float | None = None

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ConfigurationError(f"replay capacity must be positive, got {self.capacity}")
        if self.capacity < self.layout.segment_length:
            raise ConfigurationError(
                f"a replay of {self.capacity} transitions cannot hold one segment of {self.layout.segment_length}"
            )
        if self.frame_capacity >= 2**31:
            raise ConfigurationError(f"a replay must have fewer than 2**31 frames, got {self.frame_capacity:,}")
        alpha = self.priority_exponent
        if alpha is not None and not 0.0 <= alpha <= 1.0:
            raise ConfigurationError(f"the priority exponent must lie in [0, 1], got {alpha}")

    @property
    def frame_capacity(self) -> int:
        """Maximum number of frames."""
        layout = self.layout
        overhead = layout.max_segment_frames / layout.segment_length
        slack = _SLACK_LARGE if layout.frame_bytes >= _LARGE_FRAME_BYTES else _SLACK_SMALL
        return int(self.capacity * (overhead + slack)) + layout.max_segment_frames

    @property
    def expected_bytes(self) -> int:
        """Size of a full table in bytes, computed before any memory is allocated."""
        layout = self.layout
        action = np.dtype(layout.action_dtype).itemsize * int(np.prod(layout.action_shape, dtype=np.int64))
        per_transition = 4 + 1 + 4 + 1 + action + 4 + 4
        total = self.frame_capacity * layout.frame_bytes + self.capacity * per_transition
        if self.priority_exponent is not None:
            total += SumTree.bytes_for(self.capacity)
        return total

    def shard(self, index: int, shards: int) -> TableSpec:
        """Return the spec of shard `index` of a table whose capacity is divided evenly among `shards` shards."""
        return replace(self, capacity=self.capacity // shards + (index < self.capacity % shards))

    def check_memory(self, available: int | None = None) -> None:
        """Raise `NotEnoughMemory`, with the required and the available memory, if this table does not fit.

        Args:
            available: available memory in bytes; None measures it with `available_memory`.
        """
        available = available_memory() if available is None else available
        if self.expected_bytes > available:
            raise NotEnoughMemory(
                f"a replay of {self.capacity:,} transitions needs {gibibytes(self.expected_bytes)}, but "
                f"{gibibytes(available)} are available here; {self._advice(available)}"
            )

    def _advice(self, available: int) -> str:
        sizes = range(self.layout.segment_length, self.capacity)
        # Leave a tenth free, so that the proposed size still fits if other processes allocate memory meanwhile.
        fit = bisect_right(sizes, 0.9 * available, key=lambda size: replace(self, capacity=size).expected_bytes)
        return f"a replay_size of {sizes[fit - 1]:,} would fit" if fit else "no replay_size would fit"


@dataclass
class _Ring:
    """Counters of both rings.

    Attributes:
        segments: `(transitions, frames)` of each segment, oldest first.
        oldest: counter of the oldest transition.
        newest: counter after the newest transition.
        oldest_frame: counter of the oldest frame.
        newest_frame: counter after the newest frame.
    """

    segments: deque[tuple[int, int]] = field(default_factory=deque)
    oldest: int = 0
    newest: int = 0
    oldest_frame: int = 0
    newest_frame: int = 0


def shards_of(ids: Array) -> Array:
    """Return the shard of each id."""
    return ids >> _SEQUENCE_BITS + _INCARNATION_BITS


class TransitionTable:
    """Replay table that stores segments and returns batches of transitions; not thread-safe.

    Uniform sampling is uniform over transitions, not over segments. Prioritized sampling is proportional to
    `priority ** alpha`, with each batch stratified separately (Schaul et al. 2016, section 3.3 and appendix B.2.1).

    Attributes:
        spec: configuration of the table.
        highest_priority: highest priority seen so far; new transitions get this priority.
        sample_age: mean age of the last sampled transitions, in transitions inserted since; None before the first.
        stale_updates: number of priority updates ignored because their id was stale.
        evicted: number of transitions evicted so far.
    """

    def __init__(
        self,
        spec: TableSpec,
        *,
        seed: np.random.SeedSequence,
        shard: int = 0,
        incarnation: int = 0,
        shared: bool = False,
    ) -> None:
        """Allocate the table.

        Args:
            spec: configuration of the table.
            seed: seed of the sampler.
            shard: index of this table among several shards, below 256; part of each id.
            incarnation: number of times this table was recreated; ids of earlier incarnations are stale.
            shared: whether to store large frames in shared memory, for other processes of this node.

        Raises:
            NotEnoughMemory: the machine lacks `spec.expected_bytes`.
            ConfigurationError: shard or incarnation is outside its range.
        """
        if not (0 <= shard < MAX_SHARDS and incarnation >= 0):
            raise ConfigurationError(
                f"shard must lie in [0, {MAX_SHARDS}) and incarnation must not be negative, got {shard}, {incarnation}"
            )
        spec.check_memory()
        self.spec = spec
        layout, capacity = spec.layout, spec.capacity
        # For small frames, a copy in the reply is faster than a read from shared memory.
        shared = shared and layout.frame_bytes >= _LARGE_FRAME_BYTES
        self._frames = FrameRing(spec.frame_capacity, layout, shared=shared)
        self._row = np.empty(capacity, np.int32)
        self._age = np.empty(capacity, np.uint8)
        self._bootstrap_row = np.empty(capacity, np.int32)
        self._bootstrap_age = np.empty(capacity, np.uint8)
        self._action = np.empty((capacity, *layout.action_shape), layout.action_dtype)
        self._reward = np.empty(capacity, np.float32)
        self._discount = np.empty(capacity, np.float32)
        self._ring = _Ring()
        self._rng = np.random.default_rng(seed)
        self._tag = shard << _INCARNATION_BITS | incarnation % (1 << _INCARNATION_BITS)
        self._tree = None if spec.priority_exponent is None else SumTree(capacity)
        self.highest_priority = 1.0
        self.sample_age: float | None = None
        self.stale_updates = 0
        self.evicted = 0

    @property
    def size(self) -> int:
        """Number of transitions in the table."""
        return self._ring.newest - self._ring.oldest

    @property
    def bytes(self) -> int:
        """Size in bytes of the frames and transitions that are in the table."""
        ring, frame_bytes = self._ring, self.spec.layout.frame_bytes
        transition_bytes = self.spec.expected_bytes - self.spec.frame_capacity * frame_bytes  # of a full table
        frames = ring.newest_frame - ring.oldest_frame
        return frames * frame_bytes + transition_bytes * self.size // self.spec.capacity

    def insert(self, segments: Sequence[Segment]) -> None:
        """Insert all segments, and evict the oldest segments as far as necessary.

        Raises:
            LayoutMismatch: a segment does not fit the layout; the table is then unchanged.
        """
        self._insert(join_segments(segments, self.spec.layout))

    def _insert(self, segments: Segments) -> None:
        """Insert segments that fit the layout."""
        if not segments:
            return
        ring, frame_capacity = self._ring, self.spec.frame_capacity
        steps, frames = segments.steps, len(segments.frames)
        if len(segments) > 1 and (steps > self.spec.capacity or frames > frame_capacity):
            middle = len(segments) // 2  # the second half evicts a part of the first half
            self._insert(segments[:middle])
            self._insert(segments[middle:])
            return
        self._evict_for(steps, frames)
        start, counts = ring.newest, segments.frame_counts
        first_frame = np.repeat(ring.newest_frame + np.cumsum(counts) - counts, segments.step_counts)
        self._frames.write(ring.newest_frame, segments.frames)
        ring.newest_frame += frames
        write_ring(self._row, start, (first_frame + segments.row) % frame_capacity)
        write_ring(self._bootstrap_row, start, (first_frame + segments.bootstrap_row) % frame_capacity)
        write_ring(self._age, start, segments.age)
        write_ring(self._bootstrap_age, start, segments.bootstrap_age)
        write_ring(self._action, start, segments.action)
        write_ring(self._reward, start, segments.reward)
        write_ring(self._discount, start, segments.discount)
        if self._tree is not None:
            slots = np.arange(start, start + steps) % self.spec.capacity
            self._tree.set(slots, np.full(steps, self._weight(self.highest_priority)))
        ring.segments.extend(zip(segments.step_counts.tolist(), counts.tolist(), strict=True))
        ring.newest += steps

    def _evict_for(self, steps: int, frames: int) -> None:
        """Evict the oldest segments until `steps` more transitions and `frames` more frames fit."""
        ring, first = self._ring, self._ring.oldest
        while self.size + steps > self.spec.capacity or (
            ring.newest_frame - ring.oldest_frame + frames > self.spec.frame_capacity
        ):
            oldest_steps, oldest_frames = ring.segments.popleft()
            ring.oldest += oldest_steps
            ring.oldest_frame += oldest_frames
        evicted = ring.oldest - first
        if self._tree is not None and evicted:
            self._tree.set(np.arange(first, ring.oldest) % self.spec.capacity, np.zeros(evicted))
        self.evicted += evicted

    def _weight(self, priority: float) -> float:
        assert self.spec.priority_exponent is not None
        return float(priority**self.spec.priority_exponent)

    def sample(self, k: int, batch_size: int) -> Batch:
        """Sample k batches of `batch_size` transitions, with replacement; raise the errors of `sample_indices`."""
        return self._frames.batch(self.sample_indices(k, batch_size))

    def sample_indices(self, k: int, batch_size: int) -> SampleIndices:
        """Sample k batches of `batch_size` transitions, with replacement, with frame indices in place of observations.

        Raises:
            ValueError: the table is empty, or k or batch_size is not positive.
        """
        if k < 1 or batch_size < 1:
            raise ValueError(f"k and batch_size must be positive, got {k} and {batch_size}")
        if not self.size:
            raise ValueError("cannot sample from an empty table")
        ring, shape = self._ring, (k, batch_size)
        if self._tree is None:
            sequence = self._rng.integers(ring.oldest, ring.newest, shape)
            probability = np.full(shape, 1.0 / self.size)
        else:
            total = self._tree.total
            strata = (np.arange(batch_size) + self._rng.random(shape)) * (total / batch_size)
            sequence, probability = self._find_weighted(strata, total)
        return self._read_indices(sequence, probability)

    @property
    def frames_token(self) -> int | None:
        """Token of the frames in shared memory, or None if other processes cannot read them."""
        return None if self._frames.handle is None else self._frames.handle.token

    @property
    def mass(self) -> float:
        """Sum of the sampling weights: of the prioritized weights, or 1 for each transition of a uniform table."""
        return float(self.size) if self._tree is None else self._tree.total

    def sample_at(self, fractions: Array) -> Batch:
        """Return the transitions at fractions of the table's mass; see `sample_indices_at`."""
        return self._frames.batch(self.sample_indices_at(fractions))

    def sample_indices_at(self, fractions: Array) -> SampleIndices:
        """Return the transitions at fractions of the table's mass, with frame indices in place of observations.

        In a uniform table, larger fractions select newer transitions.

        Args:
            fractions: `[n]` float64 in [0, 1). Uniformly distributed fractions select each transition with the same
                probability as `sample`.

        Returns:
            One transition per fraction, `[n, ...]`. The probabilities refer to this table alone.

        Raises:
            ValueError: the table is empty.
        """
        if not self.size:
            raise ValueError("cannot sample from an empty table")
        if self._tree is None:
            # By rounding, the product may reach the size.
            offset = np.minimum((fractions * self.size).astype(np.int64), self.size - 1)
            return self._read_indices(self._ring.oldest + offset, np.full(len(fractions), 1.0 / self.size))
        total = self._tree.total
        return self._read_indices(*self._find_weighted(fractions * total, total))

    def _find_weighted(self, targets: Array, total: float) -> tuple[Array, Array]:
        """Return the transitions at cumulative weights `targets`, and the probability of each transition."""
        assert self._tree is not None
        slots = self._tree.find(targets.ravel()).reshape(targets.shape)
        sequence = self._ring.oldest + (slots - self._ring.oldest) % self.spec.capacity
        return sequence, self._tree.get(slots) / total

    def _read_indices(self, sequence: Array, probability: Array) -> SampleIndices:
        slots = sequence % self.spec.capacity
        self.sample_age = float(self._ring.newest - sequence.mean())
        return SampleIndices(
            row=self._row[slots],
            age=self._age[slots],
            bootstrap_row=self._bootstrap_row[slots],
            bootstrap_age=self._bootstrap_age[slots],
            action=self._action[slots],
            reward=self._reward[slots],
            discount=self._discount[slots],
            ids=sequence | self._tag << _SEQUENCE_BITS,
            probability=probability,
            size=self.size,
            oldest_frame=self._ring.oldest_frame,
            frames=self._frames.handle,
        )

    def update_priorities(self, ids: Array, priorities: Array) -> int:
        """Set new priorities; if an id occurs twice, the last priority wins.

        Args:
            ids: int64 array of any shape, from a batch.
            priorities: array of the same shape, `|TD error| + epsilon`, finite and positive.

        Returns:
            The number of stale ids, which are ignored: their transition was evicted, or they are of another shard or
            incarnation.

        Raises:
            ValueError: the table is uniform, shapes differ, or a priority is not positive and finite.
        """
        if self._tree is None:
            raise ValueError("a uniform table has no priorities to update")
        ids = np.asarray(ids, np.int64).ravel()
        priorities = np.asarray(priorities, np.float64).ravel()
        if ids.shape != priorities.shape:
            raise ValueError(f"ids and priorities must have the same shape, got {ids.shape} and {priorities.shape}")
        if len(priorities) and not (np.isfinite(priorities).all() and priorities.min() > 0.0):
            raise ValueError("priorities must be positive and finite")
        sequence = ids & (1 << _SEQUENCE_BITS) - 1
        live = (ids >> _SEQUENCE_BITS == self._tag) & (sequence >= self._ring.oldest) & (sequence < self._ring.newest)
        if live.any():
            live_priorities = priorities[live]
            self.highest_priority = max(self.highest_priority, float(live_priorities.max()))
            self._tree.set(sequence[live] % self.spec.capacity, live_priorities**self.spec.priority_exponent)
        stale = int(len(ids) - live.sum())
        self.stale_updates += stale
        return stale
