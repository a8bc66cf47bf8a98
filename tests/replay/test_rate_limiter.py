"""`RateLimiter`: the inequality, the absence of deadlocks, and the ratio."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.errors import ConfigurationError
from replay.rate_limiter import RateLimiter


def insert(limiter: RateLimiter, count: int) -> bool:
    if limiter.insert_waits_for(count) is not None:
        return False
    limiter.record_insert(count)
    return True


def sample(limiter: RateLimiter, count: int) -> bool:
    if limiter.sample_waits_for(count) is not None:
        return False
    limiter.record_sample(count)
    return True


def test_by_hand() -> None:
    limiter = RateLimiter(samples_per_insert=2.0, minimum_size=10, tolerance=8.0)
    assert limiter.due == -20.0
    assert not sample(limiter, 1)
    assert insert(limiter, 9)
    assert not sample(limiter, 1)
    assert insert(limiter, 1)
    assert (limiter.inserts, limiter.counted_inserts, limiter.due) == (10, 0, 0.0)
    assert not sample(limiter, 9)  # due would be -9
    assert sample(limiter, 8)
    assert limiter.due == -8.0
    assert not sample(limiter, 1)
    assert not insert(limiter, 9)  # due would be 10
    assert insert(limiter, 8)
    assert (limiter.due, limiter.counted_inserts) == (8.0, 8)
    assert not insert(limiter, 1)
    assert not sample(limiter, 17)
    assert sample(limiter, 16)
    assert (limiter.samples, limiter.inserts, limiter.due) == (24, 18, -8.0)


def test_the_reasons_name_who_is_waited_for_and_the_figures() -> None:
    limiter = RateLimiter(2.0, 10, 8.0)
    assert limiter.sample_waits_for(4) == "experience: 0 of the first 10 items inserted"
    limiter.record_insert(13)
    assert limiter.insert_waits_for(2) == (
        "the learner: an insert of 2 would leave 10 samples due, more than the tolerance of 8"
    )
    assert limiter.sample_waits_for(15) == (
        "experience: a sample of 15 would exceed the samples due after 13 inserts by 9, more than the tolerance of 8"
    )
    assert limiter.insert_waits_for(1) is None
    assert limiter.sample_waits_for(14) is None


def test_asking_changes_nothing() -> None:
    limiter = RateLimiter(2.0, 10, 8.0, inserts=12, samples=3)
    limiter.insert_waits_for(100)
    limiter.sample_waits_for(100)
    assert (limiter.inserts, limiter.samples, limiter.due) == (12, 3, 1.0)


def test_inserts_are_free_below_the_minimum_size() -> None:
    limiter = RateLimiter.for_calls(1000.0, 10_000, largest_insert=1, largest_sample=1)
    for _ in range(10_000):
        assert insert(limiter, 1)
    assert insert(limiter, 1)
    assert not insert(limiter, 1)
    assert insert(RateLimiter(2.0, 10, 8.0), 1000)


def test_an_infinite_ratio_makes_nobody_wait_beyond_the_minimum_size() -> None:
    limiter = RateLimiter.for_calls(math.inf, 100, largest_insert=64, largest_sample=256)
    assert limiter.sample_waits_for(1) == "experience: 0 of the first 100 items inserted"
    assert insert(limiter, 100)
    for _ in range(100):
        assert sample(limiter, 10**9)
        assert limiter.due == 0.0
    for _ in range(100):
        assert insert(limiter, 10**9)
        assert limiter.due == 0.0


calls = st.builds(
    dict,
    samples_per_insert=st.one_of(st.floats(1e-3, 1e3), st.sampled_from([1 / 3, 0.1, 1.0, 8.0, math.inf])),
    minimum_size=st.integers(1, 200),
    largest_insert=st.integers(1, 300),
    largest_sample=st.integers(1, 600),
)


@settings(deadline=None)
@given(calls, st.randoms(use_true_random=False), st.floats(0.0, 1.0))
def test_no_sequence_of_calls_makes_inserts_and_samples_wait_at_once(
    sizes: dict[str, float], rng: random.Random, insert_share: float
) -> None:
    limiter = RateLimiter.for_calls(**sizes)  # type: ignore[arg-type]
    largest_insert, largest_sample = int(sizes["largest_insert"]), int(sizes["largest_sample"])
    for _ in range(150):
        if rng.random() < insert_share:
            insert(limiter, rng.randint(1, largest_insert))
        else:
            sample(limiter, rng.randint(1, largest_sample))
        refused_insert, refused_sample = (
            limiter.insert_waits_for(largest_insert) is not None,
            limiter.sample_waits_for(largest_sample) is not None,
        )
        assert not (refused_insert and refused_sample)
        if limiter.inserts >= limiter.minimum_size:
            rounding = 1e-9 * max(limiter.samples, limiter.tolerance)
            assert abs(limiter.due) <= limiter.tolerance + rounding
        else:
            assert not refused_insert


@given(calls)
def test_a_smaller_tolerance_could_deadlock(sizes: dict[str, float]) -> None:
    """With half of the least tolerance, the largest calls can deadlock."""
    limiter = RateLimiter.for_calls(**sizes)  # type: ignore[arg-type]
    ratio, largest_sample = limiter.samples_per_insert, int(sizes["largest_sample"])
    expected = float(largest_sample)
    if math.isfinite(ratio):
        expected = max(expected, ratio * sizes["largest_insert"])
    assert limiter.tolerance == expected
    limiter.tolerance *= 0.49
    limiter.record_insert(limiter.minimum_size)
    if not math.isfinite(ratio):
        assert limiter.sample_waits_for(largest_sample) is None
    elif largest_sample >= ratio * sizes["largest_insert"]:
        assert limiter.sample_waits_for(largest_sample) is not None
    else:
        assert limiter.insert_waits_for(int(sizes["largest_insert"])) is not None


@pytest.mark.parametrize("eager", ["workers", "learner", "neither"])
@pytest.mark.parametrize("ratio", [0.25, 1.0, 8.0, 33.3])
def test_the_ratio_converges_whoever_is_faster(ratio: float, eager: str) -> None:
    limiter = RateLimiter.for_calls(ratio, 500, largest_insert=64, largest_sample=256)
    rng = random.Random(0)
    insert_share = {"workers": 0.9, "learner": 0.1, "neither": 0.5}[eager]
    while limiter.counted_inserts * ratio < 100 * limiter.tolerance:
        if rng.random() < insert_share:
            insert(limiter, rng.randint(1, 64))
        else:
            sample(limiter, rng.choice([32, 256]))
        if limiter.inserts >= limiter.minimum_size:
            assert abs(limiter.due) <= limiter.tolerance
    assert limiter.samples / limiter.counted_inserts == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.nan])
def test_refuses_a_ratio_that_is_not_positive(ratio: float) -> None:
    with pytest.raises(ConfigurationError, match=f"samples_per_insert must be positive, got {ratio}"):
        RateLimiter(ratio, 1, 1.0)


@pytest.mark.parametrize("size", [0, -1])
def test_refuses_a_minimum_size_below_1(size: int) -> None:
    with pytest.raises(ConfigurationError, match=f"must be at least 1, got {size}"):
        RateLimiter(1.0, size, 1.0)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, math.nan])
def test_refuses_a_tolerance_that_is_not_positive(tolerance: float) -> None:
    with pytest.raises(ConfigurationError, match=f"tolerance must be positive, got {tolerance}"):
        RateLimiter(1.0, 1, tolerance)
