"""RunStore: where runs are registered, and where a run and its visitors leave word for each other.

The coordinator writes a snapshot and a heartbeat every second and reads commands; `squall runs | status |
stop` and the gRPC front read the former and write the latter. Nobody attaches to a run's processes to ask.

One contract, `RunStore`: `sqlite_store.SQLiteRunStore` keeps a file that several processes of one machine share,
`redis_store.RedisRunStore` a server that several machines share; both pass the same test-suite. `BufferedWriter`
is the coordinator's pen: a store that is away stops no training.

Conventions. Times are Unix seconds. Payloads are JSON objects: tuples come back as lists, and NaN and
infinities come back as None, because `--json` passes payloads on and JSON has no word for them. Metrics
alone keep NaN and infinities: a loss that diverged is worth knowing. "lost" is never written: it is what a
reader sees of a run that stopped reporting.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from services.errors import StoreTimeout, StoreUnavailable
from services.store.records import Command, Event, MetricsRow, ProcessIdentity, RunRecord

HISTORY = 10_000
"""Rows of metrics, of events and of commands that are kept for one run; the oldest go first."""

_LOOK_SECONDS = 2.0


# What every store does alike: checks, JSON, and what a reader makes of a record.


@dataclass(frozen=True)
class StoreHealth:
    """What a store's server says of itself.

    Attributes:
        server: what it is.
        clock: Unix seconds by the server's clock; None where it has none of its own.
        warnings: what about it may lose runs, each with what to do.
    """

    server: str
    clock: float | None
    warnings: tuple[str, ...] = ()


class RunStore(ABC):
    """The contract. Calls may come from any thread, and from several processes at once.

    Every method may raise `StoreUnavailable`, within the store's timeout, and `StoreIncompatible`. Every
    method that takes a run's name raises `UnknownRun` where there is none. Every change is all or nothing.

    A run that reads lost may have a coordinator that only cannot be heard. What it writes as `owner` changes
    nothing once another has adopted the run, and raises `RunTakenOver`; without `owner` anybody may write.
    """

    @abstractmethod
    def with_timeout(self, seconds: float) -> RunStore:
        """Open the same store once more; its calls give up (`StoreUnavailable`) after about `seconds`."""

    @abstractmethod
    def close(self) -> None:
        """Let go of files and connections; calls after that raise `StoreUnavailable`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def health(self) -> StoreHealth:
        """Reach the store and say how it is."""

    @abstractmethod
    def register(self, record: RunRecord) -> None:
        """Enter a new run.

        Raises:
            RunNameInUse: a run, even one that ended, has this name; of two registrations at once one fails.
            ConfigurationError: a name, state or time that cannot be.
            NotStorable: a configuration that is not plain.
        """

    @abstractmethod
    def get(self, name: str) -> RunRecord:
        """Read one run, `lost` if it stopped reporting. Raises `UnknownRun` with the nearest names."""

    @abstractmethod
    def list_runs(self) -> list[RunRecord]:
        """Read all runs, newest first."""

    @abstractmethod
    def update_state(
        self, name: str, state: str, stopped_because: str | None = None, *, owner: ProcessIdentity | None = None
    ) -> None:
        """Write a run's state; a reason of None leaves the reason that is there.

        Raises:
            RunTakenOver: the run is not `owner`'s any more.
            ConfigurationError: there is no such state, or (`lost`) it is none to write.
        """

    @abstractmethod
    def adopt(self, name: str, host: str, pid: int, pid_started: float) -> RunRecord:
        """Take over an ended or lost run, to resume it: it is `starting`, with a fresh heartbeat.

        Commands that its last coordinator did not read are acknowledged with `{"error": ...}`: a stop that
        was meant for that one must not stop this one.

        Raises:
            RunIsLive: the run has a coordinator, or (on this host) a process that is stuck; of two
                adoptions at once one fails.
        """

    @abstractmethod
    def write_snapshot(
        self, name: str, snapshot: Mapping[str, Any], heartbeat: float, *, owner: ProcessIdentity | None = None
    ) -> None:
        """Replace the run's snapshot and heartbeat.

        Raises:
            RunTakenOver: the run is not `owner`'s any more.
            NotStorable: a snapshot that is not plain.
            ConfigurationError: a heartbeat that is no moment.
        """

    @abstractmethod
    def read_snapshot(self, name: str) -> dict[str, Any] | None:
        """Read the last snapshot, None if there was none yet."""

    @abstractmethod
    def send_command(self, name: str, kind: str, arguments: Mapping[str, Any]) -> int:
        """Queue a command for the run's coordinator and return its id.

        Raises:
            RunIsNotLive: the run ended or is lost.
            NotStorable: arguments that are not plain.
        """

    @abstractmethod
    def pending_commands(self, name: str) -> list[Command]:
        """Read the commands not acknowledged yet, oldest first."""

    @abstractmethod
    def acknowledge(
        self, name: str, id: int, result: Mapping[str, Any], *, owner: ProcessIdentity | None = None
    ) -> None:
        """Answer a command. The first answer stands. Raises `UnknownCommand`, `RunTakenOver`, or `NotStorable`."""

    @abstractmethod
    def command_result(self, name: str, id: int) -> dict[str, Any] | None:
        """Read the answer to a command, None if there is none yet. Raises `UnknownCommand`."""

    def wait_for_acknowledgement(self, name: str, id: int, deadline_seconds: float) -> dict[str, Any]:
        """Wait for a command's answer and return it; a store that is away meanwhile is waited for too.

        Raises:
            StoreTimeout: no answer within `deadline_seconds`, or seconds more where the store is silent; the text
                says what was waited for.
            UnknownCommand: there is no such command.
        """
        deadline = time.monotonic() + deadline_seconds
        waited_for = f"command {id}"
        with self.with_timeout(_LOOK_SECONDS) as store:
            while True:
                try:
                    result = store.command_result(name, id)
                    if result is not None:
                        return result
                    kind = next((command.kind for command in store.pending_commands(name) if command.id == id), "")
                    run = store.get(name)
                    waited_for = f"run {name!r} to answer {kind!r} (command {id}); the run is {run.state}"
                    if run.stopped_because:
                        waited_for += f": {run.stopped_because}"
                except StoreUnavailable as error:
                    waited_for = f"run {name!r} to answer command {id}; {error}"
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise StoreTimeout(f"waited {deadline_seconds:g} s for {waited_for}")
                time.sleep(min(0.05, remaining))

    @abstractmethod
    def add_event(self, name: str, kind: str, text: str, time: float) -> None:
        """Append to the run's events; the oldest beyond `HISTORY` are dropped.

        Raises:
            ConfigurationError: a time that cannot be.
        """

    @abstractmethod
    def events(self, name: str, limit: int = 100, after_id: int | None = None) -> list[Event]:
        """Read events, oldest first: the newest `limit`, or the first `limit` after the event `after_id`.

        A follower passes the last id that it has seen (0 for "from the beginning") and misses none.
        """

    @abstractmethod
    def add_metrics(self, name: str, step: int, values: Mapping[str, float], time: float) -> None:
        """Append to the run's metrics; the oldest rows beyond `HISTORY` are dropped.

        Raises:
            NotStorable: a metric that is no number.
            ConfigurationError: a step or time that cannot be.
        """

    @abstractmethod
    def metrics(self, name: str, limit: int = HISTORY) -> list[MetricsRow]:
        """Read the newest `limit` rows of metrics, oldest first."""
