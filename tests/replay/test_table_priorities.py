"""Priorities and ids of `TransitionTable`."""

from __future__ import annotations

import numpy as np
import pytest

from replay.messages import Batch
from replay.table import TransitionTable
from replay.types import Array
from tests.replay.naive import Lane, NaiveTable, assert_same_bits, make_segment, read_everything
from tests.replay.test_table import STACKED, VECTOR, assert_holds, make_table


def ids_of(batch: Batch) -> Array:
    return batch.ids[0]


def priorities_of(table: TransitionTable) -> Array:
    """Return `priority ** alpha` of each live item, oldest first, up to a common factor."""
    return read_everything(table).probability[0]


def test_new_items_get_the_highest_priority_seen() -> None:
    table = make_table(VECTOR, 100, 1.0)
    assert table.highest_priority == 1.0
    table.insert([make_segment(VECTOR, 2)])
    table.update_priorities(ids_of(read_everything(table)), np.array([0.5, 4.0]))
    assert table.highest_priority == 4.0
    table.insert([make_segment(VECTOR, 1)])
    table.update_priorities(ids_of(read_everything(table))[1:2], np.array([2.0]))
    assert table.highest_priority == 4.0  # the highest priority seen so far, not that of the present items
    table.insert([make_segment(VECTOR, 1)])
    np.testing.assert_allclose(priorities_of(table), np.array([0.5, 2.0, 4.0, 4.0]) / 10.5, rtol=1e-12)


def test_the_highest_priority_of_an_earlier_table_can_be_carried_over() -> None:
    table = make_table(VECTOR, 100, 0.5)
    table.highest_priority = 9.0
    table.insert([make_segment(VECTOR, 2)])
    table.update_priorities(ids_of(read_everything(table))[:1], np.array([4.0]))
    np.testing.assert_allclose(priorities_of(table), [2 / 5, 3 / 5], rtol=1e-12)


def test_of_an_id_named_twice_the_last_priority_wins() -> None:
    table = make_table(VECTOR, 100, 1.0)
    table.insert([make_segment(VECTOR, 3)])
    a, b, c = ids_of(read_everything(table))
    assert table.update_priorities(np.array([a, b, a, c, a]), np.array([9.0, 2.0, 7.0, 5.0, 3.0])) == 0
    np.testing.assert_allclose(priorities_of(table), np.array([3.0, 2.0, 5.0]) / 10.0, rtol=1e-12)


def test_updates_take_the_shape_of_a_batch() -> None:
    table = make_table(VECTOR, 100, 1.0)
    table.insert([make_segment(VECTOR, 8)])
    batch = table.sample(3, 4)
    assert table.update_priorities(batch.ids, np.full((3, 4), 2.0)) == 0
    assert table.update_priorities(np.array([], np.int64), np.array([])) == 0
    assert table.stale_updates == 0


def test_an_update_of_an_evicted_item_is_ignored_and_counted() -> None:
    table = make_table(VECTOR, 8, 1.0)
    table.insert([make_segment(VECTOR, 5)])
    old = ids_of(read_everything(table))
    table.insert([make_segment(VECTOR, 3)])
    live = ids_of(read_everything(table))
    table.insert([make_segment(VECTOR, 4)])  # evicts the first five and reuses their slots
    assert table.evicted == 5
    before = priorities_of(table)
    assert table.update_priorities(old, np.full(5, 50.0)) == 5
    assert table.stale_updates == 5
    assert table.highest_priority == 1.0  # a stale priority does not count as seen
    assert_same_bits(priorities_of(table), before)
    assert table.update_priorities(np.concatenate([old[:2], live[5:]]), np.array([9.0, 9.0, 2.0, 3.0, 4.0])) == 2
    assert (table.stale_updates, table.highest_priority) == (7, 4.0)
    np.testing.assert_allclose(priorities_of(table), np.array([2, 3, 4, 1, 1, 1, 1]) / 13.0, rtol=1e-12)


@pytest.mark.parametrize(
    "other", [{"shard": 1}, {"shard": 255}, {"incarnation": 1}, {"incarnation": 4095}, {"shard": 2, "incarnation": 3}]
)
def test_an_update_from_another_shard_or_incarnation_is_ignored_and_counted(other: dict[str, int]) -> None:
    here, there = make_table(VECTOR, 8, 1.0), make_table(VECTOR, 8, 1.0, **other)
    for table in (here, there):
        table.insert([make_segment(VECTOR, 8)])
    mine, foreign = ids_of(read_everything(here)), ids_of(read_everything(there))
    assert (foreign >= 0).all()
    assert not set(mine.tolist()) & set(foreign.tolist())
    before = priorities_of(here)
    assert here.update_priorities(foreign, np.full(8, 5.0)) == 8
    assert here.stale_updates == 8
    assert_same_bits(priorities_of(here), before)
    assert there.update_priorities(foreign, np.full(8, 5.0)) == 0


@pytest.mark.parametrize("bad_id", [-1, 2**63 - 1, -(2**63), 8])
def test_an_id_that_was_never_given_out_is_stale(bad_id: int) -> None:
    table = make_table(VECTOR, 8, 1.0)
    table.insert([make_segment(VECTOR, 8)])
    assert table.update_priorities(np.array([bad_id]), np.array([5.0])) == 1


def test_ids_are_unique_over_the_life_of_a_table_and_survive_a_float_free_journey() -> None:
    table = make_table(VECTOR, 8, shard=255, incarnation=4095)
    seen: set[int] = set()
    for _ in range(50):
        table.insert([make_segment(VECTOR, 8)])
        ids = set(ids_of(read_everything(table)).tolist())
        assert not ids & seen
        seen |= ids
    assert all(0 <= number < 2**63 for number in seen)


def test_priorities_change_nothing_but_priorities() -> None:
    lane = Lane(STACKED, np.random.default_rng(0), 0.2)
    table = make_table(STACKED, 50, 0.6)
    naive = NaiveTable(50, table.spec.frame_capacity)
    rng = np.random.default_rng(1)
    for _ in range(100):
        segment, transitions = lane.cut(int(rng.integers(1, 9)))
        table.insert([segment])
        naive.insert(transitions, len(segment.frames))
        if table.size:
            batch = table.sample(2, 8)
            table.update_priorities(batch.ids, rng.uniform(0.5, 2.0, (2, 8)))
            assert_holds(table, naive)


@pytest.mark.parametrize("priority", [0.0, -1.0, np.nan, np.inf])
def test_refuses_a_priority_that_is_not_positive_and_finite(priority: float) -> None:
    table = make_table(VECTOR, 8, 1.0)
    table.insert([make_segment(VECTOR, 2)])
    before = priorities_of(table)
    with pytest.raises(ValueError, match="positive and finite"):
        table.update_priorities(ids_of(read_everything(table)), np.array([2.0, priority]))
    assert_same_bits(priorities_of(table), before)


def test_refuses_ids_and_priorities_of_different_lengths_and_updates_of_a_uniform_table() -> None:
    with pytest.raises(ValueError, match=r"the same shape, got \(2,\) and \(3,\)"):
        make_table(VECTOR, 8, 1.0).update_priorities(np.arange(2), np.ones(3))
    with pytest.raises(ValueError, match="uniform table has no priorities"):
        make_table(VECTOR, 8).update_priorities(np.arange(2), np.ones(2))
