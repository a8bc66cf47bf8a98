"""What crosses processes: frozen dataclasses with their shapes, dtypes and units, and the error classes.

One convention of time, everywhere: in `observation` the agent took `action`; then came `reward` and
`next_observation`. `discount` is gamma if the episode goes on or was truncated, 0 if it terminated; over n
steps it is the product. Bootstrapping stops at termination only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from replay.errors import ConfigurationError, LayoutMismatch

Array = NDArray[Any]


@dataclass(frozen=True)
class Layout:
    """Shapes and dtypes of one environment lane's experience.

    Attributes:
        frame_shape: shape of one stored frame. Without stacking the frame is the whole observation.
        frame_dtype: NumPy name of the frame's dtype, such as `"uint8"`.
        stack: number of frames in an observation. 1 means "not stacked": the observation is `[*frame_shape]`;
            more means `[stack, *frame_shape]`, oldest first, zero frames before the episode's first.
        action_shape: shape of one action, `()` for a discrete one.
        action_dtype: NumPy name of the action's dtype.
        segment_length: rows in a full segment.
        n_steps: steps summed into each stored reward.
    """

    frame_shape: tuple[int, ...]
    frame_dtype: str
    stack: int
    action_shape: tuple[int, ...]
    action_dtype: str
    segment_length: int
    n_steps: int

    def __post_init__(self) -> None:
        for name in ("stack", "segment_length", "n_steps"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.stack > 256:
            raise ConfigurationError(f"stack must be at most 256 frames, got {self.stack}")

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """Shape of one observation as a network sees it."""
        return self.frame_shape if self.stack == 1 else (self.stack, *self.frame_shape)

    @property
    def frame_bytes(self) -> int:
        """Bytes of one stored frame."""
        return math.prod(self.frame_shape) * np.dtype(self.frame_dtype).itemsize

    @property
    def max_segment_frames(self) -> int:
        """Frames in a full segment: the stack's predecessors, its rows, and the n-step tail."""
        return self.stack - 1 + self.segment_length + self.n_steps


@dataclass(frozen=True)
class StepArrays:
    """The arrays that one segment consists of, and several end to end; `Segment` says what they are."""

    frames: Array
    row: Array
    age: Array
    bootstrap_row: Array
    bootstrap_age: Array
    action: Array
    reward: Array
    discount: Array

    @property
    def steps(self) -> int:
        """Environment steps in here: each is a start of exactly one segment."""
        return len(self.row)

    @property
    def bytes(self) -> int:
        """Memory of its arrays."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))


@dataclass(frozen=True)
class Segment(StepArrays):
    """A contiguous run of rows of one environment lane, self-contained and immutable once made.

    Every row's observation is here once; S start positions point at the rows they start and bootstrap from.
    A row that ended an episode is in `frames` (its predecessor bootstraps from it) but is no start.

    Attributes:
        frames: `[F, *frame_shape]`, oldest first.
        row: `[S]` int32, index into `frames` of the start's newest frame.
        age: `[S]` uint8, frames since the reset at that row, at most `stack - 1`: how many predecessors are real.
        bootstrap_row: `[S]` int32, index into `frames` of the row to bootstrap from.
        bootstrap_age: `[S]` uint8, as `age`, for that row.
        action: `[S, *action_shape]`.
        reward: `[S]` float32, the discounted sum of up to n rewards.
        discount: `[S]` float32, the product of up to n discounts.
    """

    def check(self, layout: Layout) -> None:
        """Raise `LayoutMismatch`, naming both sides, unless this segment fits `layout`."""
        join_segments((self,), layout)


@dataclass(frozen=True, eq=False)
class Segments(StepArrays, Sequence[Segment]):
    """N segments end to end, one array a field: a push has many short ones, and each array costs calls on its way.

    As a sequence it gives `Segment`s, whose arrays are views of these. Every one of them has steps. Rows are counted
    from each segment's own first frame.

    Attributes:
        frame_counts: `[N]` int64, F of each segment.
        step_counts: `[N]` int64, S of each segment.
    """

    frame_counts: Array
    step_counts: Array

    def __len__(self) -> int:
        """Return N."""
        return len(self.step_counts)

    @overload
    def __getitem__(self, index: int) -> Segment: ...
    @overload
    def __getitem__(self, index: slice) -> Segments: ...
    def __getitem__(self, index: int | slice) -> Segment | Segments:
        """Return a segment, or neighbouring ones; a slice has no stride."""
        chosen = range(len(self))[index]
        first, last = (chosen, chosen + 1) if isinstance(chosen, int) else (chosen.start, chosen.stop)
        steps, frames = (
            slice(int(counts[:first].sum()), int(counts[:last].sum()))
            for counts in (self.step_counts, self.frame_counts)
        )
        arrays: dict[str, Array] = {name: getattr(self, name)[steps] for name in _PER_STEP}
        arrays["frames"] = self.frames[frames]
        if isinstance(chosen, int):
            return Segment(**arrays)
        if chosen.step != 1:
            raise ValueError(f"segments are taken one after the other, got a stride of {chosen.step}")
        return Segments(**arrays, frame_counts=self.frame_counts[index], step_counts=self.step_counts[index])


_COUNT = np.dtype(np.int64)
_PER_STEP = tuple(field.name for field in fields(StepArrays))[1:]


def join_segments(segments: Sequence[Segment], layout: Layout) -> Segments:
    """Return segments end to end, those that have steps, once they are found to fit.

    Raises:
        LayoutMismatch: a segment does not fit `layout`; the text names both sides.
    """
    wanted = _shapes_and_dtypes(layout)
    joined = segments if isinstance(segments, Segments) else _joined(segments, wanted)
    steps, frames = joined.step_counts, joined.frame_counts
    for name in ("step_counts", "frame_counts"):
        _expect(name, getattr(joined, name), (len(joined),), _COUNT)
    for name, (shape, dtype) in wanted.items():
        rows = frames.sum() if name == "frames" else steps.sum()
        _expect(name, getattr(joined, name), (int(rows), *shape), dtype)
    if not len(joined):
        return joined
    if steps.max() > layout.segment_length:
        raise LayoutMismatch(f"a segment holds at most {layout.segment_length} steps, got {steps.max()}")
    if steps.min() < 1:
        raise LayoutMismatch(f"a segment among others holds at least one step, got {steps.min()}")
    if frames.max() > layout.max_segment_frames:
        raise LayoutMismatch(f"a segment holds at most {layout.max_segment_frames} frames, got {frames.max()}")
    ends = np.repeat(frames, steps)
    for prefix in ("", "bootstrap_"):
        rows, ages = getattr(joined, prefix + "row"), getattr(joined, prefix + "age")
        for wrong in np.flatnonzero((rows < 0) | (rows >= ends))[:1]:
            raise LayoutMismatch(f"{prefix}row must lie in [0, {ends[wrong]}), got {rows[wrong]}")
        if ages.max() > layout.stack - 1:
            raise LayoutMismatch(f"{prefix}age must be at most {layout.stack - 1}, got {ages.max()}")
        if (ages > rows).any():
            raise LayoutMismatch(f"{prefix}age points before the segment's first frame")
    return joined


def _shapes_and_dtypes(layout: Layout) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    row, age, single = ((), np.dtype(np.int32)), ((), np.dtype(np.uint8)), ((), np.dtype(np.float32))
    return {
        "frames": (layout.frame_shape, np.dtype(layout.frame_dtype)),
        "row": row,
        "age": age,
        "bootstrap_row": row,
        "bootstrap_age": age,
        "action": (layout.action_shape, np.dtype(layout.action_dtype)),
        "reward": single,
        "discount": single,
    }


def _joined(segments: Sequence[Segment], wanted: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> Segments:
    """Join segments, each of which is looked at before: joined, what does not fit might no longer show."""
    for segment in segments:
        for name, (shape, dtype) in wanted.items():
            array = getattr(segment, name)
            rows = len(array) if name == "frames" else segment.steps
            if array.dtype != dtype or array.shape != (rows, *shape):
                _expect(name, array, (rows, *shape), dtype)
    held = [segment for segment in segments if segment.steps]
    arrays = {}
    for name, (shape, dtype) in wanted.items():
        parts = [getattr(segment, name) for segment in held]
        arrays[name] = parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty((0, *shape), dtype)])
    return Segments(
        **arrays,
        frame_counts=np.array([len(segment.frames) for segment in held], np.int64),
        step_counts=np.array([segment.steps for segment in held], np.int64),
    )


@dataclass(frozen=True)
class Trajectory:
    """T consecutive rows of one lane for on-policy learning, all under one version of the weights.

    Attributes:
        observation: `[T + 1, *observation_shape]`; the last is for bootstrapping.
        action: `[T, *action_shape]`.
        reward: `[T]` float32.
        discount: `[T]` float32, gamma, or 0 where the step terminated.
        valid: `[T]` bool. False marks a row that is no step: the one after an episode's end, whose action
            was ignored. A step whose successor is invalid bootstraps from the successor's observation,
            weighted by its own discount; nothing flows further back.
        log_probability: `[T]` float32, of `action` under the behaviour policy.
        version: version of the weights that chose every action.
        episodic: True if this is one whole episode.
    """

    observation: Array
    action: Array
    reward: Array
    discount: Array
    valid: Array
    log_probability: Array
    version: int
    episodic: bool = False

    @property
    def steps(self) -> int:
        """Environment steps in here."""
        return int(self.valid.sum())

    @property
    def bytes(self) -> int:
        """Memory of its arrays."""
        return self.observation.nbytes + self.action.nbytes + 4 * self.reward.nbytes

    def check(self, layout: Layout) -> None:
        """Raise `LayoutMismatch`, naming both sides, unless this trajectory fits `layout`."""
        rows = len(self.action)
        _expect("observation", self.observation, (rows + 1, *layout.observation_shape), layout.frame_dtype)
        _expect("action", self.action, (rows, *layout.action_shape), layout.action_dtype)
        _expect("valid", self.valid, (rows,), "bool")
        for name in ("reward", "discount", "log_probability"):
            _expect(name, getattr(self, name), (rows,), "float32")


def _expect(name: str, array: Array, shape: tuple[int, ...], dtype: str | np.dtype[Any]) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise LayoutMismatch(f"{name} must have shape {shape} and dtype {dtype}, got {array.shape} and {array.dtype}")


@dataclass(frozen=True)
class EpisodeResult:
    """One finished episode: its true, unclipped, undiscounted return and its length in steps."""

    episode_return: float
    length: int


@dataclass(frozen=True)
class Moments:
    """How many numbers were seen, their mean, and the sum of squared deviations from it."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, numbers: Array) -> Moments:
        """Return the moments of an array; of an empty one there are none."""
        if not numbers.size:
            return cls()
        return cls(numbers.size, float(numbers.mean()), float(numbers.var() * numbers.size))

    def merged(self, other: Moments) -> Moments:
        """Return the moments of both (Chan et al. 1979, parallel variance)."""
        count = self.count + other.count
        if not count:
            return self
        delta = other.mean - self.mean
        squares = self.squares + other.squares + delta * delta * self.count * other.count / count
        return Moments(count, self.mean + delta * other.count / count, squares)

    @property
    def std(self) -> float:
        """Standard deviation; 0 while nothing was seen."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0


NO_MOMENTS = Moments()
