"""SQLiteRunStore: the run store in a file that several processes of one machine share."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from replay.errors import ConfigurationError, SquallError
from services.errors import RunIsNotLive, RunNameInUse, StoreIncompatible, StoreUnavailable, UnknownCommand
from services.store.base import HISTORY, RunStore, StoreHealth
from services.store.payloads import clean_text, metrics_from_json, metrics_to_json, plain_payload
from services.store.records import (
    Command,
    Event,
    MetricsRow,
    ProcessIdentity,
    RunRecord,
    as_read,
    check_adoptable,
    check_owner,
    check_record,
    check_state,
    check_time,
    check_whole,
    unknown_run,
)

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


class _NoSuchRun(Exception):
    """Inside a transaction: the name that no run has, and those that there are."""


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

    def health(self) -> StoreHealth:
        """See `RunStore.health`."""
        with self._transaction() as connection:
            connection.execute("SELECT count(*) FROM runs").fetchone()
        return StoreHealth(f"SQLite {sqlite3.sqlite_version}, {self.path}", None)

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

    def update_state(
        self, name: str, state: str, stopped_because: str | None = None, *, owner: ProcessIdentity | None = None
    ) -> None:
        """See `RunStore.update_state`."""
        check_state(state)
        reason = None if stopped_because is None else clean_text(stopped_because)
        with self._transaction(write=True) as connection:
            check_owner(self._written(connection, name), owner)
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

    def write_snapshot(
        self, name: str, snapshot: Mapping[str, Any], heartbeat: float, *, owner: ProcessIdentity | None = None
    ) -> None:
        """See `RunStore.write_snapshot`."""
        check_time("heartbeat", heartbeat)
        text = json.dumps(plain_payload("snapshot", snapshot))
        with self._transaction(write=True) as connection:
            check_owner(self._written(connection, name), owner)
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

    def acknowledge(
        self, name: str, id: int, result: Mapping[str, Any], *, owner: ProcessIdentity | None = None
    ) -> None:
        """See `RunStore.acknowledge`."""
        text = json.dumps(plain_payload("result", result))
        with self._transaction(write=True) as connection:
            check_owner(self._written(connection, name), owner)
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
            raise _NoSuchRun(name, [known for (known,) in connection.execute("SELECT name FROM runs")])
        return _record(row)

    @staticmethod
    def _update(connection: sqlite3.Connection, name: str, assignments: str, values: tuple[object, ...]) -> None:
        connection.execute(f"UPDATE runs SET {assignments} WHERE name = ?", (*values, name))

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
        missing: tuple[Any, ...] | None = None
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
        except _NoSuchRun as error:
            missing = error.args
        except (sqlite3.ProgrammingError, sqlite3.IntegrityError):
            raise
        except sqlite3.DatabaseError as error:
            self._disconnect()
            raise self._translated(error) from error
        except OSError as error:
            raise StoreUnavailable(f"run store {self.path}: {error.strerror or error}") from error
        finally:
            self._lock.release()
        if missing is not None:
            raise unknown_run(*missing) from None  # only now: to find the nearest names takes time

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
