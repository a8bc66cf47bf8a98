"""The gateway: one gRPC port for all runs of a store.

The gateway serves RunControl from the store, and forwards Policy and Experience to the endpoint of the run. A gateway
has no state of its own: the run's coordinator records the endpoint in the store, and the gateway looks it up there.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from replay.errors import ConfigurationError
from services.errors import NotReady, OutOfOrder, RunIsNotLive, ServesNothing
from services.rpc import squall_pb2 as pb
from services.rpc import squall_pb2_grpc
from services.rpc.auth import TOKEN_VARIABLE, ServerConfig, is_loopback, split_address
from services.rpc.control import RunControlService
from services.rpc.errors import is_from_squall
from services.rpc.server import CHANNEL_OPTIONS, Service, serve_until_signal
from services.store.base import RunStore
from services.store.locate import open_default_store

# Statuses with which gRPC reports a broken connection; the second if the connection breaks during a message.
_BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)
CACHE_SECONDS = 1.0
"""Seconds for which a gateway reuses the address of an endpoint before it looks the endpoint up again."""
_MAX_IDLE_CHANNELS = 64
_LOOKUP_THREADS = 8

_Message = TypeVar("_Message")


def find_endpoint(store: RunStore, run: str, service: str) -> str:
    """Return the address of a live run's endpoint that offers `service`, given by its full name.

    Raises:
        ConfigurationError: an empty name of a run.
        UnknownRun: no run has this name.
        RunIsNotLive: the run has ended or is lost.
        ServesNothing: the run was started without `--serve`, or serves its own machine only.
        NotReady: the endpoint is starting.
    """
    if not run:
        raise ConfigurationError("name a run: a gateway serves all runs of its store")
    record = store.get(run)
    short = service.rpartition(".")[2]
    if not record.live:
        raise RunIsNotLive(f"run {run!r} is {record.state}; `squall serve {run}` serves a policy from its checkpoint")
    # A starting run has no snapshot until Ray is running.
    endpoints = (store.read_snapshot(run) or {}).get("endpoints", [] if record.state == "starting" else None)
    if endpoints is None:
        raise ServesNothing(f"run {run!r} serves nothing: it was started without --serve")
    if not endpoints:
        raise NotReady(f"run {run!r} is {record.state}, and its endpoint is not ready")
    offering = [endpoint for endpoint in endpoints if service in endpoint["services"]]
    if not offering:
        raise ServesNothing(f"run {run!r} does not serve {short}")
    address, node = offering[0]["address"], offering[0]["node"]
    if is_loopback(split_address(address)[0]) and node != socket.gethostname():
        raise ServesNothing(
            f"run {run!r} serves {short} to its own machine {node} only; start it with --serve {node}:0 and a token"
        )
    return str(address)


@dataclass
class _Connection:
    channel: grpc.aio.Channel
    calls: int = 0
    last_used: float = 0.0


class EndpointPool:
    """Connections to the endpoints of runs. Concurrent calls share lookups and connections."""

    def __init__(self, store: RunStore, token: str | None) -> None:
        """Look up endpoints in `store`, and send them `token`."""
        self._store = store
        self.metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        self._executor = ThreadPoolExecutor(_LOOKUP_THREADS, "lookup")
        # Run and service -> expiry time and lookup.
        self._addresses: dict[tuple[str, str], tuple[float, asyncio.Future[str]]] = {}
        self._connections: dict[str, _Connection] = {}

    async def _address(self, run: str, service: str) -> str:
        now, key = time.monotonic(), (run, service)
        cached = self._addresses.get(key)
        if cached is None or cached[0] < now:
            self._addresses = {key: entry for key, entry in self._addresses.items() if entry[0] >= now}
            loop = asyncio.get_running_loop()
            lookup = loop.run_in_executor(self._executor, find_endpoint, self._store, run, service)
            cached = self._addresses[key] = (now + CACHE_SECONDS, lookup)
        # Shielded, because other calls wait for the same lookup.
        return await asyncio.shield(cached[1])

    @contextlib.asynccontextmanager
    async def channel(self, run: str, service: str) -> AsyncIterator[grpc.aio.Channel]:
        """Yield a channel to the endpoint of a run.

        Raises as `find_endpoint` does, and also `NotReady` if the endpoint does not answer.
        """
        address = await self._address(run, service)
        connection = self._connections.get(address)
        if connection is None:
            channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            connection = self._connections[address] = _Connection(channel)
        connection.calls += 1
        try:
            yield connection.channel
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise ServesNothing(
                    f"the endpoint of run {run!r} has another token than this gateway: set the same "
                    f"{TOKEN_VARIABLE} for both"
                ) from error
            if error.code() in _BROKEN and not is_from_squall(error):
                self._addresses.pop((run, service), None)
                raise NotReady(
                    f"the endpoint of run {run!r} at {address} does not answer; if it has exited, it is being restarted"
                ) from error
            raise
        finally:
            connection.calls -= 1
            connection.last_used = time.monotonic()
            await self._close_idle(_MAX_IDLE_CHANNELS)

    async def _close_idle(self, limit: int) -> None:
        idle = sorted(
            (connection.last_used, address) for address, connection in self._connections.items() if not connection.calls
        )
        for _, address in idle[: max(0, len(idle) - limit)]:
            await self._connections.pop(address).channel.close()

    async def close(self) -> None:
        """Close all connections."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        for connection in self._connections.values():
            await connection.channel.close()


def serve_gateway(server_config: ServerConfig, announce: Callable[[str], None], store_url: str | None = None) -> None:
    """Serve all runs of a store until SIGINT or SIGTERM, and call `announce` with the address when ready.

    Raises:
        ConfigurationError: the address cannot be used.
    """
    with open_default_store(store_url) as store:
        serve_until_signal(gateway_services(store, server_config.token), server_config, announce)


def gateway_services(store: RunStore, token: str | None) -> list[Service]:
    """Return the services of a gateway, which sends `token` to the endpoints."""
    endpoints = EndpointPool(store, token)
    return [RunControlService(store), PolicyProxy(endpoints), ExperienceProxy(endpoints)]


class _Proxy(Service):
    """A service that forwards calls to the endpoints of runs."""

    def __init__(self, endpoints: EndpointPool) -> None:
        self._endpoints = endpoints

    async def stop(self) -> None:
        """Close the connections."""
        await self._endpoints.close()


class PolicyProxy(squall_pb2_grpc.PolicyServicer, _Proxy):
    """The Policy service, which forwards each call to the run that the request names."""

    name = "squall.v1.Policy"

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the methods of this service with a server."""
        squall_pb2_grpc.add_PolicyServicer_to_server(self, server)

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        """Return the description of the run's policy."""
        async with self._endpoints.channel(request.run, self.name) as channel:
            described: pb.DescribeResponse = await self._forward(
                squall_pb2_grpc.PolicyStub(channel).Describe, request, context
            )
            return described

    async def Act(self, request: pb.ActRequest, context: Any) -> pb.ActResponse:
        """Return actions of the run's policy."""
        async with self._endpoints.channel(request.run, self.name) as channel:
            acted: pb.ActResponse = await self._forward(squall_pb2_grpc.PolicyStub(channel).Act, request, context)
            return acted

    async def _forward(self, call: Any, request: Any, context: Any) -> Any:
        return await call(request, timeout=context.time_remaining(), metadata=self._endpoints.metadata)


class ExperienceProxy(squall_pb2_grpc.ExperienceServicer, _Proxy):
    """The Experience service, which forwards each session to the run that its first message names."""

    name = "squall.v1.Experience"

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the methods of this service with a server."""
        squall_pb2_grpc.add_ExperienceServicer_to_server(self, server)

    async def Play(self, requests: AsyncIterator[pb.PlayRequest], context: Any) -> AsyncIterator[pb.PlayResponse]:
        """Forward a session, message by message, until the client or the endpoint ends it."""
        first = await anext(requests, None)
        if first is None or first.WhichOneof("kind") != "open":
            raise OutOfOrder("a session begins with Open, which names the run")
        async with self._endpoints.channel(first.open.run, self.name) as channel:
            call = squall_pb2_grpc.ExperienceStub(channel).Play(
                _chain(first, requests), timeout=context.time_remaining(), metadata=self._endpoints.metadata
            )
            try:
                async for response in call:
                    yield response
            finally:
                call.cancel()


async def _chain(first: _Message, rest: AsyncIterator[_Message]) -> AsyncIterator[_Message]:
    yield first
    async for message in rest:
        yield message
