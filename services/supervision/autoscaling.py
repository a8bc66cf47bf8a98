"""Autoscaling for `--actors auto`: the waiting times of workers and learner determine the number of rollout workers.

A number of workers that was too small or too large is remembered for `FORGET_SECONDS`, and is not tried again during
this time. Therefore the number converges instead of oscillating.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WINDOW_SECONDS = 10.0
FORGET_SECONDS = 600.0
LEARNER_STARVED = 0.2
LEARNER_FED = 0.05
WORKERS_BUSY = 0.2
WORKERS_IDLE = 0.6


@dataclass(frozen=True)
class WaitFractions:
    """Waiting times in a window, as fractions of its length.

    Attributes:
        learner: how long the learner waited for experience.
        workers: how long workers waited for the learner, on average.
    """

    learner: float
    workers: float


def decide(actors: int, waits: WaitFractions, *, maximum: int, too_few: int = 0, too_many: int | None = None) -> int:
    """Return the number of workers that the run should have.

    Args:
        actors: current number of workers.
        waits: how long learner and workers waited.
        maximum: the largest number allowed.
        too_few: a number that was too small; 0 if none is known.
        too_many: a number that was too large; None if none is known.
    """
    minimum = too_few + 1
    maximum = maximum if too_many is None else min(maximum, too_many - 1)
    if waits.learner > LEARNER_STARVED and waits.workers < WORKERS_BUSY and actors < maximum:
        return min(actors + max(1, actors // 2), maximum)
    if waits.workers > WORKERS_IDLE and waits.learner < LEARNER_FED and actors > max(minimum, 1):
        return max(actors - max(1, actors // 4), minimum, 1)
    return actors


class Autoscaler:
    """Measures waiting times over windows, and remembers which numbers of workers were too small or too large."""

    def __init__(self, maximum: int) -> None:
        """Create an autoscaler without any measurement.

        Args:
            maximum: the largest number of workers allowed.
        """
        self.maximum = maximum
        # A number of workers that was too small or too large, and the time when this was measured.
        self._too_few: tuple[int, float] = (0, 0.0)
        self._too_many: tuple[int | None, float] = (None, 0.0)
        self._window: tuple[float, float, dict[Any, float]] | None = None

    def update(self, learner: float, workers: Mapping[Any, float], now: float | None = None) -> tuple[int, str] | None:
        """Return a better number of workers with the reason, or None to keep the current number.

        Args:
            learner: total seconds that the learner has waited for experience.
            workers: total seconds that each worker has waited for the learner, by worker incarnation.
            now: current time in seconds, monotonic; None reads the clock.
        """
        now = time.monotonic() if now is None else now
        window, self._window = self._window, self._window or (now, learner, dict(workers))
        if window is None:
            return None
        started, learner_before, workers_before = window
        if learner < learner_before or workers.keys() != workers_before.keys():
            self._window = (now, learner, dict(workers))  # a process was added or recreated: start a new window
            return None
        seconds = now - started
        if seconds < WINDOW_SECONDS or not workers:
            return None
        self._window = (now, learner, dict(workers))
        waited = sum(total - workers_before[worker] for worker, total in workers.items()) / len(workers)
        return self._judge(len(workers), WaitFractions((learner - learner_before) / seconds, waited / seconds), now)

    def _judge(self, actors: int, waits: WaitFractions, now: float) -> tuple[int, str] | None:
        too_few, too_many = self._too_few, self._too_many
        wanted = decide(
            actors,
            waits,
            maximum=self.maximum,
            too_few=too_few[0] if now - too_few[1] < FORGET_SECONDS else 0,
            too_many=too_many[0] if now - too_many[1] < FORGET_SECONDS else None,
        )
        if wanted == actors:
            return None
        if wanted > actors:
            self._too_few = actors, now
            return wanted, f"the learner waited {waits.learner:.0%} of the time for experience"
        self._too_many = actors, now
        return wanted, f"workers waited {waits.workers:.0%} of the time for the learner"
