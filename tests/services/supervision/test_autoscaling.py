"""How many workers `--actors auto` wants, by hand numbers; and that the number settles, whatever it meets."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.supervision.autoscaling import FORGET_SECONDS, Autoscaler, Waits, decide


@pytest.mark.parametrize(
    ("actors", "learner", "workers", "wanted"),
    [
        (1, 0.9, 0.0, 2),
        (2, 0.9, 0.0, 3),
        (4, 0.9, 0.0, 6),
        (7, 0.9, 0.0, 8),  # no more than the most
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
    assert decide(actors, Waits(learner, workers), most=8) == wanted


def test_a_number_that_was_judged_is_not_gone_back_to() -> None:
    starving, idle = Waits(0.9, 0.0), Waits(0.0, 0.9)
    assert decide(4, starving, most=8, too_many=6) == 5
    assert decide(5, starving, most=8, too_many=6) == 5
    assert decide(8, idle, most=8, too_few=6) == 7
    assert decide(7, idle, most=8, too_few=6) == 7


def windows(size: Autoscaler, actors: int, learner: float, workers: float, begin: float) -> tuple[int, str] | None:
    """Let one window pass in which learner and workers waited for these parts of the time."""
    worker_pool = range(actors)
    assert size.look(begin, dict.fromkeys(worker_pool, begin), begin) is None
    return size.look(begin + 10 * learner, {who: begin + 10 * workers for who in worker_pool}, begin + 10.0)


def test_it_waits_for_a_whole_window_of_the_same_workers() -> None:
    size = Autoscaler(8)
    assert size.look(0.0, {0: 0.0}, 100.0) is None
    assert size.look(9.0, {0: 0.0}, 109.0) is None
    assert size.look(9.0, {0: 0.0, 1: 0.0}, 110.0) is None  # one is new
    assert size.look(17.0, {0: 0.0, 1: 0.0}, 119.0) is None
    assert size.look(1.0, {0: 0.0, 1: 0.0}, 121.0) is None  # the learner is new
    assert size.look(9.0, {0: 0.0, 1: 1.0}, 131.0) == (3, "the learner waited 80% of the time for experience")


def test_what_was_too_much_is_tried_again_after_a_while() -> None:
    size = Autoscaler(8)
    assert windows(size, 4, 0.0, 0.9, 0.0) == (3, "workers waited 90% of the time for the learner")
    assert windows(size, 3, 0.9, 0.0, 20.0) is None
    assert windows(size, 3, 0.9, 0.0, 20.0 + FORGET_SECONDS) == (4, "the learner waited 90% of the time for experience")


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40), st.integers(1, 40), st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=50))
def test_it_settles_within_bounds_whatever_happens(actors: int, most: int, happens: list[tuple[float, float]]) -> None:
    size, seen = Autoscaler(most), [actors]
    for n, (learner, workers) in enumerate(happens):
        better = windows(AutoSizeFrom(size), seen[-1], learner, workers, 11.0 * n)
        if better is not None:
            seen.append(better[0])
    assert all(1 <= number <= max(most, actors) for number in seen)
    # Within the time that it remembers for, no number is left twice in the same way.
    assert len(set(seen)) >= len(seen) - 1


class AutoSizeFrom(Autoscaler):
    """The same memory with a new window, as after a change of workers."""

    def __init__(self, other: Autoscaler) -> None:
        self.__dict__ = other.__dict__
        self._begun = None
