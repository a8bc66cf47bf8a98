"""The Redis store: keys, URLs, TLS, passwords, and servers that it rejects."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from replay.errors import ConfigurationError, SquallError
from services.errors import StoreIncompatible, StoreUnavailable, UnknownRun
from services.store.buffered import BufferedWriter
from services.store.locate import open_default_store, open_store
from services.store.redis import RedisRunStore
from tests.services.redis_server import RedisServer
from tests.services.store.backends import record
from tests.services.store.fake_servers import QUOTED, SECRET, check_refused, fake_server, reply_always


@pytest.fixture
def store(server: RedisServer) -> Iterator[RedisRunStore]:
    with RedisRunStore(server.url) as opened:
        yield opened


# Keys and URLs.


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
        pytest.skip("openssl is missing")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    store.register(record())

    def forward(client: socket.socket) -> None:
        with (
            context.wrap_socket(client, server_side=True) as tls_client,
            socket.create_connection(("127.0.0.1", server.port)) as upstream,
        ):
            while request := tls_client.recv(65536):
                upstream.sendall(request)
                tls_client.sendall(upstream.recv(65536))

    with fake_server(forward) as port:
        with RedisRunStore(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}") as tls_store:
            assert [run.name for run in tls_store.list_runs()] == ["pong-1"]
        check_refused(f"rediss://:{QUOTED}@127.0.0.1:{port}/0", StoreUnavailable, "certificate verify failed")


def test_the_environment_names_the_store_and_a_flag_another(
    server: RedisServer, store: RedisRunStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SQUALL_HOME", str(tmp_path))
    store.register(record())
    for variable, flag, runs in (("", None, 0), ("", server.url, 1), (server.url, None, 1)):
        monkeypatch.setenv("SQUALL_STORE", variable)
        with open_default_store(flag) as opened:
            assert len(opened.list_runs()) == runs
    with open_default_store("sqlite:///here.db") as opened:
        assert opened.list_runs() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url",
    [
        "redis:", "redis://", "redis:///0", f"redis://:{SECRET}@host:6379/0", "redis://host:port/0",
        "redis://host/zero", f"redis://me:hun?ter2={SECRET}@host", f"redis://me:hun#ter2{SECRET}@host",
        f"redis:{SECRET}@host", "unix://", "unix:///run/redis.sock?db=one", f"redis://host?password={SECRET}",
        f"redis://[{SECRET}@host",
    ],
)  # fmt: skip
def test_an_address_that_cannot_be_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"a Redis store is redis://|store takes") as caught:
        open_store(url, tmp_path)
    shown = "".join(traceback.format_exception(caught.value))
    assert not any(part in str(caught.value) for part in ("hun", "er2", SECRET)), shown


# Servers that the store rejects.


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", StoreIncompatible, "not Redis"),
        (b"$5\r\nhello\r\n", StoreIncompatible, "is not Redis"),
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
    with fake_server(reply_always(answer)) as port:
        check_refused(f"redis://{login}127.0.0.1:{port}", kind, words)


def test_a_server_that_repeats_the_password_is_not_quoted() -> None:
    answer = f"-ERR unknown command `AUTH`, with args beginning with: `{SECRET}`\r\n"
    with fake_server(reply_always(answer.encode())) as port:
        check_refused(f"redis://:{QUOTED}@127.0.0.1:{port}", StoreIncompatible, r"`AUTH`.*`\*\*\*`")


def test_a_server_that_hangs_up_or_is_not_there(tmp_path: Path) -> None:
    with fake_server(lambda client: None) as port:
        check_refused(f"redis://:{QUOTED}@127.0.0.1:{port}", StoreUnavailable, "run store redis")
    check_refused(f"redis://:{QUOTED}@127.0.0.1:{port}", StoreUnavailable, "refused")
    check_refused(f"redis://:{QUOTED}@nowhere.invalid:6379", StoreUnavailable, "nowhere.invalid")
    check_refused(f"unix://{tmp_path}/redis.sock", StoreUnavailable, "No such file")


def test_passwords(tmp_path: Path) -> None:
    with RedisServer(tmp_path, "--requirepass", SECRET) as server:
        address = f"127.0.0.1:{server.port}"
        check_refused(f"redis://{address}", ConfigurationError, "Authentication required")
        check_refused(f"redis://:wrong{QUOTED}@{address}", ConfigurationError, "invalid username-password pair")
        with RedisRunStore(f"redis://:{QUOTED}@{address}") as store:
            store.register(record())
            assert repr(store) == f"RedisRunStore('redis://***@{address}')"
            writer = BufferedWriter(store, "pong-1", retry_seconds=0)
            with redis.Redis(port=server.port, password=SECRET) as admin:
                admin.config_set("requirepass", "another")
                admin.execute_command("CLIENT", "KILL", "SKIPME", "yes")
                writer.add_event("tick", "", 1.0)
                # A password that has worked before may work again, so nothing is dropped.
                assert (writer.waiting, writer.dropped) == (1, {})
                assert "password" in (writer.problem or "")
                admin.config_set("requirepass", SECRET)
            assert writer.close()
            assert len(store.events("pong-1")) == 1


def test_a_newer_layout_and_other_keys_are_refused_and_left_alone(server: RedisServer) -> None:
    server.command("SET", "squall:schema", "7")
    check_refused(server.url, StoreIncompatible, "version 7, made by a newer Squall.*up to version 1")
    server.command("SET", "squall:schema", "mine")
    check_refused(server.url, StoreIncompatible, "another program uses the key")
    server.command("DEL", "squall:schema")
    server.command("SET", "squall:runs", "mine")
    check_refused(server.url, StoreIncompatible, "WRONGTYPE")
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
