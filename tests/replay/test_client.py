"""`WaitingClient` with a simulated clock: how often it calls a server that replies "wait"."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from replay import client
from replay.client import WaitingClient
from replay.errors import DeadlineExceeded
from replay.messages import InsertReply, Push
from replay.remote import argument
from replay.types import Segment


class Clock:
    """Simulated time, which passes during sleeps and calls."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Server:
    """Replies "wait" until a given time; each call takes a millisecond."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.until, self.calls = clock, 0.0, 0

    def call(self, method: str, *arguments: Any, seconds: float, **_: Any) -> InsertReply:
        self.calls += 1
        self.clock.now += 0.001
        return InsertReply(0, wait="samples" if self.clock.now < self.until else None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(client, "time", clock)
    return clock


def wait_for(waiting: WaitingClient, server: Server, seconds: float) -> tuple[int, float]:
    """Call a server that is ready after `seconds`; return the number of calls and the delay of the final reply."""
    server.calls, server.until = 0, server.clock.now + seconds
    waiting._call_until_served("insert", stop=None)
    return server.calls, server.clock.now - server.until


def test_waits_that_are_alike_take_few_calls_and_end_in_time(clock: Clock) -> None:
    server = Server(clock)
    waiting = WaitingClient(server)  # type: ignore[arg-type]
    calls, _ = wait_for(waiting, server, 0.04)
    assert calls >= 6  # without an average wait, the first pauses are short
    seen = [wait_for(waiting, server, 0.04) for _ in range(20)][10:]
    assert max(calls for calls, _ in seen) <= 4
    assert max(late for _, late in seen) <= 0.3 * 0.04


def test_a_server_that_is_ready_again_is_asked_at_once(clock: Clock) -> None:
    server = Server(clock)
    waiting = WaitingClient(server)  # type: ignore[arg-type]
    for _ in range(10):
        wait_for(waiting, server, 0.04)
    calls, late = wait_for(waiting, server, 0.0)
    assert (calls, round(late, 3)) == (1, 0.001)


def test_after_long_waits_a_short_one_ends_within_the_longest_pause(clock: Clock) -> None:
    server = Server(clock)
    waiting = WaitingClient(server)  # type: ignore[arg-type]
    for _ in range(5):
        wait_for(waiting, server, 5.0)
    assert wait_for(waiting, server, 0.002)[1] <= 0.052


def test_the_time_waited_adds_up_and_the_deadline_holds(clock: Clock) -> None:
    server = Server(clock)
    waiting = WaitingClient(server, deadline_seconds=1.0)  # type: ignore[arg-type]
    begun = clock.now
    with pytest.raises(DeadlineExceeded, match="insert waited 1 s for samples"):
        wait_for(waiting, server, 1e9)
    assert 1.0 <= clock.now - begun <= 1.1
    assert waiting.seconds_waited == pytest.approx(clock.now - begun, abs=0.002)
    assert waiting.waiting_for is None


def segment(width: int) -> Segment:
    row, age, number = np.arange(4, dtype=np.int32), np.zeros(4, np.uint8), np.zeros(4, np.float32)
    frames = np.zeros((5, width), np.float32)
    return Segment(frames, row, age, row + 1, age, np.zeros(4, np.int64), number, number)


def test_the_size_of_a_push_is_that_of_its_arrays() -> None:
    assert segment(3).bytes == 5 * 3 * 4 + 4 * (4 + 1 + 4 + 1 + 8 + 4 + 4)
    assert Push(0, 0, 0, (segment(3), segment(3))).bytes == 2 * segment(3).bytes


def test_a_small_push_goes_in_the_call_and_a_large_one_once_into_the_object_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored: list[Push] = []
    monkeypatch.setattr("ray.put", stored.append)
    small, large = Push(0, 0, 0, (segment(3),)), Push(0, 0, 1, (segment(5_000),))
    assert argument(small) is small
    assert not stored
    argument(large)
    assert stored == [large]


def test_a_wait_that_was_told_ahead_of_time_costs_no_pause(clock: Clock) -> None:
    server = Server(clock)
    waiting = WaitingClient(server)  # type: ignore[arg-type]
    answers = iter([InsertReply(0, wait="samples"), InsertReply(0, accepted=True)])
    server.call = lambda *_, **__: next(answers)  # type: ignore[method-assign]
    reply = waiting._call_until_served("sample", stop=None, pending=object())
    assert reply.accepted
    assert (clock.now, waiting.seconds_waited) == (100.0, 0.0)
