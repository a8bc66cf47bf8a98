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

import difflib
import json
import math
import os
import re
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from types import TracebackType
from typing import Any, NamedTuple, Self

import psutil

from replay.types import ConfigurationError, DeadlineExceeded, SquallError

LIVE_STATES = ("starting", "running", "stopping")
ENDED_STATES = ("finished", "failed")
LOST = "lost"
LOST_AFTER = 10.0
"""Seconds without a heartbeat after which a live run reads lost."""
HISTORY = 10_000
"""Rows of metrics, of events and of commands that are kept for one run; the oldest go first."""

_LONGEST_TEXT = 20_000
_LOOK_SECONDS = 2.0
# psutil reckons a process's start from the boot time, which is in whole seconds and may wander by one.
_START_TOLERANCE = 2.0


class RunNameInUse(SquallError):
    """Another run, alive or ended, has this name: choose another, or resume that one."""


class UnknownRun(SquallError, LookupError):
    """No run has this name; the text lists the nearest."""


class UnknownCommand(SquallError, LookupError):
    """The run was never sent this command, or so long ago that it is forgotten."""


class RunIsLive(SquallError):
    """The run has a coordinator already: stop that one first."""


class RunAdopted(SquallError):
    """Another coordinator has resumed the run: this one must end, and write nothing into it."""


class RunIsNotLive(SquallError):
    """The run ended or is lost, so nobody would read the command."""


class StoreUnavailable(SquallError):
    """The store does not answer now (locked, deleted, disk full); the same call may work later."""


class StoreIncompatible(SquallError):
    """The store was made by a newer Squall, or by something else: use another, or upgrade."""


class StoreTimeout(DeadlineExceeded):
    """A command was not acknowledged in time; it stays queued."""


class NotStorable(SquallError, TypeError):
    """A payload holds something that JSON cannot; the text says where."""


class ProcessIdentity(NamedTuple):
    """One process of one machine, so that neither a reused pid nor another host's is mistaken for it."""

    host: str
    pid: int
    pid_started: float


def this_process() -> ProcessIdentity:
    """Identify the calling process as `RunRecord` and `RunStore.adopt` want it."""
    return ProcessIdentity(socket.gethostname(), os.getpid(), psutil.Process().create_time())


@dataclass(frozen=True)
class RunRecord:
    """What is known of one run.

    Attributes:
        name: unique among all runs of a store, and a folder's name.
        created: Unix seconds.
        algorithm: such as `"dqn"`.
        environment: the environment's id.
        seed: the run's seed, from which all others come.
        host: name of the machine on which the coordinator runs.
        pid: the coordinator's process there.
        pid_started: that process's creation time in Unix seconds, as psutil gives it.
        state: `starting`, `running`, `stopping`, `finished` or `failed`; when read also `lost`.
        heartbeat: Unix seconds at which the coordinator last said that it is alive.
        stopped_because: why the run stopped, stops or reads lost; None while it goes on.
        config: the resolved configuration.
    """

    name: str
    created: float
    algorithm: str
    environment: str
    seed: int
    host: str
    pid: int
    pid_started: float
    state: str
    heartbeat: float
    stopped_because: str | None
    config: dict[str, Any]

    @property
    def live(self) -> bool:
        """Whether a coordinator is at work on it."""
        return self.state in LIVE_STATES

    @property
    def owner(self) -> ProcessIdentity:
        """Its coordinator's process."""
        return ProcessIdentity(self.host, self.pid, self.pid_started)


@dataclass(frozen=True)
class Command:
    """A wish that somebody sent to a run.

    Attributes:
        id: 1, 2, 3, ... within the run.
        time: Unix seconds when it was sent.
        kind: such as `"stop"`.
        arguments: what the kind needs.
    """

    id: int
    time: float
    kind: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Event:
    """Something that happened to a run; `id` counts 1, 2, 3, ... in the run, `time` is in Unix seconds."""

    id: int
    time: float
    kind: str
    text: str


@dataclass(frozen=True)
class MetricsRow:
    """Metrics of one moment: `step` in environment steps, `time` in Unix seconds, `values` by metric name."""

    step: int
    time: float
    values: dict[str, float]


# What every store does alike: checks, JSON, and what a reader makes of a record.


def check_run_name(name: str) -> None:
    """Raise `ConfigurationError` unless `name` can be a run's name, which is a folder's name too."""
    if not _can_be_named(name):
        raise ConfigurationError(
            "a run name has up to 100 letters, digits, dots, dashes and underscores"
            f" and starts with a letter or digit, got {name!r}"
        )


def _can_be_named(name: str) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) is not None


def check_state(state: str) -> None:
    """Raise `ConfigurationError` unless `state` may be written."""
    if state not in LIVE_STATES + ENDED_STATES:
        raise ConfigurationError(f"a run's state is one of {', '.join(LIVE_STATES + ENDED_STATES)}, got {state!r}")


def check_record(record: RunRecord) -> None:
    """Raise `ConfigurationError` unless `record` may be registered."""
    check_run_name(record.name)
    check_state(record.state)
    for field in ("created", "pid_started", "heartbeat"):
        check_time(field, getattr(record, field))
    check_whole("pid", record.pid, least=1)
    if not isinstance(record.seed, Integral):
        raise ConfigurationError(f"a run's seed must be a whole number, got {record.seed!r}")


def check_time(what: str, seconds: float) -> None:
    """Raise `ConfigurationError` unless `seconds` is a moment: finite, and not before 1970."""
    if not (isinstance(seconds, Real) and math.isfinite(seconds) and seconds >= 0):
        raise ConfigurationError(f"{what} must be Unix seconds, got {seconds!r}")


def check_whole(what: str, number: int, least: int) -> None:
    """Raise `ConfigurationError` unless `number` is a whole number of at least `least` that 64 bits hold."""
    if not isinstance(number, Integral) or not least <= number < 2**63:
        raise ConfigurationError(f"{what} must be a whole number of at least {least}, got {number!r}")


def clean_text(text: str) -> str:
    """Make `text` storable: valid UTF-8, at most 20,000 characters, with a word on what was cut."""
    if len(text) > _LONGEST_TEXT:
        text = f"{text[:_LONGEST_TEXT]}... ({len(text) - _LONGEST_TEXT} characters more)"
    return text.encode("utf-8", "replace").decode()


def plain_payload(what: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a payload into plain JSON types; NaN and infinities become None.

    Raises:
        NotStorable: something that is not plain; the text names the place.
    """
    if not isinstance(payload, Mapping):
        raise NotStorable(f"{what} must be a dict, got {type(payload).__name__}")
    plain: dict[str, Any] = _plain(what, payload)
    return plain


def _plain(where: str, value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(f"{where}[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise NotStorable(f"keys of {where} must be text, got {key!r}")
        return {_plain(where, key): _plain(f"{where}[{key!r}]", item) for key, item in value.items()}
    raise NotStorable(f"{where} must be plain numbers, text, lists or dicts, got {type(value).__name__}")


def plain_metrics(values: Mapping[str, float]) -> dict[str, float]:
    """Copy metrics into Python floats, NaN and infinities too. Raises `NotStorable`, naming the metric."""
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Real):
            raise NotStorable(f"metric {name!r} must be a number, got {value!r} ({type(value).__name__})")
    return {name: float(value) for name, value in values.items()}


def metrics_to_json(values: Mapping[str, float]) -> str:
    """Write metrics as JSON that any language reads: `"nan"`, `"inf"` and `"-inf"` become text."""
    return json.dumps(
        {name: value if math.isfinite(value) else str(value) for name, value in plain_metrics(values).items()}
    )


def metrics_from_json(text: str) -> dict[str, float]:
    """Undo `metrics_to_json`."""
    return {name: float(value) for name, value in json.loads(text).items()}


def unknown_run(name: str, known: list[str]) -> UnknownRun:
    """Make the error for a name that no run has; it may be anything that a caller sent."""
    if not _can_be_named(name):
        return UnknownRun(f"no run is named {str(name)[:100]!r}: a run's name cannot be that")
    if not known:
        return UnknownRun(f"no run is named {name!r}: there are no runs yet")
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if nearest:
        return UnknownRun(f"no run is named {name!r}; the nearest: {', '.join(nearest)}")
    return UnknownRun(f"no run is named {name!r} among the {len(known)} that `squall runs` lists")


def as_read(record: RunRecord) -> RunRecord:
    """Turn a record as written into one as read: a run that should live and does not is `lost`, and why."""
    if not record.live:
        return record
    silence = time.time() - record.heartbeat
    if record.host == socket.gethostname() and not _is_there(record.pid, record.pid_started):
        return replace(record, state=LOST, stopped_because=f"its process {record.pid} is gone")
    if silence > LOST_AFTER:
        return replace(record, state=LOST, stopped_because=f"no heartbeat for {silence:.0f} s")
    return record


def check_adoptable(record: RunRecord) -> None:
    """Raise `RunIsLive` if `record`, as written, may have a coordinator at work on it."""
    seen = as_read(record)
    if seen.live:
        raise RunIsLive(
            f"run {record.name!r} is {seen.state} (process {record.pid} on {record.host}); stop it before resuming it"
        )
    # Suspended or stuck is not dead: it would wake up and write into the same run.
    if seen.state == LOST and record.host == socket.gethostname() and _is_there(record.pid, record.pid_started):
        raise RunIsLive(
            f"run {record.name!r} has {seen.stopped_because}, but its process {record.pid} still exists;"
            " end that process before resuming the run"
        )


def check_owner(record: RunRecord, owner: ProcessIdentity | None) -> None:
    """Raise `RunAdopted` if `record`, as written, is another coordinator's than `owner`; None stands for any."""
    if owner is not None and record.owner != owner:
        raise RunAdopted(
            f"run {record.name!r} was resumed by process {record.pid} on {record.host}, because this one was not heard "
            f"of for {LOST_AFTER:.0f} s: it ends here and goes on there"
        )


def _is_there(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < _START_TOLERANCE and process.status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False


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
    nothing once another has adopted the run, and raises `RunAdopted`; without `owner` anybody may write.
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
            RunAdopted: the run is not `owner`'s any more.
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
            RunAdopted: the run is not `owner`'s any more.
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
        """Answer a command. The first answer stands. Raises `UnknownCommand`, `RunAdopted`, or `NotStorable`."""

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
