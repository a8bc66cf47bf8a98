"""Crew: a run's rollout workers, as many as are wanted; they join and leave while the run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from services.processes import Process

LEAVE_SECONDS = 10.0
STARTS_AT_ONCE = 4
_SECONDS_TO_SEND = LEAVE_SECONDS - 2.0
"""The rest is for giving back what was held, and for the way."""


@dataclass
class _Leaving:
    process: Process
    deadline: float


class Crew:
    """Workers by index. An index that comes free is used again, by another incarnation, whose seeds are new."""

    def __init__(self, start: Callable[[int, int, int], Any], *, first_incarnation: int) -> None:
        """Begin with nobody.

        Args:
            start: takes an index, an incarnation and how many workers there shall be, and returns an actor's handle.
            first_incarnation: number of every index's first incarnation.
        """
        self._start, self._first_incarnation = start, first_incarnation
        self._wanted = 0
        self._used: dict[int, int] = {}
        self._leaving: list[_Leaving] = []
        self.workers: list[Process] = []
        self.joining: list[Process] = []
        """Those of the workers who are yet to be started."""

    @property
    def leaving(self) -> list[Process]:
        """Those who were told to leave and have not left yet."""
        return [leaving.process for leaving in self._leaving]

    def scale(self, wanted: int) -> None:
        """Have `wanted` workers; `start_some` starts those who join.

        Who leaves sends what it has first, as long as there is time; the newest leave.
        """
        self._wanted = wanted
        joining = [self._new(index) for index in self._free_indices(wanted - len(self.workers))]
        self.workers += joining
        self.joining += joining
        for process in [self.workers.pop() for _ in range(len(self.workers) - wanted)]:
            if process in self.joining:
                self.joining.remove(process)
                continue
            self._used[process.index] = process.incarnation
            if process.handle is not None:
                process.handle.stop.remote(_SECONDS_TO_SEND)
            self._leaving.append(_Leaving(process, time.monotonic() + LEAVE_SECONDS))
        for rank, process in enumerate(sorted(self.workers, key=lambda process: process.index)):
            if process.handle is not None:
                process.handle.place.remote(rank, wanted)

    def start_some(self, most: int) -> None:
        """Start a few of those who are to join, so that at most `most` workers are busy with their start."""
        starting = sum(
            worker.report is None and not worker.pending for worker in self.workers if worker.handle is not None
        )
        for _ in range(min(STARTS_AT_ONCE, most - starting, len(self.joining))):
            self.joining.pop(0).start()

    def _rank(self, index: int) -> int:
        """Return an index's place among those there are: while others leave there are gaps."""
        return sum(process.index < index for process in self.workers)

    def _start_in_place(self, index: int, incarnation: int) -> Any:
        handle = self._start(index, incarnation, self._wanted)
        handle.place.remote(self._rank(index), self._wanted)
        return handle

    def _free_indices(self, count: int) -> Iterator[int]:
        # Not an index whose last holder is still leaving: a server that hears of the new incarnation takes what the
        # old one sends for a repeat.
        taken = {process.index for process in [*self.workers, *self.leaving]}
        index = 0
        for _ in range(count):
            while index in taken:
                index += 1
            yield index
            index += 1

    def _new(self, index: int) -> Process:
        return Process(
            "worker",
            index,
            lambda incarnation: self._start_in_place(index, incarnation),
            run=lambda handle: handle.run.remote(),
            numbered=True,
            first_incarnation=self._used.get(index, self._first_incarnation - 1) + 1,
            is_at_work=lambda _, now: now.pushes > 0,
        )

    def see_off(self) -> list[tuple[Process, str]]:
        """Let go of those who have left, and of those who took too long; return each with a word about it."""
        gone = []
        for leaving in list(self._leaving):
            process = leaving.process
            death = process.poll()
            late = time.monotonic() > leaving.deadline
            if process.done:
                word = _farewell(process.result)
            elif death is not None:
                word = f"died while it left: {death.line}"
            elif late or process.handle is None:
                word = f"was ended: it did not leave within {LEAVE_SECONDS:.0f} s"
            else:
                continue
            process.kill()
            self._leaving.remove(leaving)
            gone.append((process, word))
        return gone


def _farewell(report: Any) -> str:
    if not report.steps_unsent:
        return f"left, with everything sent: {report.steps_sent:,} steps"
    return f"left, with {report.steps_sent:,} steps sent; {report.steps_unsent:,} steps were not taken"
