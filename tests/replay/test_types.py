"""Layouts, and the checks that reject experience that does not fit a layout."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.errors import ConfigurationError, DeadlineExceeded, LayoutMismatch, NotEnoughMemory, SquallError
from replay.messages import Permit, Push
from replay.types import Array, EpisodeResult, Layout, Moments, Segment, Segments, Trajectory, join_segments
from tests.replay.naive import Lane, assert_same_bits, make_segment

ATARI = Layout((84, 84), "uint8", 4, (), "int64", 64, 3)
VECTOR = Layout((3,), "float32", 1, (2,), "float32", 8, 3)
STACKED = Layout((2, 2), "uint8", 4, (), "int64", 8, 3)


def test_a_layout_knows_its_shapes_and_sizes() -> None:
    assert ATARI.observation_shape == (4, 84, 84)
    assert ATARI.frame_bytes == 7056
    assert ATARI.max_segment_frames == 3 + 64 + 3
    assert VECTOR.observation_shape == (3,)
    assert VECTOR.frame_bytes == 12
    assert VECTOR.max_segment_frames == 8 + 3
    assert Layout((), "float64", 1, (), "int64", 1, 1).frame_bytes == 8


@pytest.mark.parametrize("name", ["stack", "segment_length", "n_steps"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_layout_names_the_count_that_is_not_positive(name: str, value: int) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} must be at least 1, got {value}"):
        replace(ATARI, **{name: value})


def test_a_layout_refuses_more_frames_than_an_age_can_count() -> None:
    assert replace(ATARI, stack=256).stack == 256
    with pytest.raises(ConfigurationError, match="at most 256 frames, got 257"):
        replace(ATARI, stack=257)


@pytest.mark.parametrize("layout", [VECTOR, STACKED, replace(STACKED, n_steps=1)])
def test_every_segment_of_a_lane_fits_its_layout(layout: Layout) -> None:
    lane = Lane(layout, np.random.default_rng(0), 0.2)
    for i in range(100):
        segment, _ = lane.cut(1 + i % layout.segment_length, flush=i % 5 == 0)
        segment.check(layout)


@pytest.mark.parametrize("layout", [VECTOR, STACKED])
def test_the_largest_and_the_smallest_segment_fit(layout: Layout) -> None:
    largest = make_segment(layout, layout.segment_length)
    assert len(largest.frames) == layout.max_segment_frames
    largest.check(layout)
    make_segment(layout, 0).check(layout)
    assert make_segment(layout, 0).steps == 0


def changed(segment: Segment, name: str, change: Any) -> Segment:
    return replace(segment, **{name: change(getattr(segment, name))})


def entry(index: int, value: int) -> Any:
    def set_entry(values: Any) -> Any:
        values = values.copy()
        values[index] = value
        return values

    return set_entry


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("frames", lambda x: x.astype(np.float32), r"frames must have shape \(14, 2, 2\) and dtype uint8, got"),
        ("frames", lambda x: x[:, :1], r"frames must have shape \(14, 2, 2\).*got \(14, 1, 2\)"),
        ("frames", lambda x: np.concatenate([x, x[:1]]), "at most 14 frames, got 15"),
        ("frames", lambda x: x[:-1], r"bootstrap_row must lie in \[0, 13\), got 13"),
        ("frames", lambda x: x[:0], r"row must lie in \[0, 0\)"),
        ("action", lambda x: x[:-1], r"action must have shape \(8,\) and dtype int64, got \(7,\)"),
        ("action", lambda x: x.astype(np.int32), "action must have .* int64, got .* int32"),
        ("action", lambda x: x[:, None], r"action must have shape \(8,\).*got \(8, 1\)"),
        ("reward", lambda x: x.astype(np.float64), "reward must have .* float32, got .* float64"),
        ("reward", lambda x: x[1:], r"reward must have shape \(8,\).*got \(7,\)"),
        ("discount", lambda x: x.astype(np.float16), "discount must have .* float32, got .* float16"),
        ("discount", lambda x: x[1:], r"discount must have shape \(8,\).*got \(7,\)"),
        ("row", lambda x: x.astype(np.int64), "row must have .* int32, got .* int64"),
        ("row", entry(0, -1), r"row must lie in \[0, 14\), got -1"),
        ("row", entry(3, 14), r"row must lie in \[0, 14\), got 14"),
        ("bootstrap_row", lambda x: x[1:], r"bootstrap_row must have shape \(8,\).*got \(7,\)"),
        ("bootstrap_row", entry(7, 14), r"bootstrap_row must lie in \[0, 14\), got 14"),
        ("age", lambda x: x.astype(np.int64), "age must have .* uint8, got .* int64"),
        ("age", lambda x: x[1:], r"age must have shape \(8,\).*got \(7,\)"),
        ("age", entry(2, 4), "age must be at most 3, got 4"),
        ("row", entry(0, 2), "age points before the segment's first frame"),
        ("bootstrap_age", entry(2, 4), "bootstrap_age must be at most 3, got 4"),
        ("bootstrap_row", entry(0, 2), "bootstrap_age points before the segment's first frame"),
    ],
)
def test_a_segment_that_does_not_fit_is_named(name: str, change: Any, message: str) -> None:
    with pytest.raises(LayoutMismatch, match=message):
        changed(make_segment(STACKED, 8), name, change).check(STACKED)


def test_a_segment_of_more_steps_than_rows_is_turned_away() -> None:
    segment = make_segment(VECTOR, 8)
    doubled = {name: np.concatenate([x, x]) for name, x in vars(segment).items() if name != "frames"}
    with pytest.raises(LayoutMismatch, match="at most 8 steps, got 16"):
        replace(segment, **doubled).check(VECTOR)


def test_without_a_stack_every_age_is_zero() -> None:
    with pytest.raises(LayoutMismatch, match="age must be at most 0, got 1"):
        changed(make_segment(VECTOR, 8), "age", entry(2, 1)).check(VECTOR)


def trajectory(layout: Layout, rows: int) -> Trajectory:
    return Trajectory(
        observation=np.zeros((rows + 1, *layout.observation_shape), layout.frame_dtype),
        action=np.zeros((rows, *layout.action_shape), layout.action_dtype),
        reward=np.zeros(rows, np.float32),
        discount=np.zeros(rows, np.float32),
        valid=np.ones(rows, np.bool_),
        log_probability=np.zeros(rows, np.float32),
        version=3,
    )


@pytest.mark.parametrize("layout", [VECTOR, STACKED])
@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_a_trajectory_of_any_length_fits(layout: Layout, rows: int) -> None:
    trajectory(layout, rows).check(layout)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("observation", lambda x: x[:-1], r"observation must have shape \(6, 4, 2, 2\).*got \(5, 4, 2, 2\)"),
        ("observation", lambda x: x[:, 0], r"observation must have shape \(6, 4, 2, 2\).*got \(6, 2, 2\)"),
        ("observation", lambda x: x.astype(np.float32), "observation must have .* uint8, got .* float32"),
        ("action", lambda x: x.astype(np.int32), "action must have .* int64, got .* int32"),
        ("action", lambda x: x[:, None], r"action must have shape \(5,\).*got \(5, 1\)"),
        ("valid", lambda x: x.astype(np.uint8), "valid must have .* bool, got .* uint8"),
        ("valid", lambda x: x[1:], r"valid must have shape \(5,\).*got \(4,\)"),
        ("reward", lambda x: x.astype(np.float64), "reward must have .* float32, got .* float64"),
        ("discount", lambda x: x[1:], r"discount must have shape \(5,\).*got \(4,\)"),
        ("log_probability", lambda x: x.astype(np.float64), "log_probability must have .* float32"),
    ],
)
def test_a_trajectory_that_does_not_fit_is_named(name: str, change: Any, message: str) -> None:
    good = trajectory(STACKED, 5)
    with pytest.raises(LayoutMismatch, match=message):
        replace(good, **{name: change(getattr(good, name))}).check(STACKED)


def test_a_trajectory_knows_its_memory() -> None:
    assert trajectory(VECTOR, 4).bytes == 4 * (5 * 3 + 4 * 2 + 4 * 4)
    assert trajectory(STACKED, 4).bytes == 5 * 4 * 2 * 2 + 4 * 8 + 4 * 4 * 4


def test_only_valid_rows_are_steps() -> None:
    assert replace(trajectory(VECTOR, 4), valid=np.array([True, False, True, True])).steps == 3


def test_a_push_counts_the_steps_in_it() -> None:
    segments = tuple(make_segment(VECTOR, steps) for steps in (8, 1, 0, 3))
    assert Push(0, 0, 0, segments, episodes=(EpisodeResult(1.0, 9),)).steps == 12
    half_valid = replace(trajectory(VECTOR, 4), valid=np.array([True, True, False, False]))
    assert Push(0, 0, 0, trajectories=((Permit(0, 0, 3), half_valid),)).steps == 2
    assert Push(0, 0, 0).steps == 0


def assert_same_segment(one: Segment, other: Segment) -> None:
    for field in fields(Segment):
        assert_same_bits(getattr(one, field.name), getattr(other, field.name))


def several(layout: Layout) -> tuple[list[Segment], Segments]:
    """Return segments of a lane, and the same segments concatenated."""
    lane = Lane(layout, np.random.default_rng(0), 0.2)
    segments = [lane.cut(length, flush=length == 5)[0] for length in (8, 1, 8, 5, 3, 8)]
    return segments, join_segments([make_segment(layout, 0), *segments], layout)


@pytest.mark.parametrize("layout", [VECTOR, STACKED])
def test_segments_end_to_end_are_the_segments_that_have_steps(layout: Layout) -> None:
    segments, joined = several(layout)
    expected = [segment for segment in segments if segment.steps]
    assert len(joined) == len(expected) > 4
    assert joined.steps == sum(segment.steps for segment in expected)
    assert joined.bytes == sum(segment.bytes for segment in expected) + 2 * 8 * len(joined)
    assert join_segments(joined, layout) is joined
    for whole in (joined, pickle.loads(pickle.dumps(joined)), join_segments(list(joined), layout)):
        for one, other in zip(whole, expected, strict=True):
            assert_same_segment(one, other)
    assert_same_segment(joined[-1], expected[-1])
    part = joined[1:3]
    assert part.steps == expected[1].steps + expected[2].steps
    for one, other in zip(part, expected[1:3], strict=True):
        assert_same_segment(one, other)
    assert not joined[2:2]
    assert Push(0, 0, 0, joined).steps == Push(0, 0, 0, tuple(expected)).steps == joined.steps
    assert Push(0, 0, 0, joined).bytes == joined.bytes
    with pytest.raises(IndexError):
        joined[len(joined)]
    with pytest.raises(ValueError, match="got a stride of 2"):
        joined[::2]


def counts(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"frames": s.frames[:-1]}, "frames must have shape"),
        (lambda s: {"frames": s.frames.astype(np.float64)}, "frames must have shape"),
        (lambda s: {"action": s.action[1:]}, "action must have shape"),
        (lambda s: {"reward": s.reward.astype(np.float64)}, "reward must have shape"),
        (lambda s: {"row": s.row - 3 - 1}, r"^row must lie in \[0, 14\), got -1"),
        (lambda s: {"bootstrap_row": s.bootstrap_row + 1}, r"bootstrap_row must lie in \[0, 14\), got 14"),
        (lambda s: {"age": s.age + np.uint8(1)}, "^age must be at most 3, got 4"),
        (lambda s: {"row": np.where(s.row == 3, 2, s.row).astype(np.int32)}, "^age points before"),
        (lambda s: {"step_counts": counts(8, 8, 7)}, "row must have shape"),
        (lambda s: {"step_counts": counts(9, 7, 8)}, "at most 8 steps, got 9"),
        (lambda s: {"frame_counts": counts(15, 13, 14)}, "at most 14 frames, got 15"),
        (lambda s: {"frame_counts": counts(14, 28)}, "frame_counts must have shape"),
        (lambda s: {"step_counts": counts(8, 0, 8, 8), "frame_counts": counts(14, 0, 14, 14)}, "at least one step"),
        (lambda s: {"step_counts": counts(8, 8, 8).astype(np.int8)}, "step_counts must have shape"),
    ],
)
def test_segments_end_to_end_that_do_not_fit_are_named(
    change: Callable[[Segments], dict[str, Array]], message: str
) -> None:
    joined = join_segments([make_segment(STACKED, 8)] * 3, STACKED)
    with pytest.raises(LayoutMismatch, match=message):
        join_segments(replace(joined, **change(joined)), STACKED)


def assert_moments(moments: Moments, numbers: list[float]) -> None:
    assert moments.count == len(numbers)
    if numbers:
        size = max(1.0, *(abs(number) for number in numbers))
        assert moments.mean == pytest.approx(np.mean(numbers), rel=1e-9, abs=1e-9 * size)
        assert moments.squares == pytest.approx(np.var(numbers) * len(numbers), rel=1e-9, abs=1e-9 * size**2)
        assert moments.std == pytest.approx(np.std(numbers), rel=1e-6, abs=1e-5 * size)


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=8), max_size=8))
def test_moments_are_those_of_all_numbers_however_they_were_divided(parts: list[list[float]]) -> None:
    moments = [Moments.of(np.array(part)) for part in parts]
    for one, part in zip(moments, parts, strict=True):
        assert_moments(one, part)
    everything = [number for part in parts for number in part]
    forwards = backwards = Moments()
    for one in moments:
        forwards = forwards.merged(one)
    for one in reversed(moments):
        backwards = one.merged(backwards)
    assert_moments(forwards, everything)
    assert_moments(backwards, everything)


def test_moments_of_nothing() -> None:
    assert Moments.of(np.empty(0)) == Moments() == Moments().merged(Moments())
    assert Moments().std == 0.0
    some = Moments.of(np.array([1.0, 5.0]))
    assert some == Moments(2, 3.0, 8.0)
    assert some.std == 2.0
    assert some.merged(Moments()) == Moments().merged(some) == some


def test_equal_numbers_do_not_deviate() -> None:
    constant = Moments.of(np.full(7, 0.1))
    assert constant.std == pytest.approx(0.0, abs=1e-15)
    assert constant.merged(constant).std == pytest.approx(0.0, abs=1e-15)
    assert Moments.of(np.array([3.0])).std == 0.0


def test_what_crosses_processes_is_frozen_and_survives_the_journey() -> None:
    segment = make_segment(STACKED, 2, value=7)
    with pytest.raises(FrozenInstanceError):
        segment.reward = np.zeros(2, np.float32)  # type: ignore[misc]
    back = pickle.loads(pickle.dumps(Push(1, 2, 3, (segment,))))
    assert (back.worker, back.incarnation, back.sequence) == (1, 2, 3)
    assert back.segments[0].frames.tobytes() == segment.frames.tobytes()
    back.segments[0].check(STACKED)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (ConfigurationError, ValueError),
        (LayoutMismatch, ValueError),
        (NotEnoughMemory, SquallError),
        (DeadlineExceeded, TimeoutError),
    ],
)
def test_every_error_is_one_of_ours_and_of_the_kind_python_users_expect(
    error: type[SquallError], builtin: type[Exception]
) -> None:
    assert issubclass(error, SquallError)
    assert issubclass(error, builtin)
    assert pickle.loads(pickle.dumps(error("why"))).args == ("why",)
