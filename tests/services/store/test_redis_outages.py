"""The Redis store: lost answers, slow connections, and restarts of the server."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from services.errors import StoreUnavailable
from services.store.buffered import BufferedWriter
from services.store.redis import RedisRunStore
from tests.services.redis_server import RedisServer
from tests.services.store.backends import record
from tests.services.store.fake_servers import fake_server


@pytest.fixture
def store(server: RedisServer) -> Iterator[RedisRunStore]:
    with RedisRunStore(server.url) as opened:
        yield opened


def test_what_a_silent_server_did_nevertheless_is_not_done_twice(server: RedisServer, store: RedisRunStore) -> None:
    store.register(record())
    writer = BufferedWriter(store, "pong-1", retry_seconds=0)
    writer.add_event("tick", "0", 100.0)
    writer.add_metrics(0, {"x": 0.0}, 100.0)
    with server.suspended():
        # The writer is connected, so the write reaches the server, and only its answer is missing.
        writer.add_metrics(1, {"x": 1.0}, 101.0)
        writer.add_event("tick", "1", 101.0)
        assert writer.waiting == 2
    assert writer.close(deadline_seconds=10)
    assert [row.step for row in store.metrics("pong-1")] == [0, 1]
    assert [event.text for event in store.events("pong-1")] == ["0", "1"]
    # Two equal events that are written on purpose are both kept.
    for _ in range(2):
        store.add_event("pong-1", "tick", "again", 102.0)
    assert [event.text for event in store.events("pong-1")] == ["0", "1", "again", "again"]


def test_an_answer_that_is_lost_does_not_double_an_event(server: RedisServer, store: RedisRunStore) -> None:
    store.register(record())
    drop_answers = threading.Event()

    def forward(client: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", server.port)) as upstream:
            while request := client.recv(65536):
                upstream.sendall(request)
                answer = upstream.recv(65536)
                if drop_answers.is_set():
                    return
                client.sendall(answer)

    with fake_server(forward) as port, RedisRunStore(f"redis://127.0.0.1:{port}") as distant:
        distant.add_event("pong-1", "tick", "0", 1.0)
        drop_answers.set()
        for text in ("1", "2"):
            with pytest.raises(StoreUnavailable):
                distant.add_event("pong-1", "tick", text, 1.0)
        drop_answers.clear()
        for text in ("2", "1", "3"):
            distant.add_event("pong-1", "tick", text, 1.0)
    # The first failed call reached the server; the second only tried to log in.
    assert [event.text for event in store.events("pong-1")] == ["0", "1", "2", "3"]


def test_a_server_that_is_far_away_is_written_to_and_asked(server: RedisServer, store: RedisRunStore) -> None:
    store.register(record())
    sent = store.send_command("pong-1", "stop", {})

    def forward(client: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", server.port)) as upstream:
            while request := client.recv(65536):
                upstream.sendall(request)
                answer = upstream.recv(65536)
                time.sleep(0.35)
                client.sendall(answer)

    with fake_server(forward) as port, RedisRunStore(f"redis://127.0.0.1:{port}") as distant:
        writer = BufferedWriter(distant, "pong-1")
        assert [command.id for command in writer.pending_commands()] == [sent]
        writer.acknowledge(sent, {"ok": True})
        assert (writer.waiting, writer.problem) == (0, None)
        assert distant.wait_for_acknowledgement("pong-1", sent, deadline_seconds=0.5) == {"ok": True}
        writer.close()


def write_through_outage(store: RedisRunStore, seconds: float, outage: Any) -> None:
    """Write before, during, and after an outage; check that everything arrives once and in order."""
    store.register(record())
    writer = BufferedWriter(store, "pong-1", retry_seconds=0.1)
    written = 0

    def write() -> None:
        nonlocal written
        writer.write_snapshot({"n": written}, time.time())
        writer.add_event("tick", str(written), 100.0 + written)
        writer.add_metrics(written, {"loss": float("nan")}, 100.0 + written)
        written += 1

    for _ in range(50):
        write()
    with outage:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            start = time.monotonic()
            write()
            assert time.monotonic() - start < 3
            time.sleep(0.02)
        assert writer.waiting > 0
    write()
    assert writer.close(deadline_seconds=30)
    assert (writer.problem, writer.dropped) == (None, {})
    with store.with_timeout(20) as patient:
        assert [event.text for event in patient.events("pong-1", limit=10_000)] == [str(i) for i in range(written)]
        assert [row.step for row in patient.metrics("pong-1")] == list(range(written))
        assert patient.read_snapshot("pong-1") == {"n": written - 1}


@contextmanager
def restarted(server: RedisServer, by: signal.Signals) -> Iterator[None]:
    server.stop(by)
    yield
    server.start()


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_lost_while_the_server_is_restarted(
    server: RedisServer, store: RedisRunStore, by: signal.Signals
) -> None:
    write_through_outage(store, 0.7, restarted(server, by))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["killed", "suspended"])
def test_nothing_is_lost_in_a_long_outage(server: RedisServer, store: RedisRunStore, kind: str) -> None:
    write_through_outage(store, 6, server.suspended() if kind == "suspended" else restarted(server, signal.SIGKILL))
