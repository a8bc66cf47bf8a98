"""The buffered writer of a coordinator, on every store."""

from __future__ import annotations

import math
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from replay.errors import ConfigurationError
from services.errors import (
    NotStorable,
    RunTakenOver,
)
from services.store.base import RunStore
from services.store.buffered import BufferedWriter
from services.store.records import this_process
from services.supervision.signals import StopSignals
from tests.services.store.backends import Backend, ago, elsewhere, record


@pytest.fixture
def writer(store: RunStore) -> Iterator[BufferedWriter]:
    store.register(record())
    made = BufferedWriter(store, "pong-1", patience_seconds=0.25, retry_seconds=0.1)
    yield made
    made.close(deadline_seconds=0)


def write_everything(writer: BufferedWriter, index: int) -> None:
    writer.write_snapshot({"index": index}, time.time())
    writer.add_event("tick", str(index), 100.0 + index)
    writer.add_metrics(index, {"loss": math.nan}, 100.0 + index)


def test_a_writer_writes_at_once(store: RunStore, writer: BufferedWriter) -> None:
    write_everything(writer, 1)
    writer.update_state("stopping", "Ctrl-C")
    sent = store.send_command("pong-1", "stop", {"n": 1})
    assert [command.id for command in writer.pending_commands()] == [sent]
    writer.acknowledge(sent, {"ok": True})
    assert writer.pending_commands() == []
    assert (writer.waiting, writer.problem, writer.dropped) == (0, None, {})
    assert store.read_snapshot("pong-1") == {"index": 1}
    assert [event.text for event in store.events("pong-1")] == ["1"]
    assert [row.step for row in store.metrics("pong-1")] == [1]
    assert store.get("pong-1").stopped_because == "Ctrl-C"
    assert store.command_result("pong-1", sent) == {"ok": True}


def test_a_writer_catches_up_when_the_store_is_back(backend: Backend, store: RunStore, writer: BufferedWriter) -> None:
    sent = store.send_command("pong-1", "stop", {})
    assert len(writer.pending_commands()) == 1
    write_everything(writer, 0)
    with backend.outage():
        for index in range(1, 300):
            started = time.monotonic()
            write_everything(writer, index)
            assert time.monotonic() - started < 1
        writer.update_state("stopping", "squall stop")
        writer.acknowledge(sent, {"ok": True})
        assert writer.pending_commands() == []
        assert writer.problem is not None
        assert "store" in writer.problem
        assert writer.waiting == 2 * 299 + 1 + 2
    assert store.read_snapshot("pong-1") == {"index": 0}
    time.sleep(0.11)
    deadline = time.monotonic() + 5
    while writer.waiting:
        assert time.monotonic() < deadline
        assert writer.pending_commands() == []
    assert (writer.problem, writer.dropped) == (None, {})
    assert store.read_snapshot("pong-1") == {"index": 299}
    assert [event.text for event in store.events("pong-1", limit=1000)] == [str(i) for i in range(300)]
    assert [row.step for row in store.metrics("pong-1")] == list(range(300))
    assert [row.time for row in store.metrics("pong-1")] == [100.0 + i for i in range(300)]
    assert (store.get("pong-1").state, store.get("pong-1").stopped_because) == ("stopping", "squall stop")
    assert store.command_result("pong-1", sent) == {"ok": True}


def test_a_command_is_not_carried_out_twice_while_its_answer_waits(backend: Backend, store: RunStore) -> None:
    store.register(record())
    writer = BufferedWriter(store, "pong-1", retry_seconds=0)
    sent = store.send_command("pong-1", "scale", {})
    with backend.outage():
        writer.acknowledge(sent, {})
        assert writer.pending_commands() == []
    assert writer.close(deadline_seconds=5)
    assert store.command_result("pong-1", sent) == {}


def test_a_full_buffer_drops_the_oldest_metrics_first(backend: Backend, store: RunStore) -> None:
    store.register(record())
    writer = BufferedWriter(store, "pong-1", capacity=10, patience_seconds=0.1, retry_seconds=60)
    with backend.outage():
        for index in range(8):
            writer.add_metrics(index, {}, 1.0)
        writer.update_state("stopping", "squall stop")
        for index in range(6):
            writer.add_event("tick", str(index), 1.0)
        writer.write_snapshot({"n": 1}, time.time())
        assert (writer.waiting, writer.dropped) == (11, {"metrics": 5})
        for index in range(6, 12):
            writer.add_event("tick", str(index), 1.0)
        assert (writer.waiting, writer.dropped) == (11, {"metrics": 8, "event": 3})
    assert writer.close(deadline_seconds=5)
    assert store.metrics("pong-1") == []
    assert [event.text for event in store.events("pong-1")] == [str(index) for index in range(3, 12)]
    assert store.get("pong-1").state == "stopping"
    assert store.read_snapshot("pong-1") == {"n": 1}


def test_a_writer_rests_between_tries(backend: Backend, store: RunStore) -> None:
    store.register(record())
    writer = BufferedWriter(store, "pong-1", patience_seconds=0.1, retry_seconds=60)
    with backend.outage():
        started = time.monotonic()
        for index in range(100):
            write_everything(writer, index)
        assert time.monotonic() - started < 2
        assert not writer.flush(deadline_seconds=0.2)
        assert time.monotonic() - started < 3
        assert not writer.close(deadline_seconds=0)


def test_a_writer_refuses_bad_values_at_once_and_keeps_none(backend: Backend, writer: BufferedWriter) -> None:
    with backend.outage():
        for call in (
            lambda: writer.write_snapshot({"x": object()}, 1.0),
            lambda: writer.write_snapshot({}, math.nan),
            lambda: writer.update_state("lost"),
            lambda: writer.add_event("tick", "", math.nan),
            lambda: writer.add_metrics(-1, {}, 1.0),
            lambda: writer.add_metrics(1, {"x": None}, 1.0),  # type: ignore[dict-item]
            lambda: writer.acknowledge(1, {"x": object()}),
        ):
            with pytest.raises((NotStorable, ConfigurationError)):
                call()
    assert writer.waiting == 0


def test_what_waits_is_a_copy(backend: Backend, store: RunStore, writer: BufferedWriter) -> None:
    snapshot, values = {"n": [1]}, {"x": 1.0}
    with backend.outage():
        writer.write_snapshot(snapshot, time.time())
        writer.add_metrics(1, values, 1.0)
        snapshot["n"].append(2)
        values["x"] = 2.0
    assert writer.flush(deadline_seconds=5)
    assert store.read_snapshot("pong-1") == {"n": [1]}
    assert store.metrics("pong-1")[0].values == {"x": 1.0}


def test_what_the_store_refuses_is_counted_and_stops_nothing(store: RunStore) -> None:
    writer = BufferedWriter(store, "never-registered")
    write_everything(writer, 1)
    assert (writer.waiting, writer.dropped) == (0, {"snapshot": 1, "event": 1, "metrics": 1})
    assert "no run is named 'never-registered'" in (writer.problem or "")
    assert writer.pending_commands() == []
    assert writer.close()


def test_a_writer_whose_run_was_adopted_meanwhile_drops_what_it_has_and_says_so(
    backend: Backend, store: RunStore
) -> None:
    before = elsewhere(heartbeat=ago(60))
    store.register(before)
    writer = BufferedWriter(store, "pong-1", owner=before.owner, retry_seconds=0)
    with backend.outage():
        write_everything(writer, 1)
        writer.update_state("stopping")
        assert writer.pending_commands() == []
        writer.check_owner()
    adopted = store.adopt("pong-1", *this_process())
    store.send_command("pong-1", "stop", {})
    for call in (writer.pending_commands, writer.check_owner):
        with pytest.raises(RunTakenOver, match="continues the run"):
            call()
    write_everything(writer, 2)
    assert (writer.waiting, writer.dropped) == (0, {"snapshot": 2, "event": 2, "metrics": 2, "state": 1})
    assert writer.close()
    assert (store.get("pong-1"), store.read_snapshot("pong-1")) == (adopted, None)
    assert (store.events("pong-1"), store.metrics("pong-1")) == ([], [])


def test_at_the_end_a_store_that_is_away_is_waited_for(backend: Backend, store: RunStore) -> None:
    store.register(record())
    writer = BufferedWriter(store, "pong-1", retry_seconds=0)
    messages: list[str] = []
    with ThreadPoolExecutor(1) as thread:
        with backend.outage():
            writer.update_state("finished", "steps")
            finishing = thread.submit(writer.finish, lambda: False, messages.append)
            end = time.monotonic() + 30
            while not messages and not finishing.done():
                assert time.monotonic() < end
                time.sleep(0.05)
        finishing.result(timeout=30)
    assert [text.partition(" (")[0] for text in messages] == ["waiting up to 60 s for the run store"]
    assert (store.get("pong-1").state, store.get("pong-1").stopped_because) == ("finished", "steps")


def test_a_signal_ends_the_wait_for_the_store_and_what_it_never_got_is_told(backend: Backend, store: RunStore) -> None:
    store.register(record())
    writer = BufferedWriter(store, "pong-1", retry_seconds=0)
    messages: list[str] = []
    with backend.outage(), StopSignals(lambda: pytest.fail("the signal counted as the second")) as signals:
        signal.raise_signal(signal.SIGINT)  # ends the run
        writer.update_state("finished", signals.wanted)
        writer.add_event("end", "", 1.0)
        signals.forget()
        threading.Timer(1.0, signal.raise_signal, (signal.SIGINT,)).start()
        started = time.monotonic()
        writer.finish(lambda: signals.wanted is not None, messages.append)
        assert time.monotonic() - started < 30
    expected = "not delivered .*: 1 x event, 1 x state; the store will list run pong-1 as lost: run store"
    assert re.match(expected, messages[-1])
    assert store.get("pong-1").state == "running"
