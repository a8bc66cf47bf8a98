"""The RunControl service: the functions of `services.store.remote_control` over gRPC, for clients in any language.

Calls of the run store block, so threads make them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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

MAX_EVENTS = 100
_READ_THREADS = 8
_MAX_COMMANDS = 32
_MAX_WATCHES = 128
_MAX_INT64 = 2**63 - 1

_Result = TypeVar("_Result")
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class RunControlService(squall_pb2_grpc.RunControlServicer, Service):
    """The service: it reads the runs of a store and sends them commands."""

    name = "squall.v1.RunControl"

    def __init__(self, store: RunStore) -> None:
        """Use a store, which the caller closes after the server has stopped."""
        self._store = store
        self._readers = ThreadPoolExecutor(_READ_THREADS, "store")
        # Separate threads, because a command waits for its run and must not delay reads.
        self._command_threads = ThreadPoolExecutor(_MAX_COMMANDS, "command")
        self._watches = 0
        self._commands: set[Future[dict[str, Any]]] = set()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the methods of this service with a server."""
        squall_pb2_grpc.add_RunControlServicer_to_server(self, server)

    async def stop(self) -> None:
        """Cancel the calls of the store that have not started."""
        for executor in (self._readers, self._command_threads):
            executor.shutdown(wait=False, cancel_futures=True)

    async def ListRuns(self, request: pb.ListRunsRequest, context: _Context) -> pb.ListRunsResponse:
        """Return all runs, newest first."""
        return pb.ListRunsResponse(runs=map(_run, await self._read(self._store.list_runs)))

    async def Status(self, request: pb.StatusRequest, context: _Context) -> pb.RunStatus:
        """Return the status of a run."""
        if not 0 <= request.events <= MAX_EVENTS:
            raise ConfigurationError(f"events must be a whole number from 0 to {MAX_EVENTS}, got {request.events}")
        return run_status(
            await self._read(lambda: remote_control.status(self._store, request.run, events=request.events))
        )

    async def Watch(self, request: pb.WatchRequest, context: _Context) -> AsyncIterator[pb.RunStatus]:
        """Yield the status of a run once a second, until the run has ended or is lost."""
        if self._watches >= _MAX_WATCHES:
            raise Overloaded(f"{self._watches} calls watch runs already; try again later")
        self._watches += 1
        try:
            async for status in self._watch(request.run):
                yield status
        finally:
            self._watches -= 1

    async def _watch(self, run: str) -> AsyncIterator[pb.RunStatus]:
        follower = await self._read(lambda: remote_control.Follower(self._store, run))
        clock = asyncio.get_running_loop().time
        while True:
            start = clock()
            update = await self._read(follower.poll)
            if update is not None:
                yield run_status(update.plain())
                if update.last:
                    return
            await asyncio.sleep(max(0.0, start + remote_control.POLL_SECONDS - clock()))

    async def Scale(self, request: pb.ScaleRequest, context: _Context) -> pb.ScaleResponse:
        """Change the number of a run's rollout workers."""
        answer = await self._command(request.run, "scale", {"actors": request.actors}, context)
        return pb.ScaleResponse(before=answer["before"], actors=answer["actors"])

    async def Checkpoint(self, request: pb.CheckpointRequest, context: _Context) -> pb.CheckpointResponse:
        """Make a run write a checkpoint."""
        answer = await self._command(request.run, "checkpoint", {}, context)
        return pb.CheckpointResponse(checkpoint=answer["checkpoint"], weights_version=answer["weights_version"])

    async def Stop(self, request: pb.StopRequest, context: _Context) -> pb.StopResponse:
        """Stop a run gracefully, with a checkpoint."""
        await self._command(request.run, "stop", {}, context)
        return pb.StopResponse()

    async def _read(self, call: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._readers, call)

    async def _command(self, run: str, kind: str, arguments: Mapping[str, Any], context: _Context) -> dict[str, Any]:
        waiting = len(self._commands)
        if waiting >= _MAX_COMMANDS:
            raise Overloaded(f"{waiting} commands are waiting for their runs already; try again later")
        remaining = context.time_remaining()
        seconds = (
            remote_control.COMMAND_SECONDS if remaining is None else min(remote_control.COMMAND_SECONDS, remaining)
        )
        future = self._command_threads.submit(
            remote_control.command, self._store, run, kind, arguments, seconds=seconds
        )
        self._commands.add(future)
        # Counted until its thread is free, even if the caller cancels the call earlier.
        future.add_done_callback(self._commands.discard)
        return await asyncio.wrap_future(future)


def _run(record: RunRecord) -> pb.Run:
    return pb.Run(
        name=record.name,
        algorithm=record.algorithm,
        environment=record.environment,
        seed=min(record.seed, _MAX_INT64),
        state=record.state,
        created=record.created,
        stopped_because=record.stopped_because or "",
    )


_SCALAR_FIELDS = (
    "heartbeat", "env_steps", "steps", "updates", "episodes", "weights_version", "env_steps_per_second",
    "updates_per_second", "samples_per_insert", "train_return_mean", "best_return", "actors",
)  # fmt: skip


def run_status(status: Mapping[str, Any]) -> pb.RunStatus:
    """Return the result of `remote_control.status` as a message, without the values that are not known yet."""
    replay = status.get("replay") or {}
    return pb.RunStatus(
        run=pb.Run(
            name=status["run"],
            algorithm=status["algorithm"],
            environment=status["environment"],
            seed=min(status["seed"], _MAX_INT64),
            state=status["state"],
            created=status["created"],
            stopped_because=status["stopped_because"] or "",
        ),
        **{key: status[key] for key in _SCALAR_FIELDS if status.get(key) is not None},
        replay_size=replay.get("size", 0),
        replay_bytes=replay.get("bytes", 0),
        waiting=status.get("waiting", {}),
        processes=[pb.Process(**_set_fields(process)) for process in status.get("processes", ())],
        events=[pb.Event(**event) for event in status["events"]],
    )


def _set_fields(process: Mapping[str, Any]) -> dict[str, Any]:
    fields = pb.Process.DESCRIPTOR.fields_by_name
    return {key: value for key, value in process.items() if key in fields and value is not None}
