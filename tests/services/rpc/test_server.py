"""The gRPC server: access control, errors as status codes, and messages that are not valid."""

from __future__ import annotations

import logging
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from replay.errors import ConfigurationError, SquallError
from services.client.run_client import SquallClient
from services.errors import Unauthenticated
from services.rpc import auth, interceptors, server, squall_pb2_grpc
from services.rpc import squall_pb2 as pb
from services.rpc.auth import ServerConfig, read_token
from services.rpc.control import RunControlService
from services.rpc.errors import CLASSES, from_status, to_status
from services.rpc.gateway import gateway_services
from services.rpc.interceptors import MAX_MESSAGE_BYTES
from services.rpc.server import ServerThread, Service
from services.store.base import RunStore
from services.store.sqlite import SQLiteRunStore
from tests.services.serving import TOKEN_FOR_TESTS, policy_service, serving

HEALTH_CHECK = "/grpc.health.v1.Health/Check"
METHODS = [
    *(f"/{s.full_name}/{m.name}" for s in pb.DESCRIPTOR.services_by_name.values() for m in s.methods),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/grpc.health.v1.Health/Watch",
    "/squall.v1.Policy/NoSuchMethod",
    "/no.such.Service/Method",
]  # fmt: skip
UNLIMITED = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    with SQLiteRunStore(tmp_path / "squall.db") as store:
        yield store


@pytest.fixture
def address(store: RunStore) -> Iterator[str]:
    """Serve a policy and the control of an empty store, without a token."""
    with serving(policy_service(), RunControlService(store)) as address:
        yield address


def outcome(address: str, method: str, payload: bytes, *, metadata: Any = (), streams: bool = False) -> Any:
    """Call a method with raw bytes; return the status code and its text."""
    with grpc.insecure_channel(address, options=UNLIMITED) as channel:
        try:
            if streams:
                list(channel.stream_stream(method)(iter([payload]), metadata=metadata, timeout=20))
            else:
                channel.unary_unary(method)(payload, metadata=metadata, timeout=20)
        except grpc.RpcError as error:
            call: Any = error
            return call.code(), call.details()
        return grpc.StatusCode.OK, ""


@contextmanager
def mute(address: str, method: str, *, window: int | None = None) -> Iterator[Any]:
    """Start a call that sends no message.

    Args:
        address: address of the server.
        method: full name of the method.
        window: flow-control window in bytes; larger answers wait until they are read.
    """
    options = () if window is None else (("grpc.http2.lookahead_bytes", window), ("grpc.http2.bdp_probe", 0))
    stop = threading.Event()
    with grpc.insecure_channel(address, options=options) as channel:
        call: Any = channel.stream_stream(method)(iter(stop.wait, True), timeout=60)
        try:
            yield call
        finally:
            stop.set()
            call.cancel()


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:50051", "10.1.2.3:50051", "example.org:50051", "node:0"])
def test_listening_beyond_loopback_needs_a_token(address: str) -> None:
    with pytest.raises(ConfigurationError, match="beyond this machine's loopback, needs a token"):
        ServerConfig(address)
    assert ServerConfig(address, TOKEN_FOR_TESTS).address == address


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:50051", "[::1]:50051", "127.3.2.1:1"])
def test_loopback_needs_none(address: str) -> None:
    assert ServerConfig(address).token is None


@pytest.mark.parametrize("address", ["", "50051", "localhost", "localhost:", "localhost:99999", "::1:5", "a b:5"])
def test_an_address_that_cannot_be_is_refused(address: str) -> None:
    with pytest.raises(ConfigurationError, match=r"an address is host:port, .*got"):
        ServerConfig(address, TOKEN_FOR_TESTS)


def test_a_token_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SQUALL_GRPC_TOKEN", raising=False)
    assert read_token() is None
    monkeypatch.setenv("SQUALL_GRPC_TOKEN", TOKEN_FOR_TESTS)
    assert read_token() == TOKEN_FOR_TESTS
    (tmp_path / "token").write_text("another-token-0123456789\n")
    assert read_token(tmp_path / "token") == "another-token-0123456789"
    for bad in ("", "short", "has spaces in it, and is long", "täglich-frische-brötchen"):
        (tmp_path / "token").write_text(bad)
        with pytest.raises(ConfigurationError, match="a token has 16 to 1,000") as caught:
            read_token(tmp_path / "token")
        assert not bad or bad not in str(caught.value)
    with pytest.raises(ConfigurationError, match="cannot read a token"):
        read_token(tmp_path / "missing")
    assert TOKEN_FOR_TESTS not in repr(ServerConfig(token=TOKEN_FOR_TESTS))


def test_a_port_in_use_is_an_error_that_names_it() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigurationError, match=re.escape(f"cannot listen on {address}: Address already in use")):
            ServerThread([], ServerConfig(address))
    with closing(ServerThread([], ServerConfig(address))):  # free again
        pass


@pytest.mark.parametrize("shown", [None, "Bearer wrong", "Bearer ", f"Basic {TOKEN_FOR_TESTS}", TOKEN_FOR_TESTS])
def test_without_the_token_nothing_is_learnt(store: RunStore, shown: str | None) -> None:
    metadata = () if shown is None else (("authorization", shown),)
    with serving(*gateway_services(store, None), token=TOKEN_FOR_TESTS) as address:
        answers = {
            outcome(address, method, b"", metadata=metadata, streams=streams)
            for method in METHODS
            for streams in (False, True)
        }
        assert answers == {
            (grpc.StatusCode.UNAUTHENTICATED, "this server requires a token: authorization: Bearer TOKEN")
        }
        with SquallClient(address, token="wrong-" + TOKEN_FOR_TESTS) as client, pytest.raises(Unauthenticated):
            client.list_runs()
        with SquallClient(address, token=TOKEN_FOR_TESTS) as client:
            assert client.list_runs() == []
        assert outcome(address, HEALTH_CHECK, b"")[0] is grpc.StatusCode.OK
        known = outcome(address, METHODS[-1], b"", metadata=(("authorization", f"Bearer {TOKEN_FOR_TESTS}"),))
        assert known[0] is grpc.StatusCode.UNIMPLEMENTED


def test_a_probe_without_the_token_is_answered_before_its_message_comes(store: RunStore) -> None:
    with serving(RunControlService(store), token=TOKEN_FOR_TESTS) as address, mute(address, HEALTH_CHECK) as call:
        assert health_pb2.HealthCheckResponse.FromString(next(call)).status == health_pb2.HealthCheckResponse.SERVING
        assert list(call) == []
        assert call.code() is grpc.StatusCode.OK


def test_probes_without_the_token_are_limited_and_shut_nobody_out(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "MAX_PROBES", 1)
    monkeypatch.setattr(server, "MAX_CALLS", 2)
    known = (("authorization", f"Bearer {TOKEN_FOR_TESTS}"),)
    with serving(RunControlService(store), token=TOKEN_FOR_TESTS) as address:
        with mute(address, HEALTH_CHECK, window=1) as held:
            held.initial_metadata()  # the first probe is running before the second one starts
            with mute(address, HEALTH_CHECK, window=1) as more:
                assert more.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert outcome(address, HEALTH_CHECK, b"", metadata=known) == (grpc.StatusCode.OK, "")
        deadline = time.monotonic() + 30
        while outcome(address, HEALTH_CHECK, b"")[0] is not grpc.StatusCode.OK:
            assert time.monotonic() < deadline, "the first probe still counts"


@pytest.mark.parametrize("method", [METHODS[0], "/squall.v1.RunControl/Watch", HEALTH_CHECK, METHODS[-4]])
def test_a_call_that_never_sends_its_message_is_ended(
    address: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interceptors, "FIRST_MESSAGE_SECONDS", 0.2)
    with mute(address, method) as call:
        assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert call.details() == "waited 0.2 s for the call's first message"


def test_a_call_that_ends_without_its_message_is_answered(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        call: Any = channel.stream_stream("/squall.v1.Policy/Act")(iter([]), timeout=20)
        assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert call.details() == "the call ended without its ActRequest"


class Flood(squall_pb2_grpc.ExperienceServicer, Service):
    """A service that sends answers without end."""

    name = "squall.v1.Experience"

    def __init__(self) -> None:
        self.ended = threading.Event()

    def add_to(self, server: grpc.aio.Server) -> None:
        squall_pb2_grpc.add_ExperienceServicer_to_server(self, server)

    async def Play(self, requests: Any, context: Any) -> AsyncIterator[pb.PlayResponse]:
        try:
            while True:
                yield pb.PlayResponse(opened=pb.Opened(session="x" * 2**16))
        finally:
            self.ended.set()


def test_a_caller_that_takes_no_answers_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptors, "IDLE_SECONDS", 0.2)
    flood = Flood()
    with serving(flood) as address, mute(address, "/squall.v1.Experience/Play", window=1) as call:
        call.initial_metadata()
        assert flood.ended.wait(20.0)


def test_two_tokens_are_one_too_many(store: RunStore) -> None:
    right = ("authorization", f"Bearer {TOKEN_FOR_TESTS}")
    with serving(RunControlService(store), token=TOKEN_FOR_TESTS) as address:
        twice = outcome(address, "/squall.v1.RunControl/ListRuns", b"", metadata=(right, ("authorization", "x")))
        assert twice[0] is grpc.StatusCode.UNAUTHENTICATED
        assert outcome(address, "/squall.v1.RunControl/ListRuns", b"", metadata=(right,))[0] is grpc.StatusCode.OK


def test_the_standard_probe_and_reflection_answer(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        for service, code in (("squall.v1.Policy", grpc.StatusCode.OK), ("no.such", grpc.StatusCode.NOT_FOUND)):
            question = health_pb2.HealthCheckRequest(service=service).SerializeToString()
            assert outcome(address, HEALTH_CHECK, question)[0] is code
        assert outcome(address, "/grpc.health.v1.Health/List", b"")[0] is grpc.StatusCode.UNIMPLEMENTED
        reflected = ProtoReflectionDescriptorDatabase(channel)
        assert set(reflected.get_services()) == {
            "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection", "squall.v1.Policy",
            "squall.v1.RunControl",
        }  # fmt: skip
        assert "squall.v1" in reflected.FindFileContainingSymbol("squall.v1.Policy").package


def test_tls(store: RunStore, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is missing")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subprocess.run([*command, *subject, "-keyout", key, "-out", cert], check=True, capture_output=True, timeout=60)
    with serving(RunControlService(store), token=TOKEN_FOR_TESTS, tls_cert=cert, tls_key=key) as address:
        with SquallClient(address, token=TOKEN_FOR_TESTS, tls_authority=cert) as client:
            assert client.list_runs() == []
        with SquallClient(address, token=TOKEN_FOR_TESTS, call_seconds=5) as client, pytest.raises(SquallError):
            client.list_runs()
    with pytest.raises(ConfigurationError, match="both a certificate and its key"):
        ServerConfig(tls_cert=cert)
    with pytest.raises(ConfigurationError, match="cannot read a TLS file"):
        ServerThread([], ServerConfig(tls_cert=cert, tls_key=tmp_path / "missing"))


# Errors.


class Raising(squall_pb2_grpc.PolicyServicer, Service):
    """A service that raises a given error."""

    name = "squall.v1.Policy"
    error: Exception

    def add_to(self, server: grpc.aio.Server) -> None:
        squall_pb2_grpc.add_PolicyServicer_to_server(self, server)

    async def Describe(self, request: Any, context: Any) -> Any:
        raise self.error


@pytest.fixture(scope="module")
def raising() -> Iterator[tuple[Raising, str]]:
    service = Raising()
    with serving(service) as address:
        yield service, address


@pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES)
def test_an_error_comes_back_as_it_was_raised(raising: tuple[Raising, str], kind: type[SquallError]) -> None:
    service, address = raising
    service.error = kind("three actors, got -1: ä")
    with SquallClient(address) as client, pytest.raises(SquallError) as caught:
        client.describe()
    assert type(caught.value) is kind
    assert str(caught.value) == "three actors, got -1: ä"
    assert outcome(address, "/squall.v1.Policy/Describe", b"")[0] is grpc.StatusCode[kind.grpc_code]


def test_an_error_that_is_more_special_goes_by_its_base(raising: tuple[Raising, str]) -> None:
    class Special(ConfigurationError):
        pass

    service, address = raising
    service.error = Special("x" * 100_000)
    with SquallClient(address) as client, pytest.raises(ConfigurationError) as caught:
        client.describe()
    assert 1_000 < len(str(caught.value)) < 8_000


def test_an_unexpected_error_is_logged_and_not_told(
    raising: tuple[Raising, str], caplog: pytest.LogCaptureFixture
) -> None:
    service, address = raising
    service.error = KeyError("a secret of the server's")
    with caplog.at_level(logging.ERROR):
        code, text = outcome(address, "/squall.v1.Policy/Describe", b"")
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in text
    assert "a secret of the server's" in caplog.text


def test_every_error_has_one_code_and_one_name() -> None:
    for kind in CLASSES.values():
        code, text, trailers = to_status(kind("why"))
        assert code is grpc.StatusCode[kind.grpc_code]
        assert type(from_status(code, text, trailers, "there")) is kind
    assert len(CLASSES) > 20


# Invalid messages.


def test_random_and_truncated_bytes_are_an_error_each_and_the_server_goes_on(address: str) -> None:
    rng = np.random.default_rng(4)
    valid = pb.ActRequest(
        run="mine", observations=pb.Array(dtype=pb.DTYPE_FLOAT32, shape=[1, 4], data=bytes(16)), explore=True
    ).SerializeToString()
    payloads = [rng.bytes(int(size)) for size in rng.integers(1, 300, 40)]
    payloads += [valid[:size] for size in range(1, len(valid) - 2)]
    codes = {outcome(address, "/squall.v1.Policy/Act", payload)[0] for payload in payloads}
    assert codes == {grpc.StatusCode.INVALID_ARGUMENT}
    for method in METHODS[:-4]:
        for payload in payloads[:10]:
            code, text = outcome(address, method, payload, streams="Play" in method)
            assert code in (
                grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED,
                grpc.StatusCode.OK,
            ), (method, text)  # fmt: skip
    assert outcome(address, "/squall.v1.Policy/Act", valid)[0] is grpc.StatusCode.OK


def test_bytes_that_are_no_message_are_named(address: str) -> None:
    code, text = outcome(address, "/squall.v1.Policy/Act", b"\xff\xff\xff")
    assert (code, text) == (grpc.StatusCode.INVALID_ARGUMENT, "received 3 bytes that are not a valid ActRequest")


def test_a_message_of_100_mb_is_refused_and_the_server_goes_on(address: str) -> None:
    large = bytes(100_000_000)
    code, text = outcome(address, "/squall.v1.Policy/Act", large)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(MAX_MESSAGE_BYTES) in text
    with SquallClient(address) as client:
        assert client.act(np.zeros((1, 4), np.float32)).weights_version == 7


def test_a_small_message_that_unpacks_to_100_mb_is_refused(address: str) -> None:
    with grpc.insecure_channel(address, options=UNLIMITED) as channel:
        call = channel.unary_unary("/squall.v1.Policy/Act")
        with pytest.raises(grpc.RpcError) as caught:
            call(bytes(100_000_000), compression=grpc.Compression.Gzip, timeout=60)
    failed: Any = caught.value
    assert failed.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED)


def test_what_is_no_http_is_dropped_and_the_server_goes_on(address: str) -> None:
    host, _, port = address.rpartition(":")
    rng = np.random.default_rng(5)
    for payload in (rng.bytes(1000), b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.bytes(5000)):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(payload)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
    with SquallClient(address) as client:
        assert client.list_runs() == []
