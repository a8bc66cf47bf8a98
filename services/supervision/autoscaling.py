"""Sizing: how many rollout workers `--actors auto` wants, from who waited for whom.

A number of workers is judged once: one that was too small is not gone back to, one that was too large neither,
until that is long ago. So the number settles and cannot flap.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WINDOW_SECONDS = 10.0
FORGET_SECONDS = 600.0
LEARNER_STARVES = 0.2
LEARNER_IS_FED = 0.05
WORKERS_ARE_BUSY = 0.2
WORKERS_IDLE = 0.6


@dataclass(frozen=True)
class Waits:
    """Which part of a span of time the learner waited for experience, and workers, on average, for the learner."""

    learner: float
    workers: float


def decide(actors: int, waits: Waits, *, most: int, too_few: int = 0, too_many: int | None = None) -> int:
    """Return how many workers there shall be.

    Args:
        actors: how many there are.
        waits: who waited for whom.
        most: how many there may be.
        too_few: a number that was not enough.
        too_many: a number that was too much.
    """
    least = too_few + 1
    most = most if too_many is None else min(most, too_many - 1)
    if waits.learner > LEARNER_STARVES and waits.workers < WORKERS_ARE_BUSY and actors < most:
        return min(actors + max(1, actors // 2), most)
    if waits.workers > WORKERS_IDLE and waits.learner < LEARNER_IS_FED and actors > max(least, 1):
        return max(actors - max(1, actors // 4), least, 1)
    return actors


class Autoscaler:
    """Measures windows of time between changes, and remembers what was too few and too many."""

    def __init__(self, most: int) -> None:
        """Begin with no experience.

        Args:
            most: how many workers there may be.
        """
        self.most = most
        self._few: tuple[int, float] = (0, 0.0)
        self._many: tuple[int | None, float] = (None, 0.0)
        self._begun: tuple[float, float, dict[Any, float]] | None = None

    def look(self, learner: float, workers: Mapping[Any, float], now: float | None = None) -> tuple[int, str] | None:
        """Return a better number of workers and the reason, or None to leave it.

        Args:
            learner: seconds that the learner has waited for experience, so far.
            workers: seconds that each worker has waited for the learner so far, by incarnation.
            now: the moment, in seconds that only grow.
        """
        now = time.monotonic() if now is None else now
        before, self._begun = self._begun, self._begun or (now, learner, dict(workers))
        if before is None:
            return None
        begun, learner_before, workers_before = before
        if learner < learner_before or workers.keys() != workers_before.keys():
            self._begun = (now, learner, dict(workers))  # somebody is new: measure those there are now
            return None
        span = now - begun
        if span < WINDOW_SECONDS or not workers:
            return None
        self._begun = (now, learner, dict(workers))
        waited = sum(seconds - workers_before[who] for who, seconds in workers.items()) / len(workers)
        return self._judge(len(workers), Waits((learner - learner_before) / span, waited / span), now)

    def _judge(self, actors: int, waits: Waits, now: float) -> tuple[int, str] | None:
        few, many = self._few, self._many
        wanted = decide(
            actors,
            waits,
            most=self.most,
            too_few=few[0] if now - few[1] < FORGET_SECONDS else 0,
            too_many=many[0] if now - many[1] < FORGET_SECONDS else None,
        )
        if wanted == actors:
            return None
        if wanted > actors:
            self._few = actors, now
            return wanted, f"the learner waited {waits.learner:.0%} of the time for experience"
        self._many = actors, now
        return wanted, f"workers waited {waits.workers:.0%} of the time for the learner"
