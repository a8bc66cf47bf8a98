"""Experience types: frozen dataclasses for segments, trajectories, and episode results, with shapes, dtypes, and units.

All modules share one time convention: the agent takes `action` in `observation`; the environment then returns `reward`
and `next_observation`. `discount` is gamma if the episode continues or was truncated, and 0 if the episode terminated;
over n steps it is the product of the discounts. Bootstrapping stops only at termination.

A row is one time step of an environment lane: one observation, and the action taken in it. An episode of T steps has
T + 1 rows; the last row shows the final observation and is not a step.
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
    """Shapes and dtypes of the experience of one environment lane.

    Attributes:
        frame_shape: shape of one stored frame. Without frame stacking, a frame is a whole observation.
        frame_dtype: NumPy name of the frame's dtype, such as `"uint8"`.
        stack: frames in an observation. With 1, frames are not stacked and an observation is `[*frame_shape]`. With
            more, an observation is `[stack, *frame_shape]`, oldest frame first, with zero frames before the episode's
            first frame.
        action_shape: shape of one action, `()` for a discrete action.
        action_dtype: NumPy name of the action's dtype.
        segment_length: rows in a full segment.
        n_steps: maximum number of rewards summed into each stored reward.
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
        """Shape of one observation, as a network receives it."""
        return self.frame_shape if self.stack == 1 else (self.stack, *self.frame_shape)

    @property
    def frame_bytes(self) -> int:
        """Size of one stored frame in bytes."""
        return math.prod(self.frame_shape) * np.dtype(self.frame_dtype).itemsize

    @property
    def max_segment_frames(self) -> int:
        """Frames in a full segment: `stack - 1` predecessors, the segment's rows, and the n-step tail."""
        return self.stack - 1 + self.segment_length + self.n_steps


@dataclass(frozen=True)
class StepArrays:
    """The arrays of one segment, or of several concatenated segments; see `Segment` for shapes and dtypes."""

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
        """Number of environment steps; each step is a start position of exactly one segment."""
        return len(self.row)

    @property
    def bytes(self) -> int:
        """Total size of the arrays in bytes."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))


@dataclass(frozen=True)
class Segment(StepArrays):
    """A contiguous sequence of rows of one environment lane, self-contained and immutable.

    The segment stores the frame of each row once. Each of its S start positions is one transition: the start position
    points to the row where the transition starts and to the row that it bootstraps from. `frames` includes the last row
    of an episode, because earlier rows bootstrap from it, but that row is not a start position.

    Attributes:
        frames: `[F, *frame_shape]`, oldest first.
        row: `[S]` int32, index into `frames` of the start position's newest frame.
        age: `[S]` uint8, number of frames since the reset at that row, at most `stack - 1`. Of the frames before the
            row, only the newest `age` belong to its observation's stack.
        bootstrap_row: `[S]` int32, index into `frames` of the row to bootstrap from.
        bootstrap_age: `[S]` uint8, same as `age`, for `bootstrap_row`.
        action: `[S, *action_shape]`.
        reward: `[S]` float32, the discounted sum of up to n rewards.
        discount: `[S]` float32, the product of up to n discounts.
    """

    def check(self, layout: Layout) -> None:
        """Raise `LayoutMismatch`, with the expected and actual values, unless this segment fits `layout`."""
        join_segments((self,), layout)


@dataclass(frozen=True, eq=False)
class Segments(StepArrays, Sequence[Segment]):
    """N concatenated segments, with one array per field.

    A push contains many short segments, and each array costs function calls wherever it is checked, sent, and stored.
    Concatenation keeps the number of arrays constant. The object is a sequence of `Segment`s whose arrays are views of
    these arrays. Each segment has at least one step. `row` and `bootstrap_row` count from the first frame of their own
    segment.

    Attributes:
        frame_counts: `[N]` int64, number of frames F of each segment.
        step_counts: `[N]` int64, number of steps S of each segment.
    """

    frame_counts: Array
    step_counts: Array

    def __len__(self) -> int:
        """Return the number of segments N."""
        return len(self.step_counts)

    @overload
    def __getitem__(self, index: int) -> Segment: ...
    @overload
    def __getitem__(self, index: slice) -> Segments: ...
    def __getitem__(self, index: int | slice) -> Segment | Segments:
        """Return one segment for an index, or consecutive segments for a slice of stride 1."""
        selected = range(len(self))[index]
        first, last = (selected, selected + 1) if isinstance(selected, int) else (selected.start, selected.stop)
        steps, frames = (
            slice(int(counts[:first].sum()), int(counts[:last].sum()))
            for counts in (self.step_counts, self.frame_counts)
        )
        arrays: dict[str, Array] = {name: getattr(self, name)[steps] for name in _PER_STEP}
        arrays["frames"] = self.frames[frames]
        if isinstance(selected, int):
            return Segment(**arrays)
        if selected.step != 1:
            raise ValueError(f"a slice of segments must have a stride of 1, got a stride of {selected.step}")
        return Segments(**arrays, frame_counts=self.frame_counts[index], step_counts=self.step_counts[index])


_COUNT = np.dtype(np.int64)
_PER_STEP = tuple(field.name for field in fields(StepArrays))[1:]


def join_segments(segments: Sequence[Segment], layout: Layout) -> Segments:
    """Check segments against a layout and return them concatenated, without the segments that have no steps.

    Raises:
        LayoutMismatch: a segment does not fit `layout`; the message states the expected and actual values.
    """
    expected = _shapes_and_dtypes(layout)
    joined = segments if isinstance(segments, Segments) else _concatenate(segments, expected)
    steps, frames = joined.step_counts, joined.frame_counts
    for name in ("step_counts", "frame_counts"):
        _expect(name, getattr(joined, name), (len(joined),), _COUNT)
    for name, (shape, dtype) in expected.items():
        length = frames.sum() if name == "frames" else steps.sum()
        _expect(name, getattr(joined, name), (int(length), *shape), dtype)
    if not len(joined):
        return joined
    if steps.max() > layout.segment_length:
        raise LayoutMismatch(f"a segment must have at most {layout.segment_length} steps, got {steps.max()}")
    if steps.min() < 1:
        raise LayoutMismatch(f"each segment must have at least one step, got {steps.min()}")
    if frames.max() > layout.max_segment_frames:
        raise LayoutMismatch(f"a segment must have at most {layout.max_segment_frames} frames, got {frames.max()}")
    limits = np.repeat(frames, steps)
    for prefix in ("", "bootstrap_"):
        rows, ages = getattr(joined, prefix + "row"), getattr(joined, prefix + "age")
        for wrong in np.flatnonzero((rows < 0) | (rows >= limits))[:1]:
            raise LayoutMismatch(f"{prefix}row must lie in [0, {limits[wrong]}), got {rows[wrong]}")
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


def _concatenate(
    segments: Sequence[Segment], expected: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
) -> Segments:
    """Concatenate segments; check the shapes and dtypes of each first, since concatenation can hide a mismatch."""
    for segment in segments:
        for name, (shape, dtype) in expected.items():
            array = getattr(segment, name)
            length = len(array) if name == "frames" else segment.steps
            if array.dtype != dtype or array.shape != (length, *shape):
                _expect(name, array, (length, *shape), dtype)
    nonempty = [segment for segment in segments if segment.steps]
    arrays = {}
    for name, (shape, dtype) in expected.items():
        parts = [getattr(segment, name) for segment in nonempty]
        arrays[name] = parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty((0, *shape), dtype)])
    return Segments(
        **arrays,
        frame_counts=np.array([len(segment.frames) for segment in nonempty], np.int64),
        step_counts=np.array([segment.steps for segment in nonempty], np.int64),
    )


@dataclass(frozen=True)
class Trajectory:
    """T consecutive rows of one lane for on-policy learning, all from one version of the weights.

    Attributes:
        observation: `[T + 1, *observation_shape]`; the last observation serves only for bootstrapping.
        action: `[T, *action_shape]`.
        reward: `[T]` float32.
        discount: `[T]` float32: gamma, or 0 where the episode terminated.
        valid: `[T]` bool. False marks a row that is not a step: the last row of an episode, whose action the
            environment ignored. A step before an invalid row bootstraps from that row's observation, weighted by the
            step's own discount. No return or advantage propagates across an invalid row.
        log_probability: `[T]` float32, log-probability of `action` under the behavior policy.
        version: version of the weights that selected all actions.
        episodic: whether the trajectory is one whole episode.
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
        """Number of environment steps, which are the valid rows."""
        return int(self.valid.sum())

    @property
    def bytes(self) -> int:
        """Approximate size of the arrays in bytes."""
        return self.observation.nbytes + self.action.nbytes + 4 * self.reward.nbytes

    def check(self, layout: Layout) -> None:
        """Raise `LayoutMismatch`, with the expected and actual values, unless this trajectory fits `layout`."""
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
    """One finished episode: its unclipped, undiscounted return, and its length in environment steps."""

    episode_return: float
    length: int


@dataclass(frozen=True)
class Moments:
    """Running moments of a sample: the count, the mean, and the sum of squared deviations from the mean."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, numbers: Array) -> Moments:
        """Return the moments of an array; an empty array has a count of 0."""
        if not numbers.size:
            return cls()
        return cls(numbers.size, float(numbers.mean()), float(numbers.var() * numbers.size))

    def merged(self, other: Moments) -> Moments:
        """Return the moments of both samples combined (Chan et al. 1979, parallel variance)."""
        count = self.count + other.count
        if not count:
            return self
        delta = other.mean - self.mean
        squares = self.squares + other.squares + delta * delta * self.count * other.count / count
        return Moments(count, self.mean + delta * other.count / count, squares)

    @property
    def std(self) -> float:
        """Standard deviation; 0 for an empty sample."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0


NO_MOMENTS = Moments()
