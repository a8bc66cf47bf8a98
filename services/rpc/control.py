"""RunControl over gRPC: what `services.control` does, from any language. The store's calls block: threads make them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar

import grpc

from replay.errors import ConfigurationError
from services.errors import Overloaded
from services.rpc import squall_pb2 as pb
from services.rpc import squall_pb2_grpc
from services.rpc.server import Service
from services.store import remote_control
from services.store.base import RunStore
from services.store.records import RunRecord

MOST_EVENTS = 100
_QUESTIONS_AT_ONCE = 8
_COMMANDS_AT_ONCE = 32
_WATCHES_AT_ONCE = 128
_MOST_INT64 = 2**63 - 1

_Answer = TypeVar("_Answer")
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class RunControlService(squall_pb2_grpc.RunControlServicer, Service):
    """Asks and commands the runs of a store."""

    name = "squall.v1.RunControl"

    def __init__(self, store: RunStore) -> None:
        """Hold the store, which whoever made it closes."""
        self._store = store
        self._asking = ThreadPoolExecutor(_QUESTIONS_AT_ONCE, "store")
        # Apart from the questions: a command waits for its run, and must not keep others from asking.
        self._commanding = ThreadPoolExecutor(_COMMANDS_AT_ONCE, "command")
        self._watches = 0
        self._commands: set[Future[dict[str, Any]]] = set()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register this service's methods."""
        squall_pb2_grpc.add_RunControlServicer_to_server(self, server)

    async def stop(self) -> None:
        """Begin no more calls of the store."""
        for executor in (self._asking, self._commanding):
            executor.shutdown(wait=False, cancel_futures=True)

    async def ListRuns(self, request: pb.ListRunsRequest, context: _Context) -> pb.ListRunsResponse:
        """Return all runs, newest first."""
        return pb.ListRunsResponse(runs=map(_run, await self._ask(self._store.list_runs)))

    async def Status(self, request: pb.StatusRequest, context: _Context) -> pb.RunStatus:
        """Return what is known of a run."""
        if not 0 <= request.events <= MOST_EVENTS:
            raise ConfigurationError(f"events must be a whole number from 0 to {MOST_EVENTS}, got {request.events}")
        return run_status(
            await self._ask(lambda: remote_control.status(self._store, request.run, events=request.events))
        )

    async def Watch(self, request: pb.WatchRequest, context: _Context) -> AsyncIterator[pb.RunStatus]:
        """Yield what is known of a run, once a second, until it has ended or is lost."""
        if self._watches >= _WATCHES_AT_ONCE:
            raise Overloaded(f"{self._watches} calls watch runs already, each a question a second; try again later")
        self._watches += 1
        try:
            async for status in self._watch(request.run):
                yield status
        finally:
            self._watches -= 1

    async def _watch(self, run: str) -> AsyncIterator[pb.RunStatus]:
        follower = await self._ask(lambda: remote_control.Follower(self._store, run))
        clock = asyncio.get_running_loop().time
        while True:
            begun = clock()
            news = await self._ask(follower.look)
            if news is not None:
                yield run_status(news.plain())
                if news.last:
                    return
            await asyncio.sleep(max(0.0, begun + remote_control.LOOK_SECONDS - clock()))

    async def Scale(self, request: pb.ScaleRequest, context: _Context) -> pb.ScaleResponse:
        """Change the number of a run's rollout workers."""
        answer = await self._command(request.run, "scale", {"actors": request.actors}, context)
        return pb.ScaleResponse(before=answer["before"], actors=answer["actors"])

    async def Checkpoint(self, request: pb.CheckpointRequest, context: _Context) -> pb.CheckpointResponse:
        """Have a run write a checkpoint."""
        answer = await self._command(request.run, "checkpoint", {}, context)
        return pb.CheckpointResponse(checkpoint=answer["checkpoint"], weights_version=answer["weights_version"])

    async def Stop(self, request: pb.StopRequest, context: _Context) -> pb.StopResponse:
        """End a run in order."""
        await self._command(request.run, "stop", {}, context)
        return pb.StopResponse()

    async def _ask(self, question: Callable[[], _Answer]) -> _Answer:
        return await _in(self._asking, question)

    async def _command(self, run: str, kind: str, arguments: Mapping[str, Any], context: _Context) -> dict[str, Any]:
        waiting = len(self._commands)
        if waiting >= _COMMANDS_AT_ONCE:
            raise Overloaded(f"{waiting} commands wait for their runs already; try again when they are answered")
        left = context.time_remaining()
        seconds = remote_control.COMMAND_SECONDS if left is None else min(remote_control.COMMAND_SECONDS, left)
        working = self._commanding.submit(remote_control.command, self._store, run, kind, arguments, seconds=seconds)
        self._commands.add(working)
        # A caller may go before the thread is done, which only then is free for another.
        working.add_done_callback(self._commands.discard)
        return await asyncio.wrap_future(working)


async def _in(executor: Executor, work: Callable[[], _Answer]) -> _Answer:
    return await asyncio.get_running_loop().run_in_executor(executor, work)


def _run(record: RunRecord) -> pb.Run:
    return pb.Run(
        name=record.name,
        algorithm=record.algorithm,
        environment=record.environment,
        seed=min(record.seed, _MOST_INT64),
        state=record.state,
        created=record.created,
        stopped_because=record.stopped_because or "",
    )


_PLAIN_FIGURES = (
    "heartbeat", "env_steps", "steps", "updates", "episodes", "weights_version", "env_steps_per_second",
    "updates_per_second", "samples_per_insert", "train_return_mean", "best_return", "actors",
)  # fmt: skip


def run_status(told: Mapping[str, Any]) -> pb.RunStatus:
    """Return what `services.control.status` tells as a message; what is not known yet is left out."""
    replay = told.get("replay") or {}
    return pb.RunStatus(
        run=pb.Run(
            name=told["run"],
            algorithm=told["algorithm"],
            environment=told["environment"],
            seed=min(told["seed"], _MOST_INT64),
            state=told["state"],
            created=told["created"],
            stopped_because=told["stopped_because"] or "",
        ),
        **{key: told[key] for key in _PLAIN_FIGURES if told.get(key) is not None},
        replay_size=replay.get("size", 0),
        replay_bytes=replay.get("bytes", 0),
        waiting=told.get("waiting", {}),
        processes=[pb.Process(**_known(process)) for process in told.get("processes", ())],
        events=[pb.Event(**event) for event in told["events"]],
    )


def _known(process: Mapping[str, Any]) -> dict[str, Any]:
    fields = pb.Process.DESCRIPTOR.fields_by_name
    return {key: value for key, value in process.items() if key in fields and value is not None}
