"""Supervised processes: a Ray actor that may die, the loop it runs, what it reports, how often it was recreated."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, OutOfMemoryError, RayError, RayTaskError

from replay.remote import is_ready
from services.errors import CrashLoop

MAX_FAILED_STARTS = 5
_ANSI_COLORS = re.compile(r"\x1b\[[0-9;]*m")
START_SECONDS = 180.0
SILENCE_SECONDS = 60.0
PENDING_SECONDS = 5.0
LONGEST_PAUSE = 60.0


@dataclass(frozen=True)
class ProcessExit:
    """Why a process is gone: a line for people, and the whole story where there is one."""

    line: str
    details: str = ""


def describe_exit(error: BaseException) -> ProcessExit:
    """Say why a process is gone, in one line."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return ProcessExit(f"{type(cause).__name__}: {_first_line(cause)}", _ANSI_COLORS.sub("", str(error)))
    text = str(error)
    for mark in ("because of an error raised in its creation task,", "The actor died because of an error"):
        if mark in text:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            return ProcessExit(f"failed to start: {lines[-1]}", text)
    if isinstance(error, OutOfMemoryError) or "due to the node running low on memory" in text:
        return ProcessExit("killed for lack of memory", text)
    if isinstance(error, ActorDiedError):
        # Ray heads its reason with a sentence and fields; on a busy machine it gives up before it has the reason.
        heads = (ActorDiedError.BASE_ERROR_MSG, "\t")
        reason = "\n".join(line for line in text.splitlines() if not line.startswith(heads))
        reason = reason.rpartition("Worker exit detail: ")[2].strip()
        if not reason or "connection error code" in reason:
            return ProcessExit("the process ended abruptly (killed, or crashed in native code)", text)
        return ProcessExit(reason.splitlines()[0], text)
    return ProcessExit(f"{type(error).__name__}: {_first_line(error)}", text)


def name_is_taken(error: ValueError) -> bool:
    """Return whether Ray refused an actor's name because another actor still has it; only Ray's text tells."""
    return "already" in str(error)


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
        report_method: str = "report",
        numbered: bool = False,
        is_at_work: Callable[[Any, Any], bool] = lambda first, now: True,
    ) -> None:
        """Describe the process; `start` brings it up.

        Args:
            role: such as `"worker"`.
            index: which of that role.
            start: takes an incarnation and returns the actor's handle.
            run: calls the actor's loop and returns the reference to its result; None if it has none.
            first_incarnation: number of the first incarnation.
            report_method: the actor's method that says how it goes.
            numbered: whether there may be several of this role.
            is_at_work: takes an incarnation's first report and a later one, and says whether it got to work.
        """
        self.role, self.index = role, index
        self._start, self._run = start, run
        self._report_method, self._is_at_work = report_method, is_at_work
        self._numbered = numbered
        self.pending: str | None = None
        self.incarnation = first_incarnation - 1
        self.restarts = 0
        self.handle: Any = None
        self.report: Any = None
        self.result: Any = None
        self.done = False
        self.last_death: ProcessExit | None = None
        self._reporting: Any = None
        self._running: Any = None
        self._first_report: Any = None
        self._asked_at = self._launched_at = 0.0
        self._launch_at = self._answer_by = 0.0
        self._launching = False
        self._fruitless_deaths = 0

    @property
    def name(self) -> str:
        """Such as `worker-0`; the index is left out where there is only one."""
        return f"{self.role}-{self.index}" if self._numbered else self.role

    @property
    def state(self) -> str:
        """`starting`, `pending` for want of room, `running`, or `done`."""
        if self.done or self.report is not None:
            return "done" if self.done else "running"
        return "pending" if self.pending else "starting"

    def seek_room(self, no_room: Callable[[], str | None]) -> None:
        """Take note of why this process cannot start, if it has not for a while; `no_room` says so."""
        now = time.monotonic()
        late = self.handle is not None and now - self._launched_at > PENDING_SECONDS
        self.pending = no_room() if late and self.report is None and not self.done else None
        if self.pending is not None:
            self._answer_by = now + START_SECONDS  # it begins to start when there is room

    def start(self, pause: float = 0.0) -> None:
        """Start the next incarnation, after a pause if that is given, and its loop if it has one."""
        self.incarnation += 1
        self.report = self._first_report = self._reporting = self.pending = None
        self._launch_at = time.monotonic() + pause
        self._answer_by = self._launch_at + START_SECONDS
        self._launching = True
        if not pause:
            self._launch()

    def _launch(self) -> None:
        try:
            self.handle = self._start(self.incarnation)
        except ValueError as error:
            # Ray keeps the name of an actor that is being killed for about a second; `poll` tries again.
            if not name_is_taken(error):
                raise
            return
        self._launching = False
        self._launched_at = time.monotonic()
        if self._run is not None:
            self._running = self._run(self.handle)

    def poll(self) -> ProcessExit | None:
        """Take in a report or the loop's result; return why the process is gone, if it is."""
        now = time.monotonic()
        if self._launching and now >= self._launch_at:
            self._launch()
        if self.done or not (self._launching or self.handle is not None):
            return None
        try:
            if self._running is not None and is_ready(self._running):
                self.result = self.report = ray.get(self._running)
                self.done = True
                return None
            if self._reporting is not None and is_ready(self._reporting):
                self._take(ray.get(self._reporting))
        except (RayError, GetTimeoutError) as error:
            return self._handle_exit(describe_exit(error))
        if self.report is None:
            if self.pending is None and now > self._answer_by:
                return self._handle_exit(ProcessExit(f"gave no first answer within {START_SECONDS:.0f} s"))
        elif self._reporting is not None and now - self._asked_at > SILENCE_SECONDS:
            return self._handle_exit(ProcessExit(f"gave no answer for {SILENCE_SECONDS:.0f} s"))
        return None

    def _take(self, report: Any) -> None:
        self.report, self._reporting = report, None
        if self._first_report is None:
            self._first_report = report
        elif self._is_at_work(self._first_report, report):
            self._fruitless_deaths = 0

    def ask_for_report(self, *, anew: bool = False) -> None:
        """Ask for a report unless one is on its way; `anew` asks in any case, and forgets what is on its way."""
        if self.handle is not None and (anew or self._reporting is None) and not self.done:
            self._reporting = getattr(self.handle, self._report_method).remote()
            self._asked_at = time.monotonic()

    def _handle_exit(self, death: ProcessExit) -> ProcessExit:
        self.kill()
        self.last_death = death
        self._fruitless_deaths += 1
        return death

    def restart(self, *, dispensable: bool = False) -> float:
        """Start again after a death; return the seconds until then.

        Args:
            dispensable: whether others can do without it: it is tried for ever, after longer and longer pauses.

        Raises:
            CrashLoop: it died too often in a row before it got to work.
        """
        if self._fruitless_deaths >= MAX_FAILED_STARTS and not dispensable:
            assert self.last_death is not None
            raise CrashLoop(
                f"{self.name} died {self._fruitless_deaths} times in a row before it got to work, "
                f"last: {self.last_death.line}"
            )
        self.restarts += 1
        again = self._fruitless_deaths - 1
        pause = min(2.0**again, LONGEST_PAUSE) if dispensable and again > 0 else 0.0
        self.start(pause)
        return pause

    def kill(self) -> None:
        """End the process at once, if it is there."""
        if self.handle is not None:
            ray.kill(self.handle)
        self.handle = self._running = self._reporting = None
        self._launching = False

    def pid(self) -> int | None:
        """Return the pid that the last report told."""
        report = self.report
        pid = report.get("pid") if isinstance(report, dict) else getattr(report, "pid", None)
        return None if pid is None else int(pid)

    def describe(self, *, ended: bool = False) -> dict[str, Any]:
        """Return what `squall status` shows, as plain JSON values; `ended` says that the run is over."""
        report = self.report
        state = getattr(report, "state", None) or self.state
        return {
            "name": self.name,
            "role": self.role,
            "index": self.index,
            "node": report.get("node", "") if isinstance(report, dict) else getattr(report, "node", ""),
            "pid": self.pid(),
            "state": "ended" if ended else "done" if self.done else state,
            "incarnation": self.incarnation,
            "restarts": self.restarts,
            "steps_sent": getattr(report, "steps_sent", None),
            "last_word": self.pending or getattr(report, "last_word", ""),
            "last_death": None if self.last_death is None else self.last_death.line,
        }
