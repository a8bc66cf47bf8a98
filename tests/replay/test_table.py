"""`TransitionTable` against a plain list of full transitions, bit for bit, and with invalid input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from replay.errors import ConfigurationError, LayoutMismatch
from replay.table import TableSpec, TransitionTable
from replay.types import Layout
from tests.replay.naive import Lane, NaiveTable, assert_same_bits, make_segment, read_everything

VECTOR = Layout((3,), "float32", 1, (2,), "float32", 8, 3)
STACKED = Layout((2, 3), "uint8", 4, (), "int64", 8, 3)


def make_table(
    layout: Layout,
    capacity: int,
    priority_exponent: float | None = None,
    *,
    shard: int = 0,
    incarnation: int = 0,
    seed: int = 0,
) -> TransitionTable:
    spec = TableSpec(layout, capacity, priority_exponent)
    return TransitionTable(spec, seed=np.random.SeedSequence(seed), shard=shard, incarnation=incarnation)


def assert_holds(table: TransitionTable, naive: NaiveTable) -> None:
    live = naive.live
    assert table.size == len(live)
    assert table.evicted == naive.evicted
    if not live:
        return
    batch = read_everything(table)
    for name in ("observation", "action", "reward", "discount", "next_observation"):
        expected = np.stack([getattr(transition, name) for transition in live])[None]
        assert_same_bits(getattr(batch, name), expected)


@pytest.mark.parametrize("end_probability", [0.03, 0.2, 0.6])
@pytest.mark.parametrize(
    ("layout", "alpha"),
    [
        (VECTOR, None),
        (replace(VECTOR, n_steps=1), 0.6),
        (replace(VECTOR, n_steps=5, segment_length=3), None),
        (STACKED, None),
        (replace(STACKED, n_steps=1), None),
        (replace(STACKED, n_steps=5), 0.6),
        (replace(STACKED, segment_length=2), None),
    ],
)
def test_every_live_item_equals_the_naive_list_over_thousands_of_inserts(
    layout: Layout, alpha: float | None, end_probability: float
) -> None:
    table = make_table(layout, 37, alpha)
    naive = NaiveTable(37, table.spec.frame_capacity)
    rng = np.random.default_rng([layout.n_steps, layout.stack, int(100 * end_probability)])
    inserted = frames = evicted_for_frames = 0
    for i in range(700):
        if i % 100 == 0:
            lanes = [Lane(layout, rng, end_probability) for _ in range(3)]
        length = layout.segment_length
        if rng.random() < 0.5:
            length = int(rng.integers(1, length + 1))
        segment, transitions = lanes[i % 3].cut(length, flush=bool(rng.random() < 0.1))
        fits, evicted = table.size + segment.steps <= table.spec.capacity, table.evicted
        table.insert([segment])
        naive.insert(transitions, len(segment.frames))
        evicted_for_frames += fits and table.evicted > evicted
        inserted, frames = inserted + segment.steps, frames + len(segment.frames)
        if i % 15 == 0 or i < 10:
            assert_holds(table, naive)
    assert_holds(table, naive)
    assert inserted > 10 * table.spec.capacity  # the ring of transitions wrapped around,
    assert frames > 10 * table.spec.frame_capacity  # and so did the ring of frames
    if end_probability == 0.6 and layout.segment_length == 8:
        assert evicted_for_frames > 10  # short episodes need more frames than the slack allows
    assert table.size + table.evicted == inserted


def test_resets_inside_a_segment_are_among_the_cases_above() -> None:
    lane = Lane(STACKED, np.random.default_rng(0), 0.2)
    ages: set[int] = set()
    inside = 0
    for _ in range(100):
        segment, _ = lane.cut(8)
        ages |= set(segment.age.tolist())
        inside += (np.diff(segment.row) > 1).any()
    assert ages == {0, 1, 2, 3}
    assert inside > 10


def test_by_hand_a_stack_after_a_reset_has_zero_frames_before_it() -> None:
    layout = Layout((), "uint8", 4, (), "int64", 4, 1)
    table = make_table(layout, 4)
    segment = make_segment(layout, 2)
    table.insert(
        [
            replace(
                segment,
                frames=np.array([11, 12, 13, 14, 21], np.uint8),
                row=np.array([1, 4], np.int32),
                age=np.array([1, 0], np.uint8),
                bootstrap_row=np.array([3, 4], np.int32),
                bootstrap_age=np.array([3, 0], np.uint8),
            )
        ]
    )
    batch = read_everything(table)
    assert batch.observation[0].tolist() == [[0, 0, 11, 12], [0, 0, 0, 21]]
    assert batch.next_observation[0].tolist() == [[11, 12, 13, 14], [0, 0, 0, 21]]


def test_a_batch_has_the_shapes_and_dtypes_it_promises() -> None:
    table = make_table(STACKED, 20)
    table.insert([make_segment(STACKED, 8)])
    batch = table.sample(3, 5)
    expected = {
        "observation": ((3, 5, 4, 2, 3), "uint8"),
        "action": ((3, 5), "int64"),
        "reward": ((3, 5), "float32"),
        "discount": ((3, 5), "float32"),
        "next_observation": ((3, 5, 4, 2, 3), "uint8"),
        "ids": ((3, 5), "int64"),
        "probability": ((3, 5), "float64"),
    }
    assert {
        name: (values.shape, values.dtype.name) for name, values in vars(batch).items() if name != "size"
    } == expected
    assert batch.size == 8


def test_a_batch_is_a_copy_and_so_is_what_was_inserted() -> None:
    table = make_table(VECTOR, 8)
    segment = make_segment(VECTOR, 8, value=1)
    table.insert([segment])
    segment.frames[:] = 99.0
    segment.reward[:] = 99.0
    batch = table.sample(1, 64)
    assert (batch.observation == 1.0).all()
    assert (batch.reward == 0.0).all()
    table.insert([make_segment(VECTOR, 8, value=2)])
    assert (batch.observation == 1.0).all()


@pytest.mark.parametrize("layout", [VECTOR, STACKED])
def test_an_empty_segment_changes_nothing(layout: Layout) -> None:
    table = make_table(layout, 8)
    table.insert([make_segment(layout, 8, value=1)])
    before = read_everything(table)
    table.insert([make_segment(layout, 0, value=2)])
    assert (table.size, table.evicted) == (8, 0)
    assert_same_bits(read_everything(table).observation, before.observation)


def test_capacity_is_reached_and_evictions_take_whole_segments() -> None:
    table = make_table(VECTOR, 20)
    sizes = []
    for value in range(5):
        table.insert([make_segment(VECTOR, 5, value=value)])
        sizes.append(table.size)
    assert sizes == [5, 10, 15, 20, 20]
    table.insert([make_segment(VECTOR, 1, value=5)])
    assert (table.size, table.evicted) == (16, 10)
    assert set(read_everything(table).observation[..., 0].ravel().tolist()) == {2, 3, 4, 5}


def test_a_table_of_one_segment_holds_just_that() -> None:
    table = make_table(STACKED, 8)
    for value in range(30):
        table.insert([make_segment(STACKED, 8, value=value)])
        assert table.size == 8
        assert (read_everything(table).observation == value).all()


def test_bytes_counts_what_is_held() -> None:
    table = make_table(STACKED, 400, 0.5)
    assert table.bytes == 0
    segment = make_segment(STACKED, 8)
    table.insert([segment])
    tree = 8 * (400 + 56 + 8 + 8) / 400  # levels of 400, 50, 7, and 1 nodes, padded to cache lines of 8
    per_transition = 4 + 1 + 4 + 1 + 8 + 4 + 4 + tree
    assert table.bytes == int(segment.frames.nbytes + 8 * per_transition)
    for _ in range(200):
        table.insert([segment])
    assert table.bytes == int(50 * segment.frames.nbytes + 400 * per_transition)
    assert table.bytes <= table.spec.expected_bytes


@pytest.mark.parametrize("layout", [VECTOR, STACKED, replace(STACKED, segment_length=2, n_steps=5)])
@pytest.mark.parametrize("most", [3, 9, 40])
def test_segments_inserted_at_once_are_as_if_one_by_one(layout: Layout, most: int) -> None:
    together, singly = make_table(layout, 37, 0.6), make_table(layout, 37, 0.6)
    rng = np.random.default_rng(most)
    lane = Lane(layout, rng, 0.2)
    for _ in range(60):
        # 40 segments can be more than the table's capacity.
        lengths = rng.integers(1, layout.segment_length + 1, int(rng.integers(1, most + 1)))
        segments = [lane.cut(int(length), flush=bool(rng.random() < 0.1))[0] for length in lengths]
        together.insert([make_segment(layout, 0), *segments])
        for segment in segments:
            singly.insert([segment])
        assert (together.size, together.evicted, together.bytes) == (singly.size, singly.evicted, singly.bytes)
        assert together.mass == singly.mass
        if singly.size:
            ours, theirs = read_everything(together), read_everything(singly)
            for name in ("observation", "action", "reward", "discount", "next_observation", "ids", "probability"):
                assert_same_bits(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("alpha", [None, 0.6])
def test_a_segment_that_does_not_fit_leaves_the_table_unchanged(alpha: float | None) -> None:
    table = make_table(VECTOR, 8, alpha)
    table.insert([make_segment(VECTOR, 8, value=1)])
    before = read_everything(table)
    for wrong in (make_segment(STACKED, 4), replace(make_segment(VECTOR, 4), reward=np.zeros(3, np.float32))):
        with pytest.raises(LayoutMismatch):
            table.insert([make_segment(VECTOR, 4), wrong, make_segment(VECTOR, 2)])
    assert (table.size, table.evicted) == (8, 0)
    after = read_everything(table)
    for name in ("observation", "reward", "ids", "probability"):
        assert_same_bits(getattr(after, name), getattr(before, name))


# Invalid input


@pytest.mark.parametrize("capacity", [0, -5])
def test_refuses_a_capacity_that_is_not_positive(capacity: int) -> None:
    with pytest.raises(ConfigurationError, match=f"replay capacity must be positive, got {capacity}"):
        TableSpec(VECTOR, capacity)


def test_refuses_a_capacity_below_one_segment_or_beyond_what_a_row_can_count() -> None:
    with pytest.raises(ConfigurationError, match="a replay of 7 transitions cannot hold one segment of 8"):
        TableSpec(VECTOR, 7)
    assert TableSpec(VECTOR, 8).capacity == 8
    with pytest.raises(ConfigurationError, match=r"fewer than 2\*\*31 frames"):
        TableSpec(VECTOR, 2**31 - 1)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_refuses_a_priority_exponent_outside_0_to_1(alpha: float) -> None:
    with pytest.raises(ConfigurationError, match=r"must lie in \[0, 1\]"):
        TableSpec(VECTOR, 8, alpha)


@pytest.mark.parametrize(("shard", "incarnation"), [(-1, 0), (256, 0), (0, -1)])
def test_refuses_a_shard_or_incarnation_that_fits_no_id(shard: int, incarnation: int) -> None:
    with pytest.raises(ConfigurationError, match=f"got {shard}, {incarnation}"):
        make_table(VECTOR, 8, shard=shard, incarnation=incarnation)


@pytest.mark.parametrize(("k", "batch_size"), [(0, 1), (1, 0), (-1, 4)])
def test_refuses_to_sample_nothing(k: int, batch_size: int) -> None:
    table = make_table(VECTOR, 8)
    table.insert([make_segment(VECTOR, 8)])
    with pytest.raises(ValueError, match=f"must be positive, got {k} and {batch_size}"):
        table.sample(k, batch_size)


@pytest.mark.parametrize("alpha", [None, 0.6])
def test_refuses_to_sample_from_an_empty_table(alpha: float | None) -> None:
    with pytest.raises(ValueError, match="empty table"):
        make_table(VECTOR, 8, alpha).sample(1, 1)
