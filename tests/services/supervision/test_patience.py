"""How long a process is waited for, and when it is tried again; with a clock and an actor that stand in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from services.errors import CrashLoop
from services.supervision import processes
from services.supervision.processes import Process


class Mute:
    """A handle whose calls are never answered."""

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *_: object())


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(processes, "time", clock)
    monkeypatch.setattr(processes, "is_ready", lambda reference: False)
    monkeypatch.setattr(processes.ray, "kill", lambda handle: None)
    return clock


def start(made: Any = lambda incarnation: Mute()) -> Process:
    process = Process("odd", 0, made)
    process.start()
    process.ask_for_report()
    return process


def test_who_never_gives_a_first_answer_is_gone_after_a_while(clock: Clock) -> None:
    process = start()
    clock.now += processes.START_SECONDS - 1.0
    assert process.poll() is None
    clock.now += 2.0
    death = process.poll()
    assert death is not None
    assert death.line == "gave no first answer within 180 s"
    process.restart()
    assert process.poll() is None, "the next one has as long"


def test_who_waits_for_room_begins_to_start_when_there_is_some(clock: Clock) -> None:
    process = start()
    clock.now += processes.START_SECONDS + 1.0
    process.seek_room(lambda: "waits for room")
    assert process.poll() is None
    assert process.state == "pending"
    clock.now += 10_000.0
    process.seek_room(lambda: "waits for room")
    process.seek_room(lambda: None)
    assert process.poll() is None
    clock.now += processes.START_SECONDS + 1.0
    assert process.poll() is not None


def test_a_name_that_stays_taken_is_not_tried_for_ever(clock: Clock) -> None:
    def taken(incarnation: int) -> Any:
        raise ValueError("the name is already taken")

    process = start(taken)
    clock.now += processes.START_SECONDS - 1.0
    assert process.poll() is None
    clock.now += 2.0
    assert process.poll() is not None


def test_who_is_dispensable_is_tried_for_ever_after_longer_and_longer_pauses(clock: Clock) -> None:
    process = start()
    pauses = []
    for _ in range(9):
        clock.now += processes.START_SECONDS + 1.0
        assert process.poll() is not None
        pauses.append(process.restart(dispensable=True))
        assert (process.handle is None) is (pauses[-1] > 0.0)
        clock.now += pauses[-1]
        assert process.poll() is None
        assert process.handle is not None
    assert pauses == [0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    clock.now += processes.START_SECONDS + 1.0
    assert process.poll() is not None
    with pytest.raises(CrashLoop, match="odd died 10 times in a row before it got to work"):
        process.restart()
