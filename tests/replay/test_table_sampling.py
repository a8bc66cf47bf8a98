"""The distribution of `TransitionTable`'s samples, by Pearson's chi-square test, and that the test can fail."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from replay.table import TableSpec, TransitionTable
from replay.types import Array, Layout
from tests.replay.naive import make_segment, read_everything
from tests.replay.statistics import FALSE_ALARM, chi_square_p, chi_square_tail

LAYOUT = Layout((1,), "float32", 1, (), "int64", 8, 1)
CAPACITY = 61
SAMPLES = 100_000
ALPHA = 0.6


class Filled:
    """A table, and a list of the sizes of its live segments and of the priorities of its live items."""

    def __init__(self, alpha: float | None, seed: int) -> None:
        spec = TableSpec(LAYOUT, CAPACITY, alpha)
        self.table = TransitionTable(spec, seed=np.random.SeedSequence(seed))
        self.rng = np.random.default_rng([seed, 1])
        self.segments: list[int] = []
        self.priorities: list[float] = []
        self.highest = 1.0

    def insert(self, steps: int) -> None:
        self.table.insert([make_segment(LAYOUT, steps)])
        self.segments.append(steps)
        self.priorities += [self.highest] * steps
        while sum(self.segments) > CAPACITY:
            del self.priorities[: self.segments.pop(0)]

    def insert_many(self, count: int) -> None:
        for _ in range(count):
            self.insert(int(self.rng.integers(1, 9)))

    def update(self, part: float) -> None:
        """Set new priorities between 0.1 and 10 for a random part of the items."""
        ids, size = read_everything(self.table).ids[0], len(self.priorities)
        chosen = self.rng.permutation(size)[: int(part * size)]
        priorities = 10.0 ** self.rng.uniform(-1.0, 1.0, len(chosen))
        assert self.table.update_priorities(ids[chosen], priorities) == 0
        for item, priority in zip(chosen, priorities, strict=True):
            self.priorities[item] = priority
            self.highest = max(self.highest, priority)

    def uniform(self) -> Array:
        return np.full(len(self.priorities), 1.0 / len(self.priorities))

    def prioritized(self, alpha: float = ALPHA) -> Array:
        weights = np.array(self.priorities) ** alpha
        probabilities: Array = weights / weights.sum()
        return probabilities

    def uniform_over_segments(self) -> Array:
        """Return the probabilities of a wrong sampler: uniform over segments of different lengths."""
        return np.concatenate([np.full(n, 1.0 / n) for n in self.segments]) / len(self.segments)

    def count(self, k: int, batch_size: int) -> Array:
        """Sample and return how often each live item was sampled, oldest first."""
        live = read_everything(self.table).ids[0]
        assert len(live) == len(self.priorities)
        sampled = self.table.sample(k, batch_size).ids.ravel()
        at = np.searchsorted(live, sampled)
        assert (live[at] == sampled).all()
        return np.bincount(at, minlength=len(live))


def before_any_eviction(filled: Filled) -> None:
    while sum(filled.segments) + 8 <= CAPACITY:
        filled.insert_many(1)
    assert filled.table.evicted == 0


def after_evictions(filled: Filled) -> None:
    filled.insert_many(200)
    assert filled.table.evicted > 10 * CAPACITY


def after_updates(filled: Filled) -> None:
    before_any_eviction(filled)
    filled.update(1.0)


def after_evictions_and_updates(filled: Filled) -> None:
    for _ in range(10):
        filled.insert_many(6)
        filled.update(0.5)
    filled.insert_many(3)
    assert filled.table.evicted > 3 * CAPACITY


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fill", [before_any_eviction, after_evictions])
@pytest.mark.parametrize(("k", "batch_size"), [(SAMPLES, 1), (SAMPLES // 50, 50)])
def test_uniform_is_uniform_over_transitions(
    fill: Callable[[Filled], None], seed: int, k: int, batch_size: int
) -> None:
    filled = Filled(None, seed)
    fill(filled)
    assert chi_square_p(filled.count(k, batch_size), filled.uniform()) > FALSE_ALARM


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fill", [before_any_eviction, after_evictions, after_updates, after_evictions_and_updates])
@pytest.mark.parametrize(("k", "batch_size"), [(SAMPLES, 1), (SAMPLES // 50, 50)])
def test_prioritized_is_proportional_to_priority_to_the_alpha(
    fill: Callable[[Filled], None], seed: int, k: int, batch_size: int
) -> None:
    filled = Filled(ALPHA, seed)
    fill(filled)
    assert chi_square_p(filled.count(k, batch_size), filled.prioritized()) > FALSE_ALARM


@pytest.mark.parametrize(("alpha", "expected_alpha"), [(0.0, 0.0), (1.0, 1.0)])
def test_alpha_0_is_uniform_and_alpha_1_proportional_to_priority(alpha: float, expected_alpha: float) -> None:
    filled = Filled(alpha, 0)
    after_evictions_and_updates(filled)
    assert chi_square_p(filled.count(SAMPLES, 1), filled.prioritized(expected_alpha)) > FALSE_ALARM


@pytest.mark.parametrize("seed", range(3))
def test_wrong_samplers_are_rejected(seed: int) -> None:
    filled = Filled(ALPHA, seed)
    after_evictions_and_updates(filled)

    def p_of(sampler: Array, expected: Array) -> float:
        return chi_square_p(filled.rng.multinomial(SAMPLES, sampler), expected)

    assert p_of(filled.uniform(), filled.uniform()) > FALSE_ALARM
    assert p_of(filled.uniform_over_segments(), filled.uniform()) < FALSE_ALARM
    assert p_of(filled.prioritized(), filled.uniform()) < FALSE_ALARM
    assert p_of(filled.prioritized(1.0), filled.prioritized()) < FALSE_ALARM
    forgot_one_update = filled.prioritized()
    forgot_one_update[[0, -1]] = forgot_one_update[[-1, 0]]
    assert p_of(forgot_one_update, filled.prioritized()) < FALSE_ALARM
    never_the_newest = filled.uniform().copy()
    never_the_newest[-1] = 0.0
    assert p_of(never_the_newest / never_the_newest.sum(), filled.uniform()) < FALSE_ALARM


@pytest.mark.parametrize("alpha", [None, ALPHA])
def test_the_returned_probability_is_the_true_one(alpha: float | None) -> None:
    filled = Filled(alpha, 0)
    for _ in range(20):
        filled.insert_many(4)
        if alpha is not None:
            filled.update(0.3)
        everything = read_everything(filled.table)
        expected = filled.uniform() if alpha is None else filled.prioritized()
        np.testing.assert_allclose(everything.probability[0], expected, rtol=1e-12)
        batch = filled.table.sample(3, 7)
        assert batch.size == len(expected)
        at = np.searchsorted(everything.ids[0], batch.ids)
        np.testing.assert_allclose(batch.probability, expected[at], rtol=1e-12)


def test_each_batch_of_a_call_is_stratified_by_itself() -> None:
    filled = Filled(ALPHA, 0)
    after_evictions_and_updates(filled)
    ids, (k, batch_size) = read_everything(filled.table).ids[0], (200, 40)
    # An item covers B p strata: at least floor(B p) - 1 of them fully, and at most ceil(B p) + 1 at least partly.
    width = batch_size * filled.prioritized()
    batches = filled.table.sample(k, batch_size).ids
    counts = np.stack([np.bincount(np.searchsorted(ids, row), minlength=len(ids)) for row in batches])
    assert (counts >= np.floor(width) - 1).all()
    assert (counts <= np.ceil(width) + 1).all()
    # The bounds are meaningful: independent samples violate them.
    independent = filled.rng.multinomial(batch_size, filled.prioritized(), size=k)
    assert (independent > np.ceil(width) + 1).any()


def test_by_hand_equal_priorities_and_as_many_strata_give_every_item_once_a_batch() -> None:
    table = TransitionTable(TableSpec(LAYOUT, 32, 0.5), seed=np.random.SeedSequence(0))
    for _ in range(4):
        table.insert([make_segment(LAYOUT, 8)])
    ids = read_everything(table).ids[0].tolist()
    for batch in table.sample(100, 32).ids.tolist():
        assert sorted(batch) == ids


def test_draws_of_the_same_seed_agree_and_those_of_another_differ() -> None:
    first, again, other = (Filled(ALPHA, 0), Filled(ALPHA, 0), Filled(ALPHA, 0))
    other.table = TransitionTable(other.table.spec, seed=np.random.SeedSequence(5))
    for filled in (first, again, other):
        before_any_eviction(filled)
    sampled = [filled.table.sample(2, 50).ids.tolist() for filled in (first, again, other)]
    assert sampled[0] == sampled[1]
    assert sampled[0] != sampled[2]


@pytest.mark.parametrize(
    ("statistic", "freedom", "tail"),
    [(18.307, 10, 0.05), (29.588, 10, 1e-3), (86.661, 50, 1e-3), (124.342, 100, 0.05), (149.449, 100, 1e-3)],
)
def test_the_tail_agrees_with_printed_tables(statistic: float, freedom: int, tail: float) -> None:
    assert chi_square_tail(statistic, freedom) == pytest.approx(tail, rel=0.1)
