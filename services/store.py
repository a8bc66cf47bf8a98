"""RunStore: where runs are registered, and where a run and its visitors leave word for each other.

The coordinator writes a snapshot and a heartbeat every second and reads commands; `squall runs | status |
stop` and the gRPC front read the former and write the latter. Nobody attaches to a run's processes to ask.

One contract, `RunStore`. `SQLiteRunStore` keeps a file that several processes of one machine share; other
stores pass the same test-suite. `BufferedWriter` is the coordinator's pen: a store that is away stops no
training.

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
import sqlite3
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral, Real
from pathlib import Path
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
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ConfigurationError(
            "a run name has up to 100 letters, digits, dots, dashes and underscores"
            f" and starts with a letter or digit, got {name!r}"
        )


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
    """Make the error for a name that no run has."""
    if not known:
        return UnknownRun(f"no run is named {name!r}: there are no runs yet")
    nearest = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    if nearest:
        return UnknownRun(f"no run is named {name!r}; the nearest: {', '.join(nearest)}")
    return UnknownRun(f"no run is named {name!r}; there are {len(known)}, see `squall runs`")


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


def _is_there(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < _START_TOLERANCE and process.status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False


class RunStore(ABC):
    """The contract. Calls may come from any thread, and from several processes at once.

    Every method may raise `StoreUnavailable`, within the store's timeout, and `StoreIncompatible`. Every
    method that takes a run's name raises `UnknownRun` where there is none. Every change is all or nothing.
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
    def update_state(self, name: str, state: str, stopped_because: str | None = None) -> None:
        """Write a run's state; a reason of None leaves the reason that is there.

        Raises:
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
    def write_snapshot(self, name: str, snapshot: Mapping[str, Any], heartbeat: float) -> None:
        """Replace the run's snapshot and heartbeat.

        Raises:
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
    def acknowledge(self, name: str, id: int, result: Mapping[str, Any]) -> None:
        """Answer a command. The first answer stands. Raises `UnknownCommand`, or `NotStorable`."""

    @abstractmethod
    def command_result(self, name: str, id: int) -> dict[str, Any] | None:
        """Read the answer to a command, None if there is none yet. Raises `UnknownCommand`."""

    def wait_for_acknowledgement(self, name: str, id: int, deadline_seconds: float) -> dict[str, Any]:
        """Wait for a command's answer and return it; a store that is away meanwhile is waited for too.

        Raises:
            StoreTimeout: no answer within `deadline_seconds`; the text says what was waited for.
            UnknownCommand: there is no such command.
        """
        deadline = time.monotonic() + deadline_seconds
        waited_for = f"command {id}"
        with self.with_timeout(0.25) as store:
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


_APPLICATION_ID = 0x53514C4C  # "SQLL": what other programs write is left alone
_SCHEMA_VERSION = 1
_SCHEMA = (
    """CREATE TABLE runs (
        name TEXT PRIMARY KEY, created REAL NOT NULL, algorithm TEXT NOT NULL, environment TEXT NOT NULL,
        seed TEXT NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL, pid_started REAL NOT NULL,
        state TEXT NOT NULL, heartbeat REAL NOT NULL, stopped_because TEXT, config TEXT NOT NULL,
        snapshot TEXT) WITHOUT ROWID""",
    """CREATE TABLE commands (
        run TEXT NOT NULL, id INTEGER NOT NULL, time REAL NOT NULL, kind TEXT NOT NULL,
        arguments TEXT NOT NULL, result TEXT, PRIMARY KEY (run, id)) WITHOUT ROWID""",
    """CREATE TABLE events (
        run TEXT NOT NULL, id INTEGER NOT NULL, time REAL NOT NULL, kind TEXT NOT NULL,
        text TEXT NOT NULL, PRIMARY KEY (run, id)) WITHOUT ROWID""",
    """CREATE TABLE metrics (
        run TEXT NOT NULL, id INTEGER NOT NULL, time REAL NOT NULL, step INTEGER NOT NULL,
        "values" TEXT NOT NULL, PRIMARY KEY (run, id)) WITHOUT ROWID""",
)
_RECORD = (
    "name, created, algorithm, environment, seed, host, pid, pid_started, state, heartbeat, stopped_because, config"
)


class SQLiteRunStore(RunStore):
    """A `RunStore` in one SQLite file, for processes that share a disk.

    The file is opened on first use. With `create=False` a missing file is not made: the store reads as
    empty, every name is unknown, and `register` raises `StoreUnavailable`. A file that is deleted later
    counts as unavailable.

    Args:
        path: the file; its folder is made too.
        create: whether to make a missing file.
        timeout_seconds: how long a call may wait for other processes to unlock the file.
        history: rows of metrics, of events and of commands kept for a run.
    """

    def __init__(
        self, path: Path | str, *, create: bool = True, timeout_seconds: float = 5.0, history: int = HISTORY
    ) -> None:
        if not timeout_seconds > 0:
            raise ConfigurationError(f"a store's timeout must be positive, got {timeout_seconds}")
        check_whole("a store's history", history, least=1)
        self.path = Path(path).absolute()
        self._create = create
        self._timeout = timeout_seconds
        self._history = history
        # One connection under one lock: calls are short, and threads that come and go leave none open.
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._existed = False
        self._closed = False

    def with_timeout(self, seconds: float) -> SQLiteRunStore:
        """Open the same file once more, with calls that give up after about `seconds`."""
        store = SQLiteRunStore(self.path, create=self._create, timeout_seconds=seconds, history=self._history)
        store._existed = self._existed
        return store

    def close(self) -> None:
        """Close the file; calls after that raise `StoreUnavailable`."""
        with self._lock:
            self._closed = True
            self._disconnect()

    def register(self, record: RunRecord) -> None:
        """See `RunStore.register`."""
        check_record(record)
        config = json.dumps(plain_payload("config", record.config))
        with self._transaction(write=True) as connection:
            if self._file is None:
                raise StoreUnavailable(f"there is no run store at {self.path}")
            taken = connection.execute("SELECT 1 FROM runs WHERE name = ?", (record.name,)).fetchone()
            if taken:
                raise RunNameInUse(f"a run named {record.name!r} exists already: choose another name, or resume it")
            connection.execute(
                f"INSERT INTO runs ({_RECORD}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    record.name,
                    float(record.created),
                    record.algorithm,
                    record.environment,
                    str(record.seed),  # a seed may have more than 64 bits
                    record.host,
                    int(record.pid),
                    float(record.pid_started),
                    record.state,
                    float(record.heartbeat),
                    None if record.stopped_because is None else clean_text(record.stopped_because),
                    config,
                ),
            )

    def get(self, name: str) -> RunRecord:
        """See `RunStore.get`."""
        with self._transaction() as connection:
            record = self._written(connection, name)
        return as_read(record)

    def list_runs(self) -> list[RunRecord]:
        """See `RunStore.list_runs`."""
        with self._transaction() as connection:
            rows = connection.execute(f"SELECT {_RECORD} FROM runs ORDER BY created DESC, name").fetchall()
        return [as_read(_record(row)) for row in rows]

    def update_state(self, name: str, state: str, stopped_because: str | None = None) -> None:
        """See `RunStore.update_state`."""
        check_state(state)
        reason = None if stopped_because is None else clean_text(stopped_because)
        with self._transaction(write=True) as connection:
            self._update(connection, name, "state = ?, stopped_because = COALESCE(?, stopped_because)", (state, reason))

    def adopt(self, name: str, host: str, pid: int, pid_started: float) -> RunRecord:
        """See `RunStore.adopt`."""
        check_time("pid_started", pid_started)
        check_whole("pid", pid, least=1)
        unread = json.dumps({"error": "the run was resumed before it read this command"})
        with self._transaction(write=True) as connection:
            check_adoptable(self._written(connection, name))
            self._update(
                connection,
                name,
                "host = ?, pid = ?, pid_started = ?, state = 'starting', heartbeat = ?, stopped_because = NULL",
                (host, int(pid), float(pid_started), time.time()),
            )
            connection.execute("UPDATE commands SET result = ? WHERE run = ? AND result IS NULL", (unread, name))
            return self._written(connection, name)

    def write_snapshot(self, name: str, snapshot: Mapping[str, Any], heartbeat: float) -> None:
        """See `RunStore.write_snapshot`."""
        check_time("heartbeat", heartbeat)
        text = json.dumps(plain_payload("snapshot", snapshot))
        with self._transaction(write=True) as connection:
            self._update(connection, name, "snapshot = ?, heartbeat = ?", (text, float(heartbeat)))

    def read_snapshot(self, name: str) -> dict[str, Any] | None:
        """See `RunStore.read_snapshot`."""
        with self._transaction() as connection:
            self._written(connection, name)
            (text,) = connection.execute("SELECT snapshot FROM runs WHERE name = ?", (name,)).fetchone()
        return _payload(text)

    def send_command(self, name: str, kind: str, arguments: Mapping[str, Any]) -> int:
        """See `RunStore.send_command`."""
        text = json.dumps(plain_payload("arguments", arguments))
        with self._transaction(write=True) as connection:
            record = as_read(self._written(connection, name))
            if not record.live:
                reason = f" ({record.stopped_because})" if record.stopped_because else ""
                raise RunIsNotLive(f"run {name!r} is {record.state}{reason}: nobody would read {kind!r}")
            return self._append(
                connection, "commands", name, time.time(), {"kind": clean_text(kind), "arguments": text}
            )

    def pending_commands(self, name: str) -> list[Command]:
        """See `RunStore.pending_commands`."""
        with self._transaction() as connection:
            self._written(connection, name)
            rows = connection.execute(
                "SELECT id, time, kind, arguments FROM commands WHERE run = ? AND result IS NULL ORDER BY id",
                (name,),
            ).fetchall()
        return [Command(id, sent, kind, json.loads(arguments)) for id, sent, kind, arguments in rows]

    def acknowledge(self, name: str, id: int, result: Mapping[str, Any]) -> None:
        """See `RunStore.acknowledge`."""
        text = json.dumps(plain_payload("result", result))
        with self._transaction(write=True) as connection:
            if self._result(connection, name, id) is None:
                connection.execute("UPDATE commands SET result = ? WHERE run = ? AND id = ?", (text, name, id))

    def command_result(self, name: str, id: int) -> dict[str, Any] | None:
        """See `RunStore.command_result`."""
        with self._transaction() as connection:
            return self._result(connection, name, id)

    def add_event(self, name: str, kind: str, text: str, time: float) -> None:
        """See `RunStore.add_event`."""
        check_time("an event's time", time)
        values = {"kind": clean_text(kind), "text": clean_text(text)}
        with self._transaction(write=True) as connection:
            self._written(connection, name)
            self._append(connection, "events", name, time, values)

    def events(self, name: str, limit: int = 100, after_id: int | None = None) -> list[Event]:
        """See `RunStore.events`."""
        check_whole("limit", limit, least=1)
        query = "SELECT id, time, kind, text FROM events WHERE run = ? AND id > ? ORDER BY id"
        with self._transaction() as connection:
            self._written(connection, name)
            if after_id is None:
                rows = connection.execute(f"{query} DESC LIMIT ?", (name, 0, limit)).fetchall()[::-1]
            else:
                rows = connection.execute(f"{query} LIMIT ?", (name, after_id, limit)).fetchall()
        return [Event(*row) for row in rows]

    def add_metrics(self, name: str, step: int, values: Mapping[str, float], time: float) -> None:
        """See `RunStore.add_metrics`."""
        check_whole("step", step, least=0)
        check_time("the metrics' time", time)
        columns = {"step": int(step), "values": metrics_to_json(values)}
        with self._transaction(write=True) as connection:
            self._written(connection, name)
            self._append(connection, "metrics", name, time, columns)

    def metrics(self, name: str, limit: int = HISTORY) -> list[MetricsRow]:
        """See `RunStore.metrics`."""
        check_whole("limit", limit, least=1)
        with self._transaction() as connection:
            self._written(connection, name)
            rows = connection.execute(
                'SELECT step, time, "values" FROM metrics WHERE run = ? ORDER BY id DESC LIMIT ?',
                (name, limit),
            ).fetchall()
        return [MetricsRow(step, moment, metrics_from_json(text)) for step, moment, text in reversed(rows)]

    # Within a transaction.

    @staticmethod
    def _written(connection: sqlite3.Connection, name: str) -> RunRecord:
        row = connection.execute(f"SELECT {_RECORD} FROM runs WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise unknown_run(name, [known for (known,) in connection.execute("SELECT name FROM runs")])
        return _record(row)

    def _update(self, connection: sqlite3.Connection, name: str, assignments: str, values: tuple[object, ...]) -> None:
        if connection.execute(f"UPDATE runs SET {assignments} WHERE name = ?", (*values, name)).rowcount == 0:
            self._written(connection, name)

    @staticmethod
    def _result(connection: sqlite3.Connection, name: str, id: int) -> dict[str, Any] | None:
        row = connection.execute("SELECT result FROM commands WHERE run = ? AND id = ?", (name, id)).fetchone()
        if row is None:
            SQLiteRunStore._written(connection, name)
            raise UnknownCommand(f"run {name!r} has no command {id}")
        return _payload(row[0])

    def _append(
        self, connection: sqlite3.Connection, table: str, name: str, time: float, values: Mapping[str, object]
    ) -> int:
        """Append a row under the run's next id; ids go up by one, so dropping the oldest needs no search."""
        (id,) = connection.execute(f"SELECT COALESCE(MAX(id), 0) + 1 FROM {table} WHERE run = ?", (name,)).fetchone()
        columns = ", ".join(f'"{column}"' for column in values)
        connection.execute(
            f"INSERT INTO {table} (run, id, time, {columns}) VALUES (?, ?, ?{', ?' * len(values)})",
            (name, id, float(time), *values.values()),
        )
        connection.execute(f"DELETE FROM {table} WHERE run = ? AND id <= ?", (name, id - self._history))
        return int(id)

    # The file.

    @contextmanager
    def _transaction(self, write: bool = False) -> Iterator[sqlite3.Connection]:
        """All or nothing, and alone if `write`. After an error of SQLite the next call connects anew."""
        if not self._lock.acquire(timeout=self._timeout):
            raise StoreUnavailable(f"run store {self.path}: another thread has used it for {self._timeout:g} s")
        try:
            connection = self._connect()
            # IMMEDIATE: a transaction that reads first and locks later would fail at once instead of waiting.
            begin = "BEGIN IMMEDIATE" if write else "BEGIN"
            try:
                connection.execute(begin)
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        except (sqlite3.ProgrammingError, sqlite3.IntegrityError):
            raise
        except sqlite3.DatabaseError as error:
            self._disconnect()
            raise self._translated(error) from error
        except OSError as error:
            raise StoreUnavailable(f"run store {self.path}: {error.strerror or error}") from error
        finally:
            self._lock.release()

    def _translated(self, error: sqlite3.DatabaseError) -> SquallError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest of an extended code is detail
        if code == sqlite3.SQLITE_NOTADB:
            return StoreIncompatible(f"{self.path} is no SQLite file, so no run store; move it away or name another")
        waited = f" (waited {self._timeout:g} s)" if code == sqlite3.SQLITE_BUSY else ""
        return StoreUnavailable(f"run store {self.path}: {error}{waited}")

    def _connect(self) -> sqlite3.Connection:
        if self._closed:
            raise StoreUnavailable(f"run store {self.path} was closed")
        file = _identity(self.path)
        if self._connection is not None and file == self._file:
            return self._connection
        self._disconnect()
        if file is None and self._existed:
            raise StoreUnavailable(f"run store {self.path} was deleted or moved away")
        if file is None and not self._create:
            self._connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        else:
            if file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            mode = "rwc" if file is None else "rw"
            self._connection = sqlite3.connect(
                f"{self.path.as_uri()}?mode={mode}",
                uri=True,
                timeout=self._timeout,
                isolation_level=None,
                check_same_thread=False,
            )
        try:
            self._prepare(self._connection)
        except BaseException:
            self._disconnect()
            raise
        self._file = _identity(self.path) if self._create or file is not None else None
        self._existed = self._file is not None
        return self._connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        # In this order: another process may be making the schema, tables and marks in one transaction.
        has_tables = connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is not None
        if has_tables and _pragma(connection, "application_id") != _APPLICATION_ID:
            raise StoreIncompatible(f"{self.path} is an SQLite file of something else; name another for the run store")
        version = _pragma(connection, "user_version")
        if version > _SCHEMA_VERSION:
            raise StoreIncompatible(
                f"{self.path} is a run store of version {version}, made by a newer Squall;"
                f" this one reads up to version {_SCHEMA_VERSION}: upgrade, or use another store"
            )
        # With a write-ahead log readers and writer do not wait for each other. Some disks cannot have one.
        try:
            (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
            if mode == "delete":
                (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        except sqlite3.OperationalError:
            mode = "delete"
        if mode == "wal":
            connection.execute("PRAGMA synchronous = NORMAL")
        if version == 0:
            connection.execute("BEGIN IMMEDIATE")
            if _pragma(connection, "user_version") == 0:
                for statement in _SCHEMA:
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            connection.execute("COMMIT")

    def _disconnect(self) -> None:
        connection, self._connection, self._file = self._connection, None, None
        if connection is not None:
            connection.close()


def _record(row: tuple[Any, ...]) -> RunRecord:
    name, created, algorithm, environment, seed, host, pid, started, state, heartbeat, reason, config = row
    return RunRecord(
        name,
        created,
        algorithm,
        environment,
        int(seed),
        host,
        pid,
        started,
        state,
        heartbeat,
        reason,
        json.loads(config),
    )


def _payload(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    payload: dict[str, Any] = json.loads(text)
    return payload


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def open_store(url: str | None, home: Path, *, create: bool = True, timeout_seconds: float = 5.0) -> RunStore:
    """Open the store that `--store` names; nothing is touched before the first call.

    Args:
        url: None for the file `squall.db` in `home`; `sqlite:///relative/path` or `sqlite:////absolute/path`.
        home: the runs' folder.
        create: False for a reader: a store that does not exist is not made and reads as empty.
        timeout_seconds: how long a call may wait for the store.

    Raises:
        ConfigurationError: (a ValueError) a URL that names no store.
    """
    if url is None:
        return SQLiteRunStore(home / "squall.db", create=create, timeout_seconds=timeout_seconds)
    prefix = "sqlite:///"
    path = url.removeprefix(prefix)
    if not url.startswith(prefix) or path.strip("/") in ("", ":memory:"):
        shown = re.sub(r"//[^/]*@", "//***@", url)  # a URL may carry a password
        raise ConfigurationError(f"a store is sqlite:///relative/file.db or sqlite:////absolute/file.db, got {shown!r}")
    return SQLiteRunStore(Path(path), create=create, timeout_seconds=timeout_seconds)


class BufferedWriter:
    """Writes one run's word to a store; while the store is away, keeps it and catches up later.

    No call raises `StoreUnavailable`, and none but `flush` and `close` takes much longer than twice
    `patience_seconds`. There is no thread: each call also delivers what had to wait, `retry_seconds` after
    the last failure at the earliest. Of snapshots only the newest waits. Of the rest at most `capacity`
    wait; beyond that the oldest metrics are dropped first, then the oldest events, and counted.

    Bad values raise at once, as in `RunStore`. What the store refuses for another reason (the run was
    deleted) is dropped and counted, and the reason kept: training goes on.

    Attributes:
        name: the run.
        problem: why the last write did not reach the store, None if it did.
        dropped: how many of `metrics`, `event`, `state`, `acknowledgement` and `snapshot` were dropped.
    """

    def __init__(
        self,
        store: RunStore,
        name: str,
        *,
        capacity: int = 10_000,
        patience_seconds: float = 0.25,
        retry_seconds: float = 1.0,
    ) -> None:
        check_whole("a writer's capacity", capacity, least=1)
        self.name = name
        self.problem: str | None = None
        self.dropped: Counter[str] = Counter()
        self._store = store.with_timeout(patience_seconds)
        self._capacity = capacity
        self._patience = patience_seconds
        self._retry = retry_seconds
        self._retry_at = -math.inf
        self._lock = threading.Lock()
        self._answered: set[int] = set()
        # In the order in which they are delivered: who waits for an answer first, bulk last.
        self._queues: dict[str, deque[Callable[[], object]]] = {
            "acknowledgement": deque(),
            "snapshot": deque(maxlen=1),
            "event": deque(),
            "state": deque(),
            "metrics": deque(),
        }

    @property
    def waiting(self) -> int:
        """Writes that have not reached the store yet."""
        return sum(len(queue) for queue in self._queues.values())

    def write_snapshot(self, snapshot: Mapping[str, Any], heartbeat: float) -> None:
        """As `RunStore.write_snapshot`."""
        check_time("heartbeat", heartbeat)
        payload = plain_payload("snapshot", snapshot)
        self._write("snapshot", partial(self._store.write_snapshot, self.name, payload, heartbeat))

    def update_state(self, state: str, stopped_because: str | None = None) -> None:
        """As `RunStore.update_state`."""
        check_state(state)
        self._write("state", partial(self._store.update_state, self.name, state, stopped_because))

    def add_event(self, kind: str, text: str, time: float) -> None:
        """As `RunStore.add_event`."""
        check_time("an event's time", time)
        call = partial(self._store.add_event, self.name, clean_text(kind), clean_text(text), time)
        self._write("event", call)

    def add_metrics(self, step: int, values: Mapping[str, float], time: float) -> None:
        """As `RunStore.add_metrics`."""
        check_whole("step", step, least=0)
        check_time("the metrics' time", time)
        self._write("metrics", partial(self._store.add_metrics, self.name, step, plain_metrics(values), time))

    def acknowledge(self, id: int, result: Mapping[str, Any]) -> None:
        """As `RunStore.acknowledge`; from now on `pending_commands` leaves this command out."""
        payload = plain_payload("result", result)
        self._answered.add(id)
        self._write("acknowledgement", partial(self._store.acknowledge, self.name, id, payload))

    def pending_commands(self) -> list[Command]:
        """Commands not acknowledged through this writer yet; none while the store is away."""
        with self._lock:
            self._deliver()
            if time.monotonic() < self._retry_at:
                return []
            try:
                commands = self._store.pending_commands(self.name)
            except SquallError as error:
                self._failed(error)
                return []
        return [command for command in commands if command.id not in self._answered]

    def flush(self, deadline_seconds: float) -> bool:
        """Try to deliver everything for up to `deadline_seconds`; return whether nothing waits any more."""
        deadline = time.monotonic() + deadline_seconds
        while True:
            with self._lock:
                self._retry_at = -math.inf
                self._deliver()
                if not self.waiting:
                    return True
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            if self.problem is not None:
                time.sleep(min(0.05, remaining))

    def close(self, deadline_seconds: float = 2.0) -> bool:
        """`flush`, then let go of the store; what still waits is lost, and the answer False."""
        delivered = self.flush(deadline_seconds)
        self._store.close()
        return delivered

    def _write(self, kind: str, call: Callable[[], object]) -> None:
        with self._lock:
            self._queues[kind].append(call)
            while self.waiting - len(self._queues["snapshot"]) > self._capacity:
                oldest = next(kind for kind in ("metrics", "event", "state", "acknowledgement") if self._queues[kind])
                self._queues[oldest].popleft()
                self.dropped[oldest] += 1
            self._deliver()

    def _deliver(self) -> None:
        now = time.monotonic()
        if now < self._retry_at:
            return
        for kind, queue in self._queues.items():
            while queue:
                if time.monotonic() - now > self._patience:
                    return
                try:
                    queue[0]()
                    self.problem = None
                except StoreUnavailable as error:
                    self._failed(error)
                    return
                except SquallError as error:
                    self.dropped[kind] += 1
                    self.problem = str(error)
                queue.popleft()

    def _failed(self, error: SquallError) -> None:
        self.problem = str(error)
        self._retry_at = time.monotonic() + self._retry
