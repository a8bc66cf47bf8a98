"""The gRPC server: where it listens and whom it lets in, errors as status codes, health and reflection.

What it offers is a list of `Service`s; a run's endpoint, `squall serve` and `squall gateway` differ in that list alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import inspect
import ipaddress
import os
import re
import signal
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from replay.types import ConfigurationError, DeadlineExceeded
from services.grpc_errors import TRAILER, Overloaded, Unauthenticated, to_status

TOKEN = "SQUALL_GRPC_TOKEN"
LOOPBACK = "127.0.0.1"
MOST_BYTES = 16 * 2**20
"""Bytes in one message, either way."""
MOST_CALLS = 4_096
"""Calls under way at once; more are turned away."""
MOST_PROBES = 64
"""Of those, health checks without the token."""
FIRST_MESSAGE_SECONDS = 60.0
"""A call whose first message takes longer is ended: core alone would wait for it for ever."""
IDLE_SECONDS = 300.0
"""A call whose peer takes no answer for so long is ended, and a session whose client says nothing."""
GRACE_SECONDS = 2.0
_SHORTEST_TOKEN = 16
_START_SECONDS = 30.0
_HEALTH_CHECK = "/grpc.health.v1.Health/Check"

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MOST_BYTES),
    ("grpc.max_send_message_length", MOST_BYTES),
    # A peer that is gone without a word is noticed after half a minute.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)
_OPTIONS = (
    *CHANNEL_OPTIONS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),  # two servers on one port would share its calls without a word
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: the limit is on what arrives, not on what it unpacks to
)


def read_token(file: Path | None = None) -> str | None:
    """Return the token in `file`, else in SQUALL_GRPC_TOKEN, else None.

    Raises:
        ConfigurationError: the file cannot be read, or what it holds is no token.
    """
    if file is None:
        token, where = os.environ.get(TOKEN) or None, TOKEN
    else:
        try:
            token, where = file.read_text().strip(), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"cannot read a token from {file}: {error}") from error
    if token is not None and not re.fullmatch(rf"[!-~]{{{_SHORTEST_TOKEN},1000}}", token):
        raise ConfigurationError(
            f"a token has {_SHORTEST_TOKEN} to 1,000 printable ASCII characters without spaces, which `openssl rand "
            f"-hex 32` makes; that in {where} has {len(token)} characters or others"
        )
    return token


@dataclass(frozen=True)
class Listening:
    """Where a server listens, and whom it lets in.

    Attributes:
        address: `host:port`; port 0 takes any that is free.
        token: what a caller must show, as `authorization: Bearer TOKEN`; None lets everybody in.
        tls_cert: PEM file of the server's certificate and its chain.
        tls_key: PEM file of its key.
    """

    address: str = f"{LOOPBACK}:0"
    token: str | None = field(default=None, repr=False)
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def __post_init__(self) -> None:
        host, _ = split_address(self.address)
        if self.token is None and not is_loopback(host):
            raise ConfigurationError(
                f"listening on {self.address}, beyond this machine's loopback, needs a token: set {TOKEN}, or name a "
                f"--token-file"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigurationError("TLS takes both a certificate and its key: --tls-cert and --tls-key")

    def credentials(self) -> grpc.ServerCredentials | None:
        """Return what TLS needs, or None without it.

        Raises:
            ConfigurationError: a file cannot be read.
        """
        if self.tls_cert is None or self.tls_key is None:
            return None
        try:
            pair = (self.tls_key.read_bytes(), self.tls_cert.read_bytes())
        except OSError as error:
            raise ConfigurationError(f"cannot read what TLS needs: {error}") from error
        return grpc.ssl_server_credentials([pair])


def check_free(address: str) -> None:
    """Refuse an address of this machine that nothing can listen on now; a port of 0 is any that is free.

    Raises:
        ConfigurationError: with the system's reason, which gRPC's own error leaves out.
    """
    host, port = split_address(address)
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that ended a moment ago is no server
            probe.bind(where)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {address}: {error.strerror or error}") from error


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `host:port` or `[IPv6]:port`.

    Raises:
        ConfigurationError: it is neither.
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]/]+)):(\d{1,5})", address)
    if match is None or int(match[3]) > 65535:
        raise ConfigurationError(f"an address is host:port, such as {LOOPBACK}:50051, got {address!r}")
    return match[1] or match[2], int(match[3])


def is_loopback(host: str) -> bool:
    """Whether a host is this machine as seen from itself alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Service:
    """What a server offers: one service of a proto. Used on one event loop, between `start` and `stop`."""

    name: ClassVar[str]

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register this service's methods."""
        raise NotImplementedError

    async def start(self) -> None:
        """Begin what goes on in the background."""

    async def stop(self) -> None:
        """End it."""

    def note_progress(self, env_steps: int) -> None:
        """Take note of how far the run is; called from another thread."""

    def finish(self) -> None:
        """Take nothing more for the run, and tell callers so; called from another thread."""

    # What `squall status` shows; asked from another thread.

    @property
    def last_word(self) -> str:
        """How it goes, for people, or nothing."""
        return ""

    @property
    def waiting_for(self) -> str | None:
        """What callers wait for, or None."""
        return None

    @property
    def finished(self) -> bool:
        """Whether callers were told that the run has all its steps."""
        return False


class GrpcServer:
    """A server of some services, with standard health checking and reflection, on the running event loop."""

    def __init__(self, services: Sequence[Service], listening: Listening) -> None:
        """Say what to offer, and where; `start` begins."""
        self._services, self._listening = services, listening
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> str:
        """Listen; return the address with the port that was taken.

        Raises:
            ConfigurationError: nothing can listen there, or TLS has no such certificate.
        """
        token = self._listening.token
        interceptors = [*([_Doorkeeper(token, self._health)] if token is not None else []), _Translator()]
        server = grpc.aio.server(interceptors=interceptors, options=_OPTIONS, maximum_concurrent_rpcs=MOST_CALLS)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [health.SERVICE_NAME, reflection.SERVICE_NAME, *(service.name for service in self._services)]
        reflection.enable_server_reflection(names, server)
        for service in self._services:
            service.add_to(server)
        credentials, address = self._listening.credentials(), self._listening.address
        check_free(address)
        try:
            if credentials is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigurationError(f"cannot listen on {address}: {' '.join(str(error).split())}") from error
        self._server = server
        for service in self._services:
            await service.start()
            await self._health.set(service.name, health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        return f"{address.rpartition(':')[0]}:{port}"

    async def stop(self, grace: float = GRACE_SECONDS) -> None:
        """Take no new calls, let those under way end for `grace` seconds, and end."""
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(grace)
        for service in self._services:
            await service.stop()


def serve_until_signal(services: Sequence[Service], listening: Listening, announce: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; call this in the main thread, which signals reach.

    Args:
        services: what to offer.
        listening: where, and for whom.
        announce: told the address when the server is up.
    """

    async def serve() -> None:
        over, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, over.set)
        server = GrpcServer(services, listening)
        try:
            announce(await server.start())
            await over.wait()
        finally:
            await server.stop()

    asyncio.run(serve())


class ServerThread:
    """A server on an event loop of its own, for a process that has other things to do."""

    def __init__(self, services: Sequence[Service], listening: Listening) -> None:
        """Listen; raises what `GrpcServer.start` raises."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grpc", daemon=True)
        self._thread.start()
        self._server = GrpcServer(services, listening)
        try:
            self.address = self._do(self._server.start())
        except BaseException:
            self._end()
            raise

    def _do(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_START_SECONDS)

    def close(self, grace: float = 0.0) -> None:
        """End the server and its thread; calls under way have `grace` seconds to end by themselves."""
        self._do(self._server.stop(grace))
        self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_START_SECONDS)
        self._loop.close()


_Result = TypeVar("_Result")
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]]"


class _Doorkeeper(grpc.aio.ServerInterceptor):
    """Turns away whoever does not know the token, whatever the method, before anything that was sent is looked at."""

    def __init__(self, token: str, health: Any) -> None:
        self._token, self._health = token.encode(), health
        self._probes = 0
        # Of these kinds because they read no message; a caller of any other kind understands the answer.
        self._denial: _Handler = grpc.stream_stream_rpc_method_handler(self._deny)
        self._probe: _Handler = grpc.stream_unary_rpc_method_handler(
            self._answer_probe, response_serializer=health_pb2.HealthCheckResponse.SerializeToString
        )

    async def intercept_service(self, continuation: _Continuation, details: grpc.HandlerCallDetails) -> _Handler | None:
        if self._is_known(details):
            return await continuation(details)
        # The probe of whoever runs the container has no token.
        return self._probe if details.method == _HEALTH_CHECK else self._denial

    def _is_known(self, details: grpc.HandlerCallDetails) -> bool:
        shown = [value for key, value in details.invocation_metadata or () if key == "authorization"]
        if len(shown) != 1:
            return False
        value = shown[0] if isinstance(shown[0], bytes) else shown[0].encode()
        scheme, _, token = value.partition(b" ")
        return hmac.compare_digest(token.strip(), self._token) and scheme.lower() == b"bearer"

    async def _answer_probe(self, _: Any, context: Any) -> Any:
        """Tell how the server as a whole is, whatever was asked: who never sends the question holds no call with it."""
        if self._probes >= MOST_PROBES:
            await _abort(context, Overloaded(f"{self._probes} health checks without a token are under way already"))
        self._probes += 1
        context.add_done_callback(self._probed)  # later than this answers, where the caller does not take the answer
        return await self._health.Check(health_pb2.HealthCheckRequest(), context)

    def _probed(self, _: Any) -> None:
        self._probes -= 1

    @staticmethod
    async def _deny(_: Any, context: Any) -> None:
        code, text, trailers = to_status(Unauthenticated("this server wants a token: authorization: Bearer TOKEN"))
        await context.abort(code, text, trailers)


class _Translator(grpc.aio.ServerInterceptor):
    """Turns errors into status codes, those of reading a message too."""

    def __init__(self) -> None:
        self._handlers: dict[str, _Handler] = {}

    async def intercept_service(self, continuation: _Continuation, details: grpc.HandlerCallDetails) -> _Handler | None:
        known = self._handlers.get(details.method)
        if known is None:
            handler = await continuation(details)
            if handler is None:
                return None
            known = self._handlers[details.method] = _translating(handler)
        return known


def _translating(handler: Any) -> _Handler:
    """Return a handler like the given one that reads its requests itself, to say what was wrong and not to wait long.

    It takes a stream of them in any case, because before a handler of a single one is called core waits for that one.
    """
    asks, answers = (
        "stream" if streams else "unary" for streams in (handler.request_streaming, handler.response_streaming)
    )
    inner, read = getattr(handler, f"{asks}_{answers}"), _reader(handler.request_deserializer)

    async def requests_of(raw: Any) -> Any:
        return _read_each(raw, read) if handler.request_streaming else read(await _first_of(raw))

    async def answer(raw: Any, context: Any) -> Any:
        try:
            return await inner(await requests_of(raw), context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(context, error)

    async def answer_each(raw: Any, context: Any) -> None:
        try:
            # Closed here, so that it ends with the call, not when it is collected.
            async with contextlib.aclosing(inner(await requests_of(raw), context)) as responses:
                async for response in responses:
                    await in_time(context.write(response), IDLE_SECONDS, "the caller to take an answer")
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(context, error)

    make: Any = getattr(grpc, f"stream_{answers}_rpc_method_handler")
    behaviour = answer_each if inspect.isasyncgenfunction(inner) else answer
    made: _Handler = make(behaviour, response_serializer=handler.response_serializer)
    return made


def _reader(deserialize: Any) -> Callable[[bytes | None], Any]:
    name = getattr(getattr(deserialize, "__self__", None), "__name__", "message")

    def read(raw: bytes | None) -> Any:
        if raw is None:
            raise ConfigurationError(f"the call ended without its {name}")
        try:
            return deserialize(raw)
        except DecodeError as error:
            raise ConfigurationError(f"{len(raw)} bytes came that are no {name}") from error

    return read


async def _read_each(raw: AsyncIterator[bytes], read: Callable[[bytes | None], Any]) -> AsyncIterator[Any]:
    message = await _first_of(raw)
    while message is not None:
        yield read(message)
        message = await anext(raw, None)


async def _first_of(raw: AsyncIterator[bytes]) -> bytes | None:
    """Return the first message of a call, or None if it has none."""
    return await in_time(anext(raw, None), FIRST_MESSAGE_SECONDS, "the call's first message")


async def in_time(waited_for: Awaitable[_Result], seconds: float, what: str) -> _Result:
    """Wait for something that a caller must do.

    Raises:
        DeadlineExceeded: it was not done within `seconds`.
    """
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await waited_for
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlineExceeded(f"waited {seconds:g} s for {what}") from error


async def _abort(context: Any, error: Exception) -> None:
    if isinstance(error, grpc.aio.AioRpcError):
        # A server behind this one said so.
        trailers = tuple((key, value) for key, value in error.trailing_metadata() or () if key == TRAILER)
        await context.abort(error.code(), error.details() or "", trailers)
    if isinstance(error, NotImplementedError) and context.code() is grpc.StatusCode.UNIMPLEMENTED:
        # So says gRPC's own base class of a service for a method that is not overridden.
        await context.abort(context.code(), context.details())
    code, text, named = to_status(error)
    await context.abort(code, text, named)
