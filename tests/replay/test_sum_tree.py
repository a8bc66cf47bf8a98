"""`SumTree` against a list of weights, at the edges of intervals, and with invalid input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.errors import ConfigurationError
from replay.sum_tree import SumTree
from tests.replay.naive import NaiveSumTree

# Sums of quarters are exact in any order, so both trees agree exactly, also at the edges of intervals.
QUARTERS = st.integers(0, 40).map(lambda count: count / 4)


@st.composite
def capacity_and_updates(draw: st.DrawFn) -> tuple[int, list[list[tuple[int, float]]]]:
    capacity = draw(st.integers(1, 70))
    update = st.lists(st.tuples(st.integers(0, capacity - 1), QUARTERS), max_size=20)
    return capacity, draw(st.lists(update, min_size=1, max_size=15))


def filled(weights: list[float]) -> SumTree:
    tree = SumTree(len(weights))
    tree.set(np.arange(len(weights)), np.array(weights))
    return tree


@settings(deadline=None)  # numba compiles in the first example
@given(capacity_and_updates())
def test_agrees_with_the_naive_tree_after_every_update(
    case: tuple[int, list[list[tuple[int, float]]]],
) -> None:
    capacity, updates = case
    tree, naive = SumTree(capacity), NaiveSumTree(capacity)
    for update in updates:
        leaves, weights = [leaf for leaf, _ in update], [weight for _, weight in update]
        tree.set(np.array(leaves, np.int64), np.array(weights))
        naive.set(leaves, weights)
        assert tree.total == naive.total()
        assert tree.get(np.arange(capacity)).tolist() == naive.weights
        if naive.total() > 0.0:
            targets = np.arange(0.0, naive.total(), 0.125)  # every edge, and the middle between any two
            assert tree.find(targets).tolist() == [naive.find(target) for target in targets]


@pytest.mark.parametrize("capacity", [1, 2, 3, 64, 100, 1000])
def test_agrees_with_the_naive_tree_over_thousands_of_updates_with_rounding(capacity: int) -> None:
    rng = np.random.default_rng(capacity)
    tree, naive = SumTree(capacity), NaiveSumTree(capacity)
    for _ in range(300):
        leaves = rng.integers(0, capacity, 10)
        weights = rng.lognormal(0.0, 4.0, 10) * (rng.random(10) > 0.3)
        tree.set(leaves, weights)
        naive.set(leaves.tolist(), weights.tolist())
    assert tree.get(np.arange(capacity)).tolist() == naive.weights
    assert tree.total == pytest.approx(naive.total(), rel=1e-12)
    targets = rng.random(200) * tree.total * (1.0 - 1e-9)
    edges = np.cumsum(naive.weights)
    clear = np.abs(edges - targets[:, None]).min(axis=1) > 1e-10 * tree.total
    assert clear.sum() > 150
    assert tree.find(targets[clear]).tolist() == [naive.find(target) for target in targets[clear]]


def test_rounding_errors_do_not_accumulate() -> None:
    tree = SumTree(8)
    for _ in range(1000):
        tree.set(np.array([0, 1]), np.array([1e16, 1.0]))
        tree.set(np.array([0]), np.array([0.0]))
    assert tree.total == 1.0


def test_finds_by_hand() -> None:
    tree = filled([1.0, 0.0, 2.0, 3.0, 0.0])
    assert tree.total == 6.0
    assert tree.find(np.array([0.0, 0.999, 1.0, 2.999, 3.0, 5.999])).tolist() == [0, 0, 2, 2, 3, 3]


def test_of_a_leaf_named_twice_the_last_weight_wins() -> None:
    tree = SumTree(5)
    tree.set(np.array([3, 1, 3, 3, 1]), np.array([9.0, 9.0, 8.0, 2.0, 1.0]))
    assert tree.get(np.arange(5)).tolist() == [0.0, 1.0, 0.0, 2.0, 0.0]
    assert tree.total == 3.0


@pytest.mark.parametrize("capacity", [1, 2, 5, 8, 33, 257])
def test_never_returns_a_leaf_of_weight_zero(capacity: int) -> None:
    rng = np.random.default_rng(capacity)
    for _ in range(200):
        weights = rng.lognormal(0.0, 8.0, capacity) * (rng.random(capacity) > 0.6)
        weights[rng.integers(capacity)] = 1.0
        tree = filled(weights.tolist())
        edges = np.concatenate([[0.0], np.cumsum(weights), np.cumsum(weights[::-1]), [tree.total]])
        targets = np.concatenate([np.nextafter(edges, 0.0), edges, np.nextafter(edges, np.inf)])
        assert (weights[tree.find(targets)] > 0.0).all()


def test_a_target_at_or_beyond_the_total_finds_the_last_leaf_with_weight() -> None:
    tree = filled([0.0, 0.1, 0.2, 0.3, 0.0, 0.0])
    beyond = [np.nextafter(tree.total, 0.0), tree.total, np.nextafter(tree.total, 1.0), 2.0 * tree.total]
    assert tree.find(np.array(beyond)).tolist() == [3] * 4


def test_a_target_of_zero_passes_over_leading_zeros() -> None:
    assert filled([0.0, 0.0, 0.0, 1e-300]).find(np.array([0.0, -0.0])).tolist() == [3, 3]


def test_setting_and_finding_nothing_is_allowed() -> None:
    tree = filled([1.0])
    tree.set(np.array([], np.int64), np.array([]))
    assert tree.total == 1.0
    assert tree.find(np.array([])).shape == (0,)


@pytest.mark.parametrize("capacity", [0, -1])
def test_refuses_a_capacity_that_is_not_positive(capacity: int) -> None:
    with pytest.raises(ConfigurationError, match=f"positive capacity, got {capacity}"):
        SumTree(capacity)


@pytest.mark.parametrize("leaf", [-1, 5, 8])
def test_refuses_a_leaf_out_of_range(leaf: int) -> None:
    with pytest.raises(ValueError, match=r"leaves must lie in \[0, 5\)"):
        SumTree(5).set(np.array([0, leaf]), np.array([1.0, 1.0]))


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
def test_refuses_a_weight_that_is_negative_or_not_finite_and_changes_nothing(weight: float) -> None:
    tree = filled([1.0, 2.0])
    with pytest.raises(ValueError, match="finite and not negative"):
        tree.set(np.array([0, 1]), np.array([5.0, weight]))
    assert tree.get(np.arange(2)).tolist() == [1.0, 2.0]


def test_refuses_leaves_and_weights_of_different_lengths() -> None:
    with pytest.raises(ValueError, match=r"must both be \[N\], got \(2,\) and \(3,\)"):
        SumTree(5).set(np.arange(2), np.ones(3))


@pytest.mark.parametrize("target", [-1e-300, -1.0, np.nan])
def test_refuses_a_target_that_is_negative_or_not_a_number(target: float) -> None:
    with pytest.raises(ValueError, match="targets must not be negative or NaN"):
        filled([0.0, 1.0]).find(np.array([0.5, target]))


def test_refuses_to_draw_from_weights_that_are_all_zero() -> None:
    with pytest.raises(ValueError, match="all zero"):
        SumTree(4).find(np.array([0.0]))
