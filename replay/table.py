"""TransitionTable: a preallocated ring of segments, drawn from uniformly or by priority.

Two rings, each addressed by a counter that only grows: frames (every row's frame once) and transitions (one
per start position, pointing at frames). The slot of a counter is its remainder by the ring's size, so a
segment may lie across a ring's end, and "is this item still here?" is one comparison: the counter carries
slot and generation at once. Eviction removes the oldest segment, whole; it searches nothing.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil

from replay.errors import ConfigurationError, NotEnoughMemory
from replay.frames import FrameRing, write_ring
from replay.messages import Batch, SampleIndices
from replay.sum_tree import SumTree
from replay.types import Array, Layout, Segment, Segments, join_segments

_SEQUENCE_BITS = 43
_INCARNATION_BITS = 12
_SHARD_BITS = 8
MOST_SHARDS = 1 << _SHARD_BITS

# Frames that belong to no transition: the row after each episode's end. Vectors have short episodes, and small
# frames; images have long episodes, and this much keeps 64 rows with n <= 5 below 1.15 frames a transition.
# A table whose episodes are shorter still evicts a little early.
_SLACK_SMALL, _SLACK_LARGE = 0.30, 0.0125
_LARGE_FRAME_BYTES = 1024


@dataclass(frozen=True)
class TableSpec:
    """What a `TransitionTable` is made from.

    Attributes:
        layout: shapes and dtypes of what it holds.
        capacity: transitions it holds.
        priority_exponent: alpha of prioritized replay; None draws uniformly.
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
            raise ConfigurationError(f"a replay must hold fewer than 2**31 frames, got {self.frame_capacity:,}")
        alpha = self.priority_exponent
        if alpha is not None and not 0.0 <= alpha <= 1.0:
            raise ConfigurationError(f"the priority exponent must lie in [0, 1], got {alpha}")

    @property
    def frame_capacity(self) -> int:
        """Frames the table has room for."""
        layout = self.layout
        overhead = layout.max_segment_frames / layout.segment_length
        slack = _SLACK_LARGE if layout.frame_bytes >= _LARGE_FRAME_BYTES else _SLACK_SMALL
        return int(self.capacity * (overhead + slack)) + layout.max_segment_frames

    @property
    def expected_bytes(self) -> int:
        """Memory that a full table takes, known before any of it is allocated."""
        layout = self.layout
        action = np.dtype(layout.action_dtype).itemsize * int(np.prod(layout.action_shape, dtype=np.int64))
        per_transition = 4 + 1 + 4 + 1 + action + 4 + 4
        total = self.frame_capacity * layout.frame_bytes + self.capacity * per_transition
        if self.priority_exponent is not None:
            total += SumTree.bytes_for(self.capacity)
        return total

    def shard(self, index: int, shards: int) -> TableSpec:
        """Return the table of one of several shards that divide the capacity evenly."""
        return replace(self, capacity=self.capacity // shards + (index < self.capacity % shards))

    def check_memory(self, available: int | None = None) -> None:
        """Raise `NotEnoughMemory`, with both figures, if the machine lacks the memory for this table.

        Args:
            available: bytes; None asks the machine, within the container's limit where there is one.
        """
        available = available_memory() if available is None else available
        if self.expected_bytes > available:
            raise NotEnoughMemory(
                f"a replay of {self.capacity:,} transitions needs {_gigabytes(self.expected_bytes)}, but "
                f"{_gigabytes(available)} are available here; {self._advice(available)}"
            )

    def _advice(self, available: int) -> str:
        sizes = range(self.layout.segment_length, self.capacity)
        # A tenth is left, so that the next start is not refused for what the machine took meanwhile.
        fit = bisect_right(sizes, 0.9 * available, key=lambda size: replace(self, capacity=size).expected_bytes)
        return f"a replay_size of {sizes[fit - 1]:,} would fit" if fit else "none would fit"


def available_memory(control_group: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes this process may still take: the machine's, or its control group's where that is less."""
    available = int(psutil.virtual_memory().available)
    try:
        ceiling = (control_group / "memory.max").read_text().strip()
        if ceiling != "max":
            used = int((control_group / "memory.current").read_text())
            # Files cached and not in use count as used, but give way.
            rows = (control_group / "memory.stat").read_text().splitlines()
            used -= int(dict(row.split() for row in rows).get("inactive_file", 0))
            available = min(available, int(ceiling) - used)
    except OSError:
        with contextlib.suppress(OSError):  # version 1 of control groups
            ceiling = (control_group / "memory" / "memory.limit_in_bytes").read_text()
            used = int((control_group / "memory" / "memory.usage_in_bytes").read_text())
            available = min(available, int(ceiling) - used)
    return max(available, 0)


def _gigabytes(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB"


@dataclass
class _Ring:
    """Bookkeeping of the segments in order of age: `(transitions, frames)` of each."""

    segments: deque[tuple[int, int]] = field(default_factory=deque)
    oldest: int = 0
    newest: int = 0
    oldest_frame: int = 0
    newest_frame: int = 0


def shards_of(ids: Array) -> Array:
    """Return which shard each id is of."""
    return ids >> _SEQUENCE_BITS + _INCARNATION_BITS


class TransitionTable:
    """Holds segments and answers with batches of transitions; a plain object, one caller at a time.

    Uniform means uniform over the transitions, not over segments. Prioritized draws proportionally to
    `priority ** alpha`, each batch stratified by itself (Schaul et al. 2016, section 3.3 and appendix B.2.1).
    `sample_age` is the mean age of what was drawn last, in transitions inserted since.
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
            spec: what to hold.
            seed: of the sampler.
            shard: which of several tables this is, below 256; part of every id.
            incarnation: how often this table was recreated; ids of an earlier one are stale here.
            shared: whether large frames lie where other processes of this node can read them.

        Raises:
            NotEnoughMemory: the machine lacks `spec.expected_bytes`.
            ConfigurationError: shard or incarnation does not fit an id.
        """
        if not (0 <= shard < MOST_SHARDS and incarnation >= 0):
            raise ConfigurationError(
                f"shard must lie in [0, {MOST_SHARDS}) and incarnation not be negative, got {shard}, {incarnation}"
            )
        spec.check_memory()
        self.spec = spec
        layout, capacity = spec.layout, spec.capacity
        # Small frames travel faster within the answer than a reader would find them.
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
        """Transitions held."""
        return self._ring.newest - self._ring.oldest

    @property
    def bytes(self) -> int:
        """Memory of what is held: frames and transitions written and not yet evicted."""
        ring, row = self._ring, self.spec.expected_bytes - self.spec.frame_capacity * self.spec.layout.frame_bytes
        frames = (ring.newest_frame - ring.oldest_frame) * self.spec.layout.frame_bytes
        return frames + row * self.size // self.spec.capacity

    def insert(self, segments: Sequence[Segment]) -> None:
        """Add segments, all or none, evicting the oldest ones as far as needed.

        Raises:
            LayoutMismatch: a segment does not fit the layout; the table is unchanged.
        """
        self._insert(join_segments(segments, self.spec.layout))

    def _insert(self, segments: Segments) -> None:
        """Add segments that fit."""
        if not segments:
            return
        ring, frame_capacity = self._ring, self.spec.frame_capacity
        steps, frames = segments.steps, len(segments.frames)
        if len(segments) > 1 and (steps > self.spec.capacity or frames > frame_capacity):
            middle = len(segments) // 2  # the second half evicts some of the first
            self._insert(segments[:middle])
            self._insert(segments[middle:])
            return
        self._make_room(steps, frames)
        at, counts = ring.newest, segments.frame_counts
        first_frame = np.repeat(ring.newest_frame + np.cumsum(counts) - counts, segments.step_counts)
        self._frames.write(ring.newest_frame, segments.frames)
        ring.newest_frame += frames
        write_ring(self._row, at, (first_frame + segments.row) % frame_capacity)
        write_ring(self._bootstrap_row, at, (first_frame + segments.bootstrap_row) % frame_capacity)
        write_ring(self._age, at, segments.age)
        write_ring(self._bootstrap_age, at, segments.bootstrap_age)
        write_ring(self._action, at, segments.action)
        write_ring(self._reward, at, segments.reward)
        write_ring(self._discount, at, segments.discount)
        if self._tree is not None:
            slots = np.arange(at, at + steps) % self.spec.capacity
            self._tree.set(slots, np.full(steps, self._weight(self.highest_priority)))
        ring.segments.extend(zip(segments.step_counts.tolist(), counts.tolist(), strict=True))
        ring.newest += steps

    def _make_room(self, steps: int, frames: int) -> None:
        """Evict the oldest segments until so many steps and frames fit."""
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
        """SampleIndices k batches of `batch_size` transitions, with replacement; raises as `sample_indices` does."""
        return self._frames.batch(self.sample_indices(k, batch_size))

    def sample_indices(self, k: int, batch_size: int) -> SampleIndices:
        """SampleIndices k batches of `batch_size` transitions, with replacement, and leave their frames where they lie.

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
            sequence, probability = self._weighted(strata, total)
        return self._drawn(sequence, probability)

    @property
    def frames_token(self) -> int | None:
        """Token of the frames where other processes of this node can read them, else None."""
        return None if self._frames.handle is None else self._frames.handle.token

    @property
    def mass(self) -> float:
        """What draws are in proportion to, summed up: the weights, or one for each transition."""
        return float(self.size) if self._tree is None else self._tree.total

    def sample_at(self, fractions: Array) -> Batch:
        """Return the transitions at places of the whole mass; see `sample_indices_at`."""
        return self._frames.batch(self.sample_indices_at(fractions))

    def sample_indices_at(self, fractions: Array) -> SampleIndices:
        """Return the transitions at places of the whole mass, oldest first where the table is uniform.

        Args:
            fractions: `[n]` float64 in [0, 1); evenly spread ones draw as `sample` does.

        Returns:
            One row a place, `[n, ...]`; the probabilities are those within this table.

        Raises:
            ValueError: the table is empty.
        """
        if not self.size:
            raise ValueError("cannot draw from an empty table")
        if self._tree is None:
            # Rounding may leave a place at the very end.
            offset = np.minimum((fractions * self.size).astype(np.int64), self.size - 1)
            return self._drawn(self._ring.oldest + offset, np.full(len(fractions), 1.0 / self.size))
        total = self._tree.total
        return self._drawn(*self._weighted(fractions * total, total))

    def _weighted(self, targets: Array, total: float) -> tuple[Array, Array]:
        """Return the transitions at running sums of weights, and with which probability each is drawn."""
        assert self._tree is not None
        slots = self._tree.find(targets.ravel()).reshape(targets.shape)
        sequence = self._ring.oldest + (slots - self._ring.oldest) % self.spec.capacity
        return sequence, self._tree.get(slots) / total

    def _drawn(self, sequence: Array, probability: Array) -> SampleIndices:
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
        """Set new priorities; of an id named twice the last one wins.

        Args:
            ids: any shape, int64, from a batch.
            priorities: same shape, `|TD error| + epsilon`, finite and positive.

        Returns:
            How many ids were stale: evicted since, or of another shard or incarnation. They are ignored.

        Raises:
            ValueError: the table is uniform, shapes differ, or a priority is not positive and finite.
        """
        if self._tree is None:
            raise ValueError("a uniform table has no priorities to update")
        ids = np.asarray(ids, np.int64).ravel()
        priorities = np.asarray(priorities, np.float64).ravel()
        if ids.shape != priorities.shape:
            raise ValueError(f"ids and priorities must have one shape, got {ids.shape} and {priorities.shape}")
        if len(priorities) and not (np.isfinite(priorities).all() and priorities.min() > 0.0):
            raise ValueError("priorities must be positive and finite")
        sequence = ids & (1 << _SEQUENCE_BITS) - 1
        live = (ids >> _SEQUENCE_BITS == self._tag) & (sequence >= self._ring.oldest) & (sequence < self._ring.newest)
        if live.any():
            kept = priorities[live]
            self.highest_priority = max(self.highest_priority, float(kept.max()))
            self._tree.set(sequence[live] % self.spec.capacity, kept**self.spec.priority_exponent)
        stale = int(len(ids) - live.sum())
        self.stale_updates += stale
        return stale
