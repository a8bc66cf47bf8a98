"""What is Redis's alone: addresses, servers that cannot serve, answers that got lost. The contract: test_store.py."""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from replay.errors import ConfigurationError, SquallError
from services.errors import StoreIncompatible, StoreUnavailable, UnknownRun
from services.store.buffered import BufferedWriter
from services.store.locate import open_default_store, open_store
from services.store.records import RunRecord, this_process
from services.store.redis import RedisRunStore
from tests.services.redis_server import RedisServer

SECRET = "hunt/er2"
QUOTED = "hunt%2Fer2"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(running: RedisServer) -> RedisServer:
    running.command("FLUSHALL")
    return running


@pytest.fixture
def store(server: RedisServer) -> Iterator[RedisRunStore]:
    with RedisRunStore(server.url) as opened:
        yield opened


def record(name: str = "pong-1") -> RunRecord:
    now = time.time()
    return RunRecord(name, now, "dqn", "Pong", 0, *this_process(), "running", now, None, {})


def refused(url: str, kind: type[SquallError], words: str) -> None:
    """Check that a call at `url` fails in time, in one line, and that no password is in anything one could print."""
    began = time.monotonic()
    with RedisRunStore(url, timeout_seconds=0.5) as store, pytest.raises(kind, match=words) as caught:
        store.list_runs()
    assert time.monotonic() - began < 5
    assert "\n" not in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value)) + repr(store) + store.shown
    assert SECRET not in shown
    assert QUOTED not in shown


# Where things lie


def test_every_key_is_under_one_prefix(server: RedisServer, store: RedisRunStore) -> None:
    store.register(record())
    first = store.send_command("pong-1", "stop", {})
    store.acknowledge("pong-1", first, {})
    store.send_command("pong-1", "stop", {})
    store.add_event("pong-1", "start", "", 1.0)
    store.add_metrics("pong-1", 1, {}, 1.0)
    kinds = ("answers:pong-1", "commands:pong-1", "events:pong-1", "metrics:pong-1", "run:pong-1", "runs", "schema")
    assert sorted(server.command("KEYS", "*")) == [f"squall:{kind}" for kind in kinds]
    assert server.command("GET", "squall:schema") == "1"


def test_looking_writes_nothing(server: RedisServer, store: RedisRunStore) -> None:
    assert store.list_runs() == []
    with pytest.raises(UnknownRun, match="there are no runs yet"):
        store.add_event("pong-1", "start", "", 1.0)
    assert server.command("DBSIZE") == 0


def test_commands_and_answers_are_bounded(server: RedisServer) -> None:
    with RedisRunStore(server.url, history=5) as store:
        store.register(record())
        for _ in range(10):
            store.acknowledge("pong-1", store.send_command("pong-1", "scale", {}), {})
        sent = [store.send_command("pong-1", "stop", {}) for _ in range(7)]
        assert [command.id for command in store.pending_commands("pong-1")] == sent[-5:]
        assert server.command("HLEN", "squall:answers:pong-1") == 0


def test_databases_of_one_server_do_not_mix(server: RedisServer, store: RedisRunStore) -> None:
    store.register(record())
    with RedisRunStore(f"redis://127.0.0.1:{server.port}/3") as other:
        assert other.list_runs() == []


def test_a_socket_file(server: RedisServer, store: RedisRunStore) -> None:
    store.register(record())
    with RedisRunStore(f"unix://{server.folder}/redis.sock") as same:
        assert same.get("pong-1").name == "pong-1"
    with RedisRunStore(f"unix://{server.folder}/redis.sock?db=2") as other:
        assert other.list_runs() == []


def test_tls(server: RedisServer, store: RedisRunStore, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    store.register(record())

    def forward(client: socket.socket) -> None:
        with (
            context.wrap_socket(client, server_side=True) as one,
            socket.create_connection(("127.0.0.1", server.port)) as other,
        ):
            while sent := one.recv(65536):
                other.sendall(sent)
                one.sendall(other.recv(65536))

    with answering(forward) as port:
        with RedisRunStore(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}") as safe:
            assert [run.name for run in safe.list_runs()] == ["pong-1"]
        refused(f"rediss://:{QUOTED}@127.0.0.1:{port}/0", StoreUnavailable, "certificate verify failed")


def test_the_environment_names_the_store_and_a_flag_another(
    server: RedisServer, store: RedisRunStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SQUALL_HOME", str(tmp_path))
    store.register(record())
    for variable, flag, found in (("", None, 0), ("", server.url, 1), (server.url, None, 1)):
        monkeypatch.setenv("SQUALL_STORE", variable)
        with open_default_store(flag) as opened:
            assert len(opened.list_runs()) == found
    with open_default_store("sqlite:///here.db") as opened:
        assert opened.list_runs() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url",
    [
        "redis:", "redis://", "redis:///0", f"redis://:{SECRET}@host:6379/0", "redis://host:port/0", "redis://host/zero",
        f"redis://me:hun?ter2={SECRET}@host", f"redis://me:hun#ter2{SECRET}@host", f"redis:{SECRET}@host", "unix://",
        "unix:///run/redis.sock?db=one", f"redis://host?password={SECRET}", f"redis://[{SECRET}@host",
    ],
)  # fmt: skip
def test_an_address_that_cannot_be_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"a Redis store is redis://|store takes") as caught:
        open_store(url, tmp_path)
    shown = "".join(traceback.format_exception(caught.value))
    assert not any(piece in str(caught.value) for piece in ("hun", "er2", SECRET)), shown


# Servers that cannot serve


@contextmanager
def answering(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """Serve each connection to a port of this machine in a thread of its own."""
    listener = socket.create_server(("127.0.0.1", 0))

    def one(client: socket.socket) -> None:
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
            threading.Thread(target=one, args=(client,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def always(answer: bytes) -> Callable[[socket.socket], None]:
    def serve(client: socket.socket) -> None:
        while client.recv(65536):
            client.sendall(answer)

    return serve


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", StoreIncompatible, "no Redis"),
        (b"$5\r\nhello\r\n", StoreIncompatible, "is no Redis"),
        (b"$19\r\nredis_version:5.0.7\r\n", StoreIncompatible, r"is Redis 5\.0; Squall needs 6\.2 or newer"),
        (b"-LOADING Redis is loading the dataset in memory\r\n", StoreUnavailable, "loading the dataset"),
        (b"-ERR max number of clients reached\r\n", StoreUnavailable, "max number of clients"),
        (b"-DENIED Redis is running in protected mode\r\n", StoreIncompatible, "protected mode"),
        (b"", StoreUnavailable, r"no answer within 0\.5 s"),
    ],
)
@pytest.mark.parametrize("login", ["", f":{QUOTED}@"])
def test_what_is_no_fit_server_is_one_line(answer: bytes, kind: type[SquallError], words: str, login: str) -> None:
    if login and answer.startswith(b"$"):
        answer = b"+OK\r\n" + answer
    with answering(always(answer)) as port:
        refused(f"redis://{login}127.0.0.1:{port}", kind, words)


def test_a_server_that_repeats_the_password_is_not_quoted() -> None:
    answer = f"-ERR unknown command `AUTH`, with args beginning with: `{SECRET}`\r\n"
    with answering(always(answer.encode())) as port:
        refused(f"redis://:{QUOTED}@127.0.0.1:{port}", StoreIncompatible, r"`AUTH`.*`\*\*\*`")


def test_a_server_that_hangs_up_or_is_not_there(tmp_path: Path) -> None:
    with answering(lambda client: None) as port:
        refused(f"redis://:{QUOTED}@127.0.0.1:{port}", StoreUnavailable, "run store redis")
    refused(f"redis://:{QUOTED}@127.0.0.1:{port}", StoreUnavailable, "refused")
    refused(f"redis://:{QUOTED}@nowhere.invalid:6379", StoreUnavailable, "nowhere.invalid")
    refused(f"unix://{tmp_path}/redis.sock", StoreUnavailable, "No such file")


def test_passwords(tmp_path: Path) -> None:
    with RedisServer(tmp_path, "--requirepass", SECRET) as server:
        place = f"127.0.0.1:{server.port}"
        refused(f"redis://{place}", ConfigurationError, "Authentication required")
        refused(f"redis://:wrong{QUOTED}@{place}", ConfigurationError, "invalid username-password pair")
        with RedisRunStore(f"redis://:{QUOTED}@{place}") as store:
            store.register(record())
            assert repr(store) == f"RedisRunStore('redis://***@{place}')"
            writer = BufferedWriter(store, "pong-1", retry_seconds=0)
            with redis.Redis(port=server.port, password=SECRET) as admin:
                admin.config_set("requirepass", "another")
                admin.execute_command("CLIENT", "KILL", "SKIPME", "yes")
                writer.add_event("tick", "", 1.0)
                # A password that worked before may work again: nothing is dropped.
                assert (writer.waiting, writer.dropped) == (1, {})
                assert "password" in (writer.problem or "")
                admin.config_set("requirepass", SECRET)
            assert writer.close()
            assert len(store.events("pong-1")) == 1


def test_a_newer_layout_and_other_keys_are_refused_and_left_alone(server: RedisServer) -> None:
    server.command("SET", "squall:schema", "7")
    refused(server.url, StoreIncompatible, "version 7, made by a newer Squall.*up to version 1")
    server.command("SET", "squall:schema", "mine")
    refused(server.url, StoreIncompatible, "of something else")
    server.command("DEL", "squall:schema")
    server.command("SET", "squall:runs", "mine")
    refused(server.url, StoreIncompatible, "WRONGTYPE")
    assert server.command("KEYS", "*") == ["squall:runs"]


def test_a_full_server_is_unavailable_and_changes_nothing(server: RedisServer, store: RedisRunStore) -> None:
    store.register(record())
    store.write_snapshot("pong-1", {"n": 1}, time.time())
    sent = store.send_command("pong-1", "stop", {})
    server.command("CONFIG", "SET", "maxmemory", "1")
    try:
        for call in (
            lambda: store.register(record("other")),
            lambda: store.write_snapshot("pong-1", {"n": 2}, time.time()),
            lambda: store.add_event("pong-1", "tick", "", 1.0),
            lambda: store.add_metrics("pong-1", 1, {}, 1.0),
            lambda: store.send_command("pong-1", "stop", {}),
        ):
            with pytest.raises(StoreUnavailable, match="maxmemory"):
                call()
    finally:
        server.command("CONFIG", "SET", "maxmemory", "0")
    assert [run.name for run in store.list_runs()] == ["pong-1"]
    assert store.read_snapshot("pong-1") == {"n": 1}
    assert store.events("pong-1") == []
    assert [command.id for command in store.pending_commands("pong-1")] == [sent]
    store.add_event("pong-1", "tick", "", 1.0)
    assert [event.id for event in store.events("pong-1")] == [1]


# Answers that got lost


def test_what_a_silent_server_did_nevertheless_is_not_done_twice(server: RedisServer, store: RedisRunStore) -> None:
    store.register(record())
    writer = BufferedWriter(store, "pong-1", retry_seconds=0)
    writer.add_event("tick", "0", 100.0)
    writer.add_metrics(0, {"x": 0.0}, 100.0)
    with server.suspended():
        # Connected, so the write reaches the server, and only its answer does not come.
        writer.add_metrics(1, {"x": 1.0}, 101.0)
        writer.add_event("tick", "1", 101.0)
        assert writer.waiting == 2
    assert writer.close(deadline_seconds=10)
    assert [row.step for row in store.metrics("pong-1")] == [0, 1]
    assert [event.text for event in store.events("pong-1")] == ["0", "1"]
    # What is the same by intent, and not a repetition, is there as often as it was written.
    for _ in range(2):
        store.add_event("pong-1", "tick", "again", 102.0)
    assert [event.text for event in store.events("pong-1")] == ["0", "1", "again", "again"]


def test_an_answer_that_is_lost_does_not_double_an_event(server: RedisServer, store: RedisRunStore) -> None:
    store.register(record())
    lose = threading.Event()

    def forward(client: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", server.port)) as other:
            while sent := client.recv(65536):
                other.sendall(sent)
                answer = other.recv(65536)
                if lose.is_set():
                    return
                client.sendall(answer)

    with answering(forward) as port, RedisRunStore(f"redis://127.0.0.1:{port}") as far:
        far.add_event("pong-1", "tick", "0", 1.0)
        lose.set()
        for text in ("1", "2"):
            with pytest.raises(StoreUnavailable):
                far.add_event("pong-1", "tick", text, 1.0)
        lose.clear()
        for text in ("2", "1", "3"):
            far.add_event("pong-1", "tick", text, 1.0)
    # The first got to the server, the second only tried to log in.
    assert [event.text for event in store.events("pong-1")] == ["0", "1", "2", "3"]


def test_a_server_that_is_far_away_is_written_to_and_asked(server: RedisServer, store: RedisRunStore) -> None:
    store.register(record())
    sent = store.send_command("pong-1", "stop", {})

    def forward(client: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", server.port)) as other:
            while asked := client.recv(65536):
                other.sendall(asked)
                answer = other.recv(65536)
                time.sleep(0.35)
                client.sendall(answer)

    with answering(forward) as port, RedisRunStore(f"redis://127.0.0.1:{port}") as far:
        writer = BufferedWriter(far, "pong-1")
        assert [command.id for command in writer.pending_commands()] == [sent]
        writer.acknowledge(sent, {"ok": True})
        assert (writer.waiting, writer.problem) == (0, None)
        assert far.wait_for_acknowledgement("pong-1", sent, deadline_seconds=0.5) == {"ok": True}
        writer.close()


def outlive(server: RedisServer, store: RedisRunStore, seconds: float, outage: Any) -> None:
    """Write all through an outage, and find everything there once and in order."""
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
            began = time.monotonic()
            write()
            assert time.monotonic() - began < 3
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
    outlive(server, store, 0.7, restarted(server, by))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["killed", "suspended"])
def test_nothing_is_lost_in_half_a_minute(server: RedisServer, store: RedisRunStore, kind: str) -> None:
    outlive(server, store, 30, server.suspended() if kind == "suspended" else restarted(server, signal.SIGKILL))
