"""Deadlines for the reports of a process, and pauses between its restarts; with a fake clock and fake actors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from services.errors import CrashLoop
from services.supervision import processes
from services.supervision.processes import Process


class SilentActor:
    """A handle whose calls never return."""

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *_: object())


class FakeClock:
    """Replaces the module `time`."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(processes, "time", clock)
    monkeypatch.setattr(processes, "is_ready", lambda reference: False)
    monkeypatch.setattr(processes.ray, "kill", lambda handle: None)
    return clock


def start(made: Any = lambda incarnation: SilentActor()) -> Process:
    process = Process("odd", 0, made)
    process.start()
    process.request_report()
    return process


def test_a_process_that_never_reports_is_restarted_after_a_deadline(clock: FakeClock) -> None:
    process = start()
    clock.now += processes.START_SECONDS - 1.0
    assert process.poll() is None
    clock.now += 2.0
    reason = process.poll()
    assert reason is not None
    assert reason.line == "sent no report within 180 s of its start"
    process.restart()
    assert process.poll() is None, "the next incarnation has the same deadline"


def test_the_deadline_of_a_pending_process_starts_when_resources_are_free(clock: FakeClock) -> None:
    process = start()
    clock.now += processes.START_SECONDS + 1.0
    process.check_resources(lambda: "needs 1 CPU")
    assert process.poll() is None
    assert process.state == "pending"
    clock.now += 10_000.0
    process.check_resources(lambda: "needs 1 CPU")
    process.check_resources(lambda: None)
    assert process.poll() is None
    clock.now += processes.START_SECONDS + 1.0
    assert process.poll() is not None


def test_a_name_that_stays_taken_is_not_tried_for_ever(clock: FakeClock) -> None:
    def taken(incarnation: int) -> Any:
        raise ValueError("the name is already taken")

    process = start(taken)
    clock.now += processes.START_SECONDS - 1.0
    assert process.poll() is None
    clock.now += 2.0
    assert process.poll() is not None


def test_an_optional_process_is_restarted_for_ever_after_longer_and_longer_pauses(clock: FakeClock) -> None:
    process = start()
    pauses = []
    for _ in range(9):
        clock.now += processes.START_SECONDS + 1.0
        assert process.poll() is not None
        pauses.append(process.restart(optional=True))
        assert (process.handle is None) is (pauses[-1] > 0.0)
        clock.now += pauses[-1]
        assert process.poll() is None
        assert process.handle is not None
    assert pauses == [0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    clock.now += processes.START_SECONDS + 1.0
    assert process.poll() is not None
    with pytest.raises(CrashLoop, match="odd died 10 times in a row before it did any work"):
        process.restart()
