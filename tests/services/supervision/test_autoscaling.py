"""Autoscaling: decisions for hand-picked waiting times, and convergence for arbitrary ones."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.supervision.autoscaling import FORGET_SECONDS, Autoscaler, WaitFractions, decide


@pytest.mark.parametrize(
    ("actors", "learner", "workers", "wanted"),
    [
        (1, 0.9, 0.0, 2),
        (2, 0.9, 0.0, 3),
        (4, 0.9, 0.0, 6),
        (7, 0.9, 0.0, 8),  # at most the maximum
        (8, 0.9, 0.0, 8),
        (4, 0.2, 0.0, 4),  # the learner hardly waits
        (4, 0.9, 0.3, 4),  # both wait: more workers would not help
        (4, 0.0, 0.9, 3),
        (8, 0.0, 0.9, 6),
        (1, 0.0, 0.9, 1),
        (4, 0.0, 0.5, 4),  # workers do not wait most of the time
        (4, 0.1, 0.9, 4),
    ],
)
def test_the_number_follows_from_who_waits(actors: int, learner: float, workers: float, wanted: int) -> None:
    assert decide(actors, WaitFractions(learner, workers), maximum=8) == wanted


def test_a_number_that_was_judged_is_not_gone_back_to() -> None:
    starving, idle = WaitFractions(0.9, 0.0), WaitFractions(0.0, 0.9)
    assert decide(4, starving, maximum=8, too_many=6) == 5
    assert decide(5, starving, maximum=8, too_many=6) == 5
    assert decide(8, idle, maximum=8, too_few=6) == 7
    assert decide(7, idle, maximum=8, too_few=6) == 7


def one_window(scaler: Autoscaler, actors: int, learner: float, workers: float, start: float) -> tuple[int, str] | None:
    """Pass one window in which learner and workers wait for these fractions of the time; return the decision."""
    indices = range(actors)
    assert scaler.update(start, dict.fromkeys(indices, start), start) is None
    return scaler.update(start + 10 * learner, {worker: start + 10 * workers for worker in indices}, start + 10.0)


def test_it_waits_for_a_whole_window_of_the_same_workers() -> None:
    scaler = Autoscaler(8)
    assert scaler.update(0.0, {0: 0.0}, 100.0) is None
    assert scaler.update(9.0, {0: 0.0}, 109.0) is None
    assert scaler.update(9.0, {0: 0.0, 1: 0.0}, 110.0) is None  # a worker was added
    assert scaler.update(17.0, {0: 0.0, 1: 0.0}, 119.0) is None
    assert scaler.update(1.0, {0: 0.0, 1: 0.0}, 121.0) is None  # the learner was recreated
    assert scaler.update(9.0, {0: 0.0, 1: 1.0}, 131.0) == (3, "the learner waited 80% of the time for experience")


def test_what_was_too_much_is_tried_again_after_a_while() -> None:
    scaler = Autoscaler(8)
    assert one_window(scaler, 4, 0.0, 0.9, 0.0) == (3, "workers waited 90% of the time for the learner")
    assert one_window(scaler, 3, 0.9, 0.0, 20.0) is None
    assert one_window(scaler, 3, 0.9, 0.0, 20.0 + FORGET_SECONDS) == (
        4,
        "the learner waited 90% of the time for experience",
    )


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40), st.integers(1, 40), st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=50))
def test_it_settles_within_bounds_whatever_happens(
    actors: int, maximum: int, fractions: list[tuple[float, float]]
) -> None:
    scaler, numbers = Autoscaler(maximum), [actors]
    for n, (learner, workers) in enumerate(fractions):
        change = one_window(WithNewWindow(scaler), numbers[-1], learner, workers, 11.0 * n)
        if change is not None:
            numbers.append(change[0])
    assert all(1 <= number <= max(maximum, actors) for number in numbers)
    # Until judgments are forgotten, no number is tried again except possibly the last one.
    assert len(set(numbers)) >= len(numbers) - 1


class WithNewWindow(Autoscaler):
    """An autoscaler that shares another one's judgments but has no window, as after a change of workers."""

    def __init__(self, other: Autoscaler) -> None:
        self.__dict__ = other.__dict__
        self._begun = None
