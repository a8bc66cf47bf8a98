"""The run store: the interface that every store implements.

A run's coordinator writes a snapshot and a heartbeat every second and reads commands. `squall runs`, `squall status`,
`squall stop`, and the gRPC services read the snapshots and send the commands, so no process has to attach to a run.

`sqlite.SQLiteRunStore` keeps the data in a file that several processes of one machine share, `redis.RedisRunStore` in a
server that several machines share. Both pass the same test suite. A coordinator writes through
`buffered.BufferedWriter`, so training continues while the store is unavailable.

Conventions. Times are Unix seconds. Payloads are JSON objects: a tuple is read back as a list, and NaN and infinities
are read back as None, because `--json` prints payloads and JSON cannot represent these numbers. Only metrics keep NaN
and infinities, because a diverged loss must stay visible. The state "lost" is never written: readers derive it for a
run that has stopped reporting.
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
"""Number of metrics rows, of events, and of commands that a store keeps for each run; the oldest are dropped first."""

_POLL_TIMEOUT_SECONDS = 2.0


@dataclass(frozen=True)
class StoreHealth:
    """The health of a store's server.

    Attributes:
        server: kind, version, and address of the server.
        clock: time in Unix seconds by the server's clock; None if the server has no clock of its own.
        warnings: settings of the server that may lose runs, each with its remedy.
    """

    server: str
    clock: float | None
    warnings: tuple[str, ...] = ()


class RunStore(ABC):
    """The interface of a run store. Threads and processes may call a store concurrently.

    Every method may raise `StoreUnavailable`, within the store's timeout, and `StoreIncompatible`. Every method that
    takes a run's name raises `UnknownRun` if no run has this name. Every change is atomic.

    The coordinator of a lost run may still be running, cut off from the store, while another coordinator adopts the
    run. Therefore a write with `owner` raises `RunTakenOver` and changes nothing if the run has another owner. A write
    without `owner` is always accepted.
    """

    @abstractmethod
    def with_timeout(self, seconds: float) -> RunStore:
        """Return a second client of the same store, whose calls raise `StoreUnavailable` after about `seconds`."""

    @abstractmethod
    def close(self) -> None:
        """Close files and connections; later calls raise `StoreUnavailable`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def health(self) -> StoreHealth:
        """Connect to the store and return its health."""

    @abstractmethod
    def register(self, record: RunRecord) -> None:
        """Add a new run.

        Raises:
            RunNameInUse: a run, live or ended, has this name. If two processes register the same name concurrently, one
                of them gets this error.
            ConfigurationError: an invalid name, state, or time.
            NotStorable: a configuration that JSON cannot represent.
        """

    @abstractmethod
    def get(self, name: str) -> RunRecord:
        """Return the record of a run; its state is `lost` if the run has stopped reporting.

        Raises:
            UnknownRun: no run has this name; the message lists the most similar names.
        """

    @abstractmethod
    def list_runs(self) -> list[RunRecord]:
        """Return all runs, newest first."""

    @abstractmethod
    def update_state(
        self, name: str, state: str, stopped_because: str | None = None, *, owner: ProcessIdentity | None = None
    ) -> None:
        """Write a run's state; a reason of None keeps the reason that is already stored.

        Raises:
            RunTakenOver: the run no longer belongs to `owner`.
            ConfigurationError: an unknown state, or `lost`, which is never written.
        """

    @abstractmethod
    def adopt(self, name: str, host: str, pid: int, pid_started: float) -> RunRecord:
        """Take over an ended or lost run to resume it, and return its record: `starting`, with a new heartbeat.

        Commands that the previous coordinator has not read are acknowledged with `{"error": ...}`: a stop that was sent
        to the previous coordinator must not stop the next one.

        Raises:
            RunIsLive: the run has a coordinator, or its process on this host still exists but is stuck. If two
                processes adopt a run concurrently, one of them gets this error.
        """

    @abstractmethod
    def write_snapshot(
        self, name: str, snapshot: Mapping[str, Any], heartbeat: float, *, owner: ProcessIdentity | None = None
    ) -> None:
        """Replace the run's snapshot and heartbeat.

        Raises:
            RunTakenOver: the run no longer belongs to `owner`.
            NotStorable: a snapshot that JSON cannot represent.
            ConfigurationError: a heartbeat that is not a valid time.
        """

    @abstractmethod
    def read_snapshot(self, name: str) -> dict[str, Any] | None:
        """Return the last snapshot; None before the first."""

    @abstractmethod
    def send_command(self, name: str, kind: str, arguments: Mapping[str, Any]) -> int:
        """Queue a command for the run's coordinator and return its id.

        Raises:
            RunIsNotLive: the run has ended or is lost.
            NotStorable: arguments that JSON cannot represent.
        """

    @abstractmethod
    def pending_commands(self, name: str) -> list[Command]:
        """Return the commands that are not acknowledged yet, oldest first."""

    @abstractmethod
    def acknowledge(
        self, name: str, id: int, result: Mapping[str, Any], *, owner: ProcessIdentity | None = None
    ) -> None:
        """Store the answer to a command; only the first answer counts.

        Raises:
            UnknownCommand: the run has no command with this id.
            RunTakenOver: the run no longer belongs to `owner`.
            NotStorable: a result that JSON cannot represent.
        """

    @abstractmethod
    def command_result(self, name: str, id: int) -> dict[str, Any] | None:
        """Return the answer to a command, or None if there is none yet.

        Raises:
            UnknownCommand: the run has no command with this id.
        """

    def wait_for_acknowledgement(self, name: str, id: int, deadline_seconds: float) -> dict[str, Any]:
        """Block until a command is answered, and return the answer; the wait continues while the store is unavailable.

        Raises:
            StoreTimeout: no answer within `deadline_seconds`, or a few seconds more if the store does not respond. The
                message states the run's state.
            UnknownCommand: the run has no command with this id.
        """
        deadline = time.monotonic() + deadline_seconds
        awaited = f"command {id}"
        with self.with_timeout(_POLL_TIMEOUT_SECONDS) as store:
            while True:
                try:
                    result = store.command_result(name, id)
                    if result is not None:
                        return result
                    kind = next((command.kind for command in store.pending_commands(name) if command.id == id), "")
                    run = store.get(name)
                    awaited = f"run {name!r} to answer {kind!r} (command {id}); the run is {run.state}"
                    if run.stopped_because:
                        awaited += f": {run.stopped_because}"
                except StoreUnavailable as error:
                    awaited = f"run {name!r} to answer command {id}; {error}"
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise StoreTimeout(f"waited {deadline_seconds:g} s for {awaited}")
                time.sleep(min(0.05, remaining))

    @abstractmethod
    def add_event(self, name: str, kind: str, text: str, time: float) -> None:
        """Append an event to the run's events; the oldest beyond `HISTORY` are dropped.

        Raises:
            ConfigurationError: an invalid time.
        """

    @abstractmethod
    def events(self, name: str, limit: int = 100, after_id: int | None = None) -> list[Event]:
        """Return events, oldest first: the newest `limit`, or the first `limit` after the event `after_id`.

        A client that follows a run passes the last id that it has read (0 for "from the beginning") and misses no
        event.
        """

    @abstractmethod
    def add_metrics(self, name: str, step: int, values: Mapping[str, float], time: float) -> None:
        """Append a row to the run's metrics; the oldest rows beyond `HISTORY` are dropped.

        Raises:
            NotStorable: a metric that is not a number.
            ConfigurationError: an invalid step or time.
        """

    @abstractmethod
    def metrics(self, name: str, limit: int = HISTORY) -> list[MetricsRow]:
        """Return the newest `limit` rows of metrics, oldest first."""
