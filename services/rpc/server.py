"""The gRPC server: it serves a list of services, with token and TLS, status codes for errors, health, and reflection.

A run's endpoint, `squall serve`, and `squall gateway` differ only in their list of services.
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
from services.rpc.interceptors import MAX_CALLS, MAX_MESSAGE_BYTES, ErrorInterceptor

GRACE_SECONDS = 2.0
_START_SECONDS = 30.0

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A peer that disappears without closing its connection is detected after half a minute.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)
_OPTIONS = (
    *CHANNEL_OPTIONS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),  # otherwise a second server on the port would silently get part of its calls
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: the size limit applies to the compressed message
)


class Service:
    """One gRPC service of a server. Its calls run on one event loop, between `start` and `stop`."""

    name: ClassVar[str]

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the methods of this service with a server."""
        raise NotImplementedError

    async def start(self) -> None:
        """Start background tasks."""

    async def stop(self) -> None:
        """End background tasks."""

    def note_progress(self, env_steps: int) -> None:
        """Set the number of environment steps of the run; called from another thread."""

    def finish(self) -> None:
        """Accept no more experience for the run, and notify clients; called from another thread."""

    # Shown by `squall status`; read from another thread.

    @property
    def status_message(self) -> str:
        """Summary of the service's work for people, or an empty text."""
        return ""

    @property
    def waiting_for(self) -> str | None:
        """The event that clients wait for, or None."""
        return None

    @property
    def finished(self) -> bool:
        """Whether clients have been notified that the run has all its steps."""
        return False


class GrpcServer:
    """A server on the running event loop, with standard health checking and reflection."""

    def __init__(self, services: Sequence[Service], server_config: ServerConfig) -> None:
        """Create a server that `start` starts."""
        self._services, self._server_config = services, server_config
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> str:
        """Start to listen, and return the address with the actual port.

        Raises:
            ConfigurationError: the address cannot be used, or a TLS file is invalid.
        """
        token = self._server_config.token
        interceptors = [*([TokenInterceptor(token, self._health)] if token is not None else []), ErrorInterceptor()]
        server = grpc.aio.server(interceptors=interceptors, options=_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
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
        """Accept no new calls, wait up to `grace` seconds for running calls, and stop."""
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(grace)
        for service in self._services:
            await service.stop()


def serve_until_signal(
    services: Sequence[Service], server_config: ServerConfig, announce: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM. Call this in the main thread, because only the main thread receives signals.

    Args:
        services: services of the server.
        server_config: configuration of the server.
        announce: called with the address when the server is ready.
    """

    async def serve() -> None:
        stopping, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stopping.set)
        server = GrpcServer(services, server_config)
        try:
            announce(await server.start())
            await stopping.wait()
        finally:
            await server.stop()

    asyncio.run(serve())


class ServerThread:
    """A server in a thread with an event loop of its own, for a process that also does other work."""

    def __init__(self, services: Sequence[Service], server_config: ServerConfig) -> None:
        """Start the server; raises as `GrpcServer.start` does."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grpc", daemon=True)
        self._thread.start()
        self._server = GrpcServer(services, server_config)
        try:
            self.address = self._run(self._server.start())
        except BaseException:
            self._stop_loop()
            raise

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_START_SECONDS)

    def close(self, grace: float = 0.0) -> None:
        """Stop the server and its thread; running calls have `grace` seconds to end."""
        self._run(self._server.stop(grace))
        self._stop_loop()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_START_SECONDS)
        self._loop.close()
