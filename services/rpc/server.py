"""The gRPC server: where it listens and whom it lets in, errors as status codes, health and reflection.

What it offers is a list of `Service`s; a run's endpoint, `squall serve` and `squall gateway` differ in that list alone.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ClassVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from replay.errors import ConfigurationError
from services.rpc.auth import ServerConfig, TokenInterceptor, check_free
from services.rpc.interceptors import MOST_BYTES, MOST_CALLS, ErrorInterceptor

GRACE_SECONDS = 2.0
_START_SECONDS = 30.0

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
    def status_message(self) -> str:
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

    def __init__(self, services: Sequence[Service], server_config: ServerConfig) -> None:
        """Say what to offer, and where; `start` begins."""
        self._services, self._server_config = services, server_config
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> str:
        """Listen; return the address with the port that was taken.

        Raises:
            ConfigurationError: nothing can listen there, or TLS has no such certificate.
        """
        token = self._server_config.token
        interceptors = [*([TokenInterceptor(token, self._health)] if token is not None else []), ErrorInterceptor()]
        server = grpc.aio.server(interceptors=interceptors, options=_OPTIONS, maximum_concurrent_rpcs=MOST_CALLS)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [health.SERVICE_NAME, reflection.SERVICE_NAME, *(service.name for service in self._services)]
        reflection.enable_server_reflection(names, server)
        for service in self._services:
            service.add_to(server)
        credentials, address = self._server_config.credentials(), self._server_config.address
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


def serve_until_signal(
    services: Sequence[Service], server_config: ServerConfig, announce: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM; call this in the main thread, which signals reach.

    Args:
        services: what to offer.
        server_config: where, and for whom.
        announce: told the address when the server is up.
    """

    async def serve() -> None:
        over, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, over.set)
        server = GrpcServer(services, server_config)
        try:
            announce(await server.start())
            await over.wait()
        finally:
            await server.stop()

    asyncio.run(serve())


class ServerThread:
    """A server on an event loop of its own, for a process that has other things to do."""

    def __init__(self, services: Sequence[Service], server_config: ServerConfig) -> None:
        """Listen; raises what `GrpcServer.start` raises."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grpc", daemon=True)
        self._thread.start()
        self._server = GrpcServer(services, server_config)
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
