"""The one gRPC port of a cluster: RunControl from the store, Policy and Experience passed on to the run's endpoint.

It keeps nothing: a run's endpoint is looked up in the store, where the run's coordinator records it.
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
from services.rpc.auth import TOKEN, ServerConfig, is_loopback, split_address
from services.rpc.control import RunControlService
from services.rpc.errors import names_itself
from services.rpc.server import CHANNEL_OPTIONS, Service, serve_until_signal
from services.store.base import RunStore
from services.store.locate import open_default_store

# What gRPC itself says of a connection that breaks, the second where it breaks while a message is on its way.
_BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)
KNOWN_SECONDS = 1.0
"""How long an endpoint that was looked up is believed to be there."""
_MOST_IDLE_CHANNELS = 64
_LOOKUPS_AT_ONCE = 8

_Message = TypeVar("_Message")


def find_endpoint(store: RunStore, run: str, service: str) -> str:
    """Return the address of the endpoint that offers `service`, a full name, of a live run.

    Raises:
        ConfigurationError: no run is named.
        UnknownRun: there is no such run.
        RunIsNotLive: it ended or is lost.
        ServesNothing: it was started without `--serve`, or offers this to its own machine alone.
        NotReady: it will offer this, and does not yet.
    """
    if not run:
        raise ConfigurationError("name a run: a gateway has many")
    record = store.get(run)
    short = service.rpartition(".")[2]
    if not record.live:
        raise RunIsNotLive(f"run {run!r} is {record.state}; `squall serve {run}` serves a policy from its checkpoint")
    # The coordinator's first snapshot comes when Ray is up.
    endpoints = (store.read_snapshot(run) or {}).get("endpoints", [] if record.state == "starting" else None)
    if endpoints is None:
        raise ServesNothing(f"run {run!r} serves nothing: it was started without --serve")
    if not endpoints:
        raise NotReady(f"run {run!r} is {record.state}, and its endpoint is not up")
    offering = [endpoint for endpoint in endpoints if service in endpoint["services"]]
    if not offering:
        raise ServesNothing(f"run {run!r} does not serve {short}")
    address, node = offering[0]["address"], offering[0]["node"]
    if is_loopback(split_address(address)[0]) and node != socket.gethostname():
        raise ServesNothing(
            f"run {run!r} serves {short} to its own machine {node} alone; start it with --serve {node}:0 and a token"
        )
    return str(address)


@dataclass
class _Channel:
    channel: grpc.aio.Channel
    calls: int = 0
    used: float = 0.0


class Endpoints:
    """The way to runs' endpoints: looks them up, a moment's worth at once, and keeps connections."""

    def __init__(self, store: RunStore, token: str | None) -> None:
        """Look in `store`, and show `token` to endpoints."""
        self._store = store
        self.metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        self._executor = ThreadPoolExecutor(_LOOKUPS_AT_ONCE, "lookup")
        self._known: dict[tuple[str, str], tuple[float, asyncio.Future[str]]] = {}
        self._channels: dict[str, _Channel] = {}

    async def _address(self, run: str, service: str) -> str:
        now, key = time.monotonic(), (run, service)
        known = self._known.get(key)
        if known is None or known[0] < now:
            self._known = {key: entry for key, entry in self._known.items() if entry[0] >= now}
            loop = asyncio.get_running_loop()
            found = loop.run_in_executor(self._executor, find_endpoint, self._store, run, service)
            known = self._known[key] = (now + KNOWN_SECONDS, found)
        # Shielded: others wait for the same answer.
        return await asyncio.shield(known[1])

    @contextlib.asynccontextmanager
    async def channel(self, run: str, service: str) -> AsyncIterator[grpc.aio.Channel]:
        """Yield a connection to the endpoint of a run; raises as `find_endpoint` does, and `NotReady`."""
        address = await self._address(run, service)
        held = self._channels.get(address)
        if held is None:
            held = self._channels[address] = _Channel(grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS))
        held.calls += 1
        try:
            yield held.channel
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise ServesNothing(
                    f"the endpoint of run {run!r} wants another token than this gateway's: both take {TOKEN}"
                ) from error
            if error.code() in _BROKEN and not names_itself(error):
                self._known.pop((run, service), None)
                raise NotReady(
                    f"the endpoint of run {run!r} at {address} does not answer; if it died it is being recreated"
                ) from error
            raise
        finally:
            held.calls -= 1
            held.used = time.monotonic()
            await self._close_idle(_MOST_IDLE_CHANNELS)

    async def _close_idle(self, most: int) -> None:
        idle = sorted((held.used, address) for address, held in self._channels.items() if not held.calls)
        for _, address in idle[: max(0, len(idle) - most)]:
            await self._channels.pop(address).channel.close()

    async def close(self) -> None:
        """Close all connections."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        for held in self._channels.values():
            await held.channel.close()


def serve_gateway(server_config: ServerConfig, announce: Callable[[str], None], store_url: str | None = None) -> None:
    """Be the one port for all runs of a store, until SIGINT or SIGTERM; `announce` is told the address.

    Raises:
        ConfigurationError: nothing can listen there.
    """
    with open_default_store(store_url) as store:
        serve_until_signal(gateway_services(store, server_config.token), server_config, announce)


def gateway_services(store: RunStore, token: str | None) -> list[Service]:
    """Return what a gateway offers; `token` is what it shows to endpoints."""
    endpoints = Endpoints(store, token)
    return [RunControlService(store), PolicyProxy(endpoints), ExperienceProxy(endpoints)]


class _Proxy(Service):
    """Passes calls on."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._endpoints = endpoints

    async def stop(self) -> None:
        """Close the connections."""
        await self._endpoints.close()


class PolicyProxy(squall_pb2_grpc.PolicyServicer, _Proxy):
    """Passes Policy's calls on to the run that the request names."""

    name = "squall.v1.Policy"

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register this service's methods."""
        squall_pb2_grpc.add_PolicyServicer_to_server(self, server)

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        """Pass it on."""
        async with self._endpoints.channel(request.run, self.name) as channel:
            described: pb.DescribeResponse = await self._pass_on(
                squall_pb2_grpc.PolicyStub(channel).Describe, request, context
            )
            return described

    async def Act(self, request: pb.ActRequest, context: Any) -> pb.ActResponse:
        """Pass it on."""
        async with self._endpoints.channel(request.run, self.name) as channel:
            acted: pb.ActResponse = await self._pass_on(squall_pb2_grpc.PolicyStub(channel).Act, request, context)
            return acted

    async def _pass_on(self, call: Any, request: Any, context: Any) -> Any:
        return await call(request, timeout=context.time_remaining(), metadata=self._endpoints.metadata)


class ExperienceProxy(squall_pb2_grpc.ExperienceServicer, _Proxy):
    """Passes sessions on to the run that their first message names."""

    name = "squall.v1.Experience"

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register this service's methods."""
        squall_pb2_grpc.add_ExperienceServicer_to_server(self, server)

    async def Play(self, requests: AsyncIterator[pb.PlayRequest], context: Any) -> AsyncIterator[pb.PlayResponse]:
        """Pass a session on, message by message, until either side ends it."""
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
    async for each in rest:
        yield each
