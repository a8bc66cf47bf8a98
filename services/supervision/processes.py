"""Supervision of one process: a Ray actor that is started, polled for reports, and recreated after an exit."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterable
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
MAX_PAUSE_SECONDS = 60.0


@dataclass(frozen=True)
class ProcessExit:
    """The reason why a process exited.

    Attributes:
        line: the reason in one line, for people.
        details: the full text, such as a traceback; empty if there is none.
    """

    line: str
    details: str = ""


def describe_exit(error: BaseException) -> ProcessExit:
    """Return the reason for an exit from the error that Ray raised."""
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
        # Ray puts a sentence and some fields before the reason. On a busy machine the reason may be missing.
        headers = (ActorDiedError.BASE_ERROR_MSG, "\t")
        reason = "\n".join(line for line in text.splitlines() if not line.startswith(headers))
        reason = reason.rpartition("Worker exit detail: ")[2].strip()
        if not reason or "connection error code" in reason:
            return ProcessExit("the process ended abruptly (killed, or crashed in native code)", text)
        return ProcessExit(reason.splitlines()[0], text)
    return ProcessExit(f"{type(error).__name__}: {_first_line(error)}", text)


def name_is_taken(error: ValueError) -> bool:
    """Return whether Ray refused an actor's name because another actor has it; only Ray's text shows this."""
    return "already" in str(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


class Process:
    """One supervised process. `poll` is cheap and never blocks."""

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
        made_progress: Callable[[Any, Any], bool] = lambda first, now: True,
    ) -> None:
        """Describe the process; `start` starts it.

        Args:
            role: the process's role, such as `"worker"`.
            index: the process's number within its role.
            start: takes an incarnation and returns the actor's handle.
            run: calls the actor's loop and returns the reference to its result; None if the actor has no loop.
            first_incarnation: number of the first incarnation.
            report_method: name of the actor's method that returns its report.
            numbered: whether the run may have several processes of this role.
            made_progress: takes an incarnation's first report and a later one, and returns whether the incarnation
                has done any work.
        """
        self.role, self.index = role, index
        self._start, self._run = start, run
        self._report_method, self._made_progress = report_method, made_progress
        self._numbered = numbered
        self.pending: str | None = None
        self.incarnation = first_incarnation - 1
        self.restarts = 0
        self.handle: Any = None
        self.report: Any = None
        self.result: Any = None
        self.done = False
        self.last_exit: ProcessExit | None = None
        self._reporting: Any = None
        self._running: Any = None
        self._first_report: Any = None
        self._requested_at = self._launched_at = 0.0
        self._launch_at = self._report_deadline = 0.0
        self._launching = False
        self._failed_starts = 0

    @property
    def name(self) -> str:
        """The role, with the index if the role is numbered: `learner`, `worker-0`."""
        return f"{self.role}-{self.index}" if self._numbered else self.role

    @property
    def state(self) -> str:
        """The state: `starting`, `pending` (the cluster lacks resources for it), `running`, or `done`."""
        if self.done or self.report is not None:
            return "done" if self.done else "running"
        return "pending" if self.pending else "starting"

    def check_resources(self, shortage: Callable[[], str | None]) -> None:
        """Mark the process as pending if it has not started for a while because the cluster lacks resources.

        Args:
            shortage: returns which resources are missing, or None if there are enough.
        """
        now = time.monotonic()
        late = self.handle is not None and now - self._launched_at > PENDING_SECONDS
        self.pending = shortage() if late and self.report is None and not self.done else None
        if self.pending is not None:
            self._report_deadline = now + START_SECONDS  # the deadline counts from when the resources are free

    def start(self, pause: float = 0.0) -> None:
        """Start the next incarnation after `pause` seconds, and its loop if it has one."""
        self.incarnation += 1
        self.report = self._first_report = self._reporting = self.pending = None
        self._launch_at = time.monotonic() + pause
        self._report_deadline = self._launch_at + START_SECONDS
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
        """Receive a report or the loop's result if one has arrived; return why the process exited, if it did."""
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
                self._receive_report(ray.get(self._reporting))
        except (RayError, GetTimeoutError) as error:
            return self._handle_exit(describe_exit(error))
        if self.report is None:
            if self.pending is None and now > self._report_deadline:
                return self._handle_exit(ProcessExit(f"sent no report within {START_SECONDS:.0f} s of its start"))
        elif self._reporting is not None and now - self._requested_at > SILENCE_SECONDS:
            return self._handle_exit(ProcessExit(f"sent no report for {SILENCE_SECONDS:.0f} s"))
        return None

    def _receive_report(self, report: Any) -> None:
        self.report, self._reporting = report, None
        if self._first_report is None:
            self._first_report = report
        elif self._made_progress(self._first_report, report):
            self._failed_starts = 0

    def request_report(self, *, fresh: bool = False) -> None:
        """Request a report, unless a request is pending.

        Args:
            fresh: whether to drop a pending request and send a new one, because the pending report may be outdated.
        """
        if self.handle is not None and (fresh or self._reporting is None) and not self.done:
            self._reporting = getattr(self.handle, self._report_method).remote()
            self._requested_at = time.monotonic()

    def _handle_exit(self, reason: ProcessExit) -> ProcessExit:
        self.kill()
        self.last_exit = reason
        self._failed_starts += 1
        return reason

    def restart(self, *, optional: bool = False) -> float:
        """Start the next incarnation after an exit; return the seconds until it starts.

        Args:
            optional: whether the run can do without the process. Restarts of an optional process never end the run;
                the pauses between them grow to `MAX_PAUSE_SECONDS`.

        Raises:
            CrashLoop: the process exited `MAX_FAILED_STARTS` times in a row before it did any work.
        """
        if self._failed_starts >= MAX_FAILED_STARTS and not optional:
            assert self.last_exit is not None
            raise CrashLoop(
                f"{self.name} died {self._failed_starts} times in a row before it did any work, "
                f"last: {self.last_exit.line}"
            )
        self.restarts += 1
        failed_restarts = self._failed_starts - 1
        pause = min(2.0**failed_restarts, MAX_PAUSE_SECONDS) if optional and failed_restarts > 0 else 0.0
        self.start(pause)
        return pause

    def kill(self) -> None:
        """Kill the process, if it is running."""
        if self.handle is not None:
            ray.kill(self.handle)
        self.handle = self._running = self._reporting = None
        self._launching = False

    def pid(self) -> int | None:
        """Return the process id from the last report."""
        report = self.report
        pid = report.get("pid") if isinstance(report, dict) else getattr(report, "pid", None)
        return None if pid is None else int(pid)

    def describe(self, *, ended: bool = False) -> dict[str, Any]:
        """Return the process's entry in `squall status`, as plain JSON values.

        Args:
            ended: whether the run has ended.
        """
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
            "last_word": self.pending or getattr(report, "status_message", ""),
            "last_death": None if self.last_exit is None else self.last_exit.line,
        }


def describe_this_process(role: str, state: str, incarnation: int) -> dict[str, Any]:
    """Return the calling process's own entry in `squall status`, with the same keys as `Process.describe`."""
    return {
        "name": role,
        "role": role,
        "index": 0,
        "node": socket.gethostname(),
        "pid": os.getpid(),
        "state": state,
        "incarnation": incarnation,
        "restarts": 0,
        "steps_sent": None,
        "last_word": "",
        "last_death": None,
    }


def waiting_reasons(processes: Iterable[Process]) -> dict[str, str]:
    """Return what each waiting process waits for, by the process's name."""
    reasons = {process.name: getattr(process.report, "waiting_for", None) for process in processes if not process.done}
    return {name: reason for name, reason in reasons.items() if reason}
