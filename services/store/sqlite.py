"""The run store in an SQLite file, for several processes of one machine."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from replay.errors import ConfigurationError
from services.errors import StoreUnavailable, UnknownCommand
from services.store.base import HISTORY, RunStore, StoreHealth
from services.store.payloads import clean_text, metrics_from_json, metrics_to_json, payload_from_json, plain_payload
from services.store.records import (
    UNREAD_COMMAND,
    Command,
    Event,
    MetricsRow,
    ProcessIdentity,
    RunRecord,
    as_read,
    check_adoptable,
    check_integer,
    check_live,
    check_owner,
    check_record,
    check_state,
    check_time,
    name_in_use,
    unknown_run,
)
from services.store.sqlite_connection import SQLiteConnection

_RECORD_COLUMNS = (
    "name, created, algorithm, environment, seed, host, pid, pid_started, state, heartbeat, stopped_because, config"
)


class _NoSuchRun(Exception):
    """Raised inside a transaction for an unknown run; the arguments are its name and the names of all runs."""


class SQLiteRunStore(RunStore):
    """A `RunStore` in one SQLite file, for processes that share a disk. The first call opens the file.

    With `create=False` a missing file is not created: the store reads as empty, every name is unknown, and `register`
    raises `StoreUnavailable`. A file that is deleted later counts as unavailable.

    Args:
        path: path of the file; its folder is created too.
        create: whether to create a missing file.
        timeout_seconds: time that a call may wait for other processes to unlock the file.
        history: number of metrics rows, of events, and of commands that are kept for each run.
    """

    def __init__(
        self, path: Path | str, *, create: bool = True, timeout_seconds: float = 5.0, history: int = HISTORY
    ) -> None:
        if not timeout_seconds > 0:
            raise ConfigurationError(f"a store's timeout must be positive, got {timeout_seconds}")
        check_integer("a store's history", history, least=1)
        self.path = Path(path).absolute()
        self._create = create
        self._history = history
        self._connection = SQLiteConnection(self.path, create, timeout_seconds)

    def with_timeout(self, seconds: float) -> SQLiteRunStore:
        """See `RunStore.with_timeout`."""
        store = SQLiteRunStore(self.path, create=self._create, timeout_seconds=seconds, history=self._history)
        store._connection.has_existed = self._connection.has_existed
        return store

    def close(self) -> None:
        """Close the file; later calls raise `StoreUnavailable`."""
        self._connection.close()

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
            if not self._connection.has_file:
                raise StoreUnavailable(f"there is no run store at {self.path}")
            taken = connection.execute("SELECT 1 FROM runs WHERE name = ?", (record.name,)).fetchone()
            if taken:
                raise name_in_use(record.name)
            connection.execute(
                f"INSERT INTO runs ({_RECORD_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    record.name,
                    float(record.created),
                    record.algorithm,
                    record.environment,
                    str(record.seed),  # text, because a seed may have more than 64 bits
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
            record = self._stored_record(connection, name)
        return as_read(record)

    def list_runs(self) -> list[RunRecord]:
        """See `RunStore.list_runs`."""
        with self._transaction() as connection:
            rows = connection.execute(f"SELECT {_RECORD_COLUMNS} FROM runs ORDER BY created DESC, name").fetchall()
        return [as_read(_record(row)) for row in rows]

    def update_state(
        self, name: str, state: str, stopped_because: str | None = None, *, owner: ProcessIdentity | None = None
    ) -> None:
        """See `RunStore.update_state`."""
        check_state(state)
        reason = None if stopped_because is None else clean_text(stopped_because)
        with self._transaction(write=True) as connection:
            check_owner(self._stored_record(connection, name), owner)
            self._update(connection, name, "state = ?, stopped_because = COALESCE(?, stopped_because)", (state, reason))

    def adopt(self, name: str, host: str, pid: int, pid_started: float) -> RunRecord:
        """See `RunStore.adopt`."""
        check_time("pid_started", pid_started)
        check_integer("pid", pid, least=1)
        unread = json.dumps(UNREAD_COMMAND)
        with self._transaction(write=True) as connection:
            check_adoptable(self._stored_record(connection, name))
            self._update(
                connection,
                name,
                "host = ?, pid = ?, pid_started = ?, state = 'starting', heartbeat = ?, stopped_because = NULL",
                (host, int(pid), float(pid_started), time.time()),
            )
            connection.execute("UPDATE commands SET result = ? WHERE run = ? AND result IS NULL", (unread, name))
            return self._stored_record(connection, name)

    def write_snapshot(
        self, name: str, snapshot: Mapping[str, Any], heartbeat: float, *, owner: ProcessIdentity | None = None
    ) -> None:
        """See `RunStore.write_snapshot`."""
        check_time("heartbeat", heartbeat)
        text = json.dumps(plain_payload("snapshot", snapshot))
        with self._transaction(write=True) as connection:
            check_owner(self._stored_record(connection, name), owner)
            self._update(connection, name, "snapshot = ?, heartbeat = ?", (text, float(heartbeat)))

    def read_snapshot(self, name: str) -> dict[str, Any] | None:
        """See `RunStore.read_snapshot`."""
        with self._transaction() as connection:
            self._stored_record(connection, name)
            (text,) = connection.execute("SELECT snapshot FROM runs WHERE name = ?", (name,)).fetchone()
        return payload_from_json(text)

    def send_command(self, name: str, kind: str, arguments: Mapping[str, Any]) -> int:
        """See `RunStore.send_command`."""
        text = json.dumps(plain_payload("arguments", arguments))
        with self._transaction(write=True) as connection:
            check_live(self._stored_record(connection, name), kind)
            return self._append(
                connection, "commands", name, time.time(), {"kind": clean_text(kind), "arguments": text}
            )

    def pending_commands(self, name: str) -> list[Command]:
        """See `RunStore.pending_commands`."""
        with self._transaction() as connection:
            self._stored_record(connection, name)
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
            check_owner(self._stored_record(connection, name), owner)
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
            self._stored_record(connection, name)
            self._append(connection, "events", name, time, values)

    def events(self, name: str, limit: int = 100, after_id: int | None = None) -> list[Event]:
        """See `RunStore.events`."""
        check_integer("limit", limit, least=1)
        query = "SELECT id, time, kind, text FROM events WHERE run = ? AND id > ? ORDER BY id"
        with self._transaction() as connection:
            self._stored_record(connection, name)
            if after_id is None:
                rows = connection.execute(f"{query} DESC LIMIT ?", (name, 0, limit)).fetchall()[::-1]
            else:
                rows = connection.execute(f"{query} LIMIT ?", (name, after_id, limit)).fetchall()
        return [Event(*row) for row in rows]

    def add_metrics(self, name: str, step: int, values: Mapping[str, float], time: float) -> None:
        """See `RunStore.add_metrics`."""
        check_integer("step", step, least=0)
        check_time("the metrics' time", time)
        columns = {"step": int(step), "values": metrics_to_json(values)}
        with self._transaction(write=True) as connection:
            self._stored_record(connection, name)
            self._append(connection, "metrics", name, time, columns)

    def metrics(self, name: str, limit: int = HISTORY) -> list[MetricsRow]:
        """See `RunStore.metrics`."""
        check_integer("limit", limit, least=1)
        with self._transaction() as connection:
            self._stored_record(connection, name)
            rows = connection.execute(
                'SELECT step, time, "values" FROM metrics WHERE run = ? ORDER BY id DESC LIMIT ?',
                (name, limit),
            ).fetchall()
        return [MetricsRow(step, moment, metrics_from_json(text)) for step, moment, text in reversed(rows)]

    # Transactions.

    @contextmanager
    def _transaction(self, write: bool = False) -> Iterator[sqlite3.Connection]:
        try:
            with self._connection.transaction(write) as connection:
                yield connection
        except _NoSuchRun as error:
            missing = error.args
        else:
            return
        raise unknown_run(*missing)  # after the transaction, because the search for similar names takes time

    # Inside a transaction.

    @staticmethod
    def _stored_record(connection: sqlite3.Connection, name: str) -> RunRecord:
        row = connection.execute(f"SELECT {_RECORD_COLUMNS} FROM runs WHERE name = ?", (name,)).fetchone()
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
            SQLiteRunStore._stored_record(connection, name)
            raise UnknownCommand(f"run {name!r} has no command {id}")
        return payload_from_json(row[0])

    def _append(
        self, connection: sqlite3.Connection, table: str, name: str, time: float, values: Mapping[str, object]
    ) -> int:
        """Append a row under the run's next id and drop the oldest rows; ids are consecutive, so no count is needed."""
        (id,) = connection.execute(f"SELECT COALESCE(MAX(id), 0) + 1 FROM {table} WHERE run = ?", (name,)).fetchone()
        columns = ", ".join(f'"{column}"' for column in values)
        connection.execute(
            f"INSERT INTO {table} (run, id, time, {columns}) VALUES (?, ?, ?{', ?' * len(values)})",
            (name, id, float(time), *values.values()),
        )
        connection.execute(f"DELETE FROM {table} WHERE run = ? AND id <= ?", (name, id - self._history))
        return int(id)


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
