"""Fake servers for the tests of the Redis store, and a check of the errors that they cause."""

from __future__ import annotations

import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from replay.errors import SquallError
from services.store.redis import RedisRunStore

SECRET = "hunt/er2"
QUOTED = "hunt%2Fer2"


def check_refused(url: str, kind: type[SquallError], words: str) -> None:
    """Check that a call at `url` fails in time, with one line, and that neither error nor store shows the password."""
    start = time.monotonic()
    with RedisRunStore(url, timeout_seconds=0.5) as store, pytest.raises(kind, match=words) as caught:
        store.list_runs()
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value)) + repr(store) + store.shown_url
    assert SECRET not in shown
    assert QUOTED not in shown


@contextmanager
def fake_server(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """Listen on a free port and call `serve` for each connection in a thread; yields the port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve_and_close(client: socket.socket) -> None:
        with client:
            try:
                serve(client)
            except OSError:
                return

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve_and_close, args=(client,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def reply_always(answer: bytes) -> Callable[[socket.socket], None]:
    """Return a function for `fake_server` that replies to every message with `answer`."""

    def serve(client: socket.socket) -> None:
        while client.recv(65536):
            client.sendall(answer)

    return serve
