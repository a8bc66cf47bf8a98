"""Supervised processes: a Ray actor that may die, the loop it runs, what it reports, how often it was recreated."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from replay.remote import is_ready
from replay.types import SquallError

MOST_DEATHS = 5
WITHIN_SECONDS = 60.0


class CrashLoop(SquallError):
    """A process that dies again and again; the text carries the last reason."""


@dataclass(frozen=True)
class Death:
    """Why a process is gone: a line for people, and the whole story where there is one."""

    line: str
    details: str = ""


def describe_death(error: BaseException) -> Death:
    """Say why a process is gone, in one line."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return Death(f"{type(cause).__name__}: {_first_line(cause)}", str(error))
    text = str(error)
    for mark in ("because of an error raised in its creation task,", "The actor died because of an error"):
        if mark in text:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            return Death(f"failed to start: {lines[-1]}", text)
    if "OOM" in text or "out of memory" in text.lower():
        return Death("killed for lack of memory", text)
    if "SIGKILL" in text or "connection error code 2" in text or "End of file" in text:
        return Death("the process ended abruptly (killed, or crashed in native code)", text)
    return Death(f"{type(error).__name__}: {_first_line(error)}", text)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


class Process:
    """One supervised process. `poll` is cheap and never waits."""

    def __init__(
        self,
        role: str,
        index: int,
        start: Callable[[int], Any],
        *,
        run: Callable[[Any], Any] | None = None,
        first_incarnation: int = 0,
    ) -> None:
        """Describe the process; `start` brings it up.

        Args:
            role: such as `"worker"`.
            index: which of that role.
            start: takes an incarnation and returns the actor's handle.
            run: calls the actor's loop and returns the reference to its result; None if it has none.
            first_incarnation: number of the first incarnation.
        """
        self.role, self.index = role, index
        self._start, self._run = start, run
        self.incarnation = first_incarnation - 1
        self.restarts = 0
        self.handle: Any = None
        self.report: Any = None
        self.result: Any = None
        self.done = False
        self.last_death: Death | None = None
        self._reporting: Any = None
        self._running: Any = None
        self._deaths: deque[float] = deque(maxlen=MOST_DEATHS)

    @property
    def name(self) -> str:
        """Such as `worker-0`; the index is left out where there is only one."""
        return f"{self.role}-{self.index}" if self.role == "worker" else self.role

    @property
    def state(self) -> str:
        """`starting`, `running`, or `done`."""
        return "done" if self.done else "running" if self.report is not None else "starting"

    def start(self) -> None:
        """Start the next incarnation, and its loop if it has one."""
        self.incarnation += 1
        self.report = self._reporting = None
        self.handle = self._start(self.incarnation)
        if self._run is not None:
            self._running = self._run(self.handle)

    def poll(self) -> Death | None:
        """Take in a report or the loop's result; return why the process is gone, if it is."""
        if self.handle is None or self.done:
            return None
        try:
            if self._running is not None and is_ready(self._running):
                self.result = ray.get(self._running)
                self.done = True
                return None
            if self._reporting is not None and is_ready(self._reporting):
                self.report, self._reporting = ray.get(self._reporting), None
        except (RayError, GetTimeoutError) as error:
            return self._bury(describe_death(error))
        return None

    def ask_for_report(self) -> None:
        """Ask for a report unless one is on its way."""
        if self.handle is not None and self._reporting is None and not self.done:
            self._reporting = self._call(self.report_method)

    report_method = "report"

    def _call(self, method: str) -> Any:
        return getattr(self.handle, method).remote()

    def _bury(self, death: Death) -> Death:
        self.kill()
        self.last_death = death
        self._deaths.append(time.monotonic())
        return death

    def restart(self) -> None:
        """Start again after a death.

        Raises:
            CrashLoop: it died too often in a short time.
        """
        if len(self._deaths) == MOST_DEATHS and self._deaths[-1] - self._deaths[0] < WITHIN_SECONDS:
            assert self.last_death is not None
            raise CrashLoop(
                f"{self.name} died {MOST_DEATHS} times within {WITHIN_SECONDS:.0f} s, last: {self.last_death.line}"
            )
        self.restarts += 1
        self.start()

    def kill(self) -> None:
        """End the process at once, if it is there."""
        if self.handle is not None:
            ray.kill(self.handle)
        self.handle = self._running = self._reporting = None

    def pid(self) -> int | None:
        """Return the pid that the last report told."""
        report = self.report
        pid = report.get("pid") if isinstance(report, dict) else getattr(report, "pid", None)
        return None if pid is None else int(pid)
