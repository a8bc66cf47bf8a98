"""Supervised processes, with real Ray actors: exits, missing reports, taken names, and crash loops."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError

from replay.remote import NAMESPACE, actor_class
from services.errors import CrashLoop
from services.supervision import processes
from services.supervision.processes import Process, ProcessExit, describe_exit

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


class Odd:
    """An actor that reports, stops reporting, or fails in its loop, on request."""

    def __init__(self, silent: bool = False, broken: bool = False) -> None:
        if broken:
            raise OSError("no such device")
        self._silent = silent
        self._grown = 0

    def report(self) -> dict[str, int]:
        if self._silent:
            time.sleep(60.0)
        return {"pid": os.getpid(), "grown": self._grown}

    def grow(self) -> None:
        self._grown += 1

    def fall_silent(self) -> None:
        self._silent = True

    def run(self, fails: bool) -> str:
        if fails:
            raise ValueError("the loop met 7 where 6 was right")
        return "done"

    def leave(self, code: int) -> None:
        sys.exit(code)


OddActor = actor_class(Odd, max_concurrency=2)


@pytest.fixture
def started() -> Iterator[list[Process]]:
    kept: list[Process] = []
    yield kept
    for process in kept:
        process.kill()


def start(kept: list[Process], **options: Any) -> Process:
    made = options.pop("start", lambda incarnation: OddActor.remote())
    process = Process("odd", 0, made, **options)
    kept.append(process)
    process.start()
    return process


def poll_until(process: Process, done: Any, seconds: float = 40.0) -> ProcessExit | None:
    """Request reports and poll, as the coordinator does, until `done()` or an exit."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        process.request_report()
        reason = process.poll()
        if reason is not None or done():
            return reason
        time.sleep(0.05)
    raise AssertionError("nothing happened")


def test_a_killed_process_is_noticed_and_comes_back_as_another_incarnation(started: list[Process]) -> None:
    process = start(started, first_incarnation=1_000)
    assert process.state == "starting"
    poll_until(process, lambda: process.report is not None)
    pid = process.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    reason = poll_until(process, lambda: False)
    assert reason is not None
    assert "killed" in reason.line
    assert "memory" not in reason.line
    process.restart()
    poll_until(process, lambda: process.report is not None)
    assert (process.incarnation, process.restarts) == (1_001, 1)
    assert process.pid() != pid
    assert process.describe()["last_death"] == reason.line


def test_a_process_that_falls_silent_counts_as_dead(started: list[Process], monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(started)
    poll_until(process, lambda: process.report is not None)
    monkeypatch.setattr(processes, "SILENCE_SECONDS", 1.0)
    process.handle.fall_silent.remote()
    reason = poll_until(process, lambda: False)
    assert reason is not None
    assert reason.line == "sent no report for 1 s"
    assert process.handle is None


def test_an_error_in_the_loop_is_the_reason(started: list[Process]) -> None:
    process = start(started, run=lambda handle: handle.run.remote(True))
    reason = poll_until(process, lambda: False)
    assert reason is not None
    assert reason.line == "ValueError: the loop met 7 where 6 was right"
    assert "in run\n" in reason.details, "the traceback is kept"
    assert "\x1b" not in reason.details


def test_rays_reason_for_an_exit_is_kept(started: list[Process]) -> None:
    process = start(started, run=lambda handle: handle.leave.remote(3))
    reason = poll_until(process, lambda: False)
    assert reason is not None
    assert "exit code 3" in reason.line
    process = start(started)
    poll_until(process, lambda: process.report is not None)
    ray.kill(process.handle)
    reason = poll_until(process, lambda: False)
    assert reason is not None
    assert "ray.kill" in reason.line


def test_an_exit_without_a_reason_was_abrupt() -> None:
    reason = describe_exit(ActorDiedError())
    assert reason.line == "the process ended abruptly (killed, or crashed in native code)"
    assert "died unexpectedly" in reason.details


def test_a_fresh_report_is_not_the_pending_one(started: list[Process]) -> None:
    process = start(started)
    poll_until(process, lambda: process.report is not None)
    for fresh, grown in ((False, 0), (True, 2)):
        while process._reporting is not None:  # until no request is pending
            process.poll()
            time.sleep(0.01)
        process.request_report()
        ray.wait([process._reporting], timeout=30.0)  # the actor has two threads, so calls may overtake each other
        ray.get(process.handle.grow.remote(), timeout=30.0)
        before = process.report
        process.request_report(fresh=fresh)
        end = time.monotonic() + 30.0
        while process.report is before:
            assert time.monotonic() < end
            process.poll()
            time.sleep(0.01)
        assert process.report["grown"] == grown


def test_the_end_of_the_loop_is_not_a_failure(started: list[Process]) -> None:
    process = start(started, run=lambda handle: handle.run.remote(False))
    assert poll_until(process, lambda: process.done) is None
    assert (process.result, process.state) == ("done", "done")


def test_five_failed_starts_are_a_crash_loop(started: list[Process]) -> None:
    process = start(started, start=lambda incarnation: OddActor.remote(broken=True))
    for _ in range(processes.MAX_FAILED_STARTS - 1):
        reason = poll_until(process, lambda: False)
        assert reason is not None
        assert "no such device" in reason.line + reason.details
        process.restart()
    poll_until(process, lambda: False)
    with pytest.raises(CrashLoop, match="odd died 5 times in a row before it did any work"):
        process.restart()


def test_a_name_still_taken_is_tried_again(started: list[Process]) -> None:
    def named(incarnation: int) -> Any:
        return OddActor.options(name="test/odd", namespace=NAMESPACE).remote()

    first = start(started, start=named)
    poll_until(first, lambda: first.report is not None)
    second = start(started, start=named)
    assert second.handle is None, "a taken name is not an error yet"
    assert second.poll() is None
    first.kill()
    assert poll_until(second, lambda: second.report is not None) is None
    assert second.incarnation == 0
