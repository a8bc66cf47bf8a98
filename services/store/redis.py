"""The run store in a Redis server, for runs and clients on several machines.

Keys, all on one server and in one database (no Redis Cluster). A run's name contains no colon, so keys cannot collide:

    squall:schema             "1", the version of this schema
    squall:runs               set: the names of all runs
    squall:run:<run>          hash: the fields of `RunRecord` as text (`config` as JSON; no `stopped_because` means
                              None), `snapshot` as JSON, and `commands`, `events`, `metrics`: the last id assigned
    squall:commands:<run>     hash: id -> {"time", "kind", "arguments"} as JSON, of commands without an answer
    squall:answers:<run>      hash: id -> the answer as JSON
    squall:events:<run>       stream: entry <id>-0 with token, time, kind, text
    squall:metrics:<run>      stream: entry <id>-0 with token, time, step, values

Each change is one Lua script or one MULTI, and therefore atomic. `adopt` and `send_command` first read the run, because
only Python can check whether a process exists, and then change the run if it has not changed since.

The store never repeats a call by itself. A call that raised `StoreUnavailable` may still have taken effect, if the
connection broke before the answer. Repeating the call on the same store object is safe for all methods that set a
value, and for events and metrics: the server looks for their token before it appends them again. A registration or a
command is sent at most once; a caller that repeats one may find that the first one has succeeded.

A server keeps acknowledged writes across its own restart only with `appendonly yes`. A snapshot that was delayed on a
broken connection may arrive after a newer one; the next snapshot, a second later, replaces it.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from replay.errors import ConfigurationError, SquallError
from services.errors import UnknownCommand
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
from services.store.redis_connection import SCHEMA_KEY, SCHEMA_VERSION, RedisConnection
from services.store.redis_scripts import ACKNOWLEDGE, ADOPT, APPEND, REGISTER, SEND, UPDATE, run_script

_RUNS_KEY = "squall:runs"
_MAX_UNCONFIRMED = 1000
_RECORD_FIELDS = (
    "name",
    "created",
    "algorithm",
    "environment",
    "seed",
    "host",
    "pid",
    "pid_started",
    "state",
    "heartbeat",
    "stopped_because",
    "config",
)


class RedisRunStore(RunStore):
    """A `RunStore` in a Redis server, version 6.2 or newer. The first call connects.

    A password that is refused by the first connection raises `ConfigurationError`. Later it counts as an outage, so
    that a `BufferedWriter` keeps its writes. No error contains the password.

    Args:
        url: a URL of one of `redis_url.SCHEMES`; user and password are percent-encoded. TLS takes `?ssl_ca_certs=FILE`,
            and `ssl_certfile` and `ssl_keyfile` if the server requires a client certificate.
        timeout_seconds: timeout of a connection attempt, and of each answer.
        history: number of metrics rows, of events, and of commands that are kept for each run.

    Raises:
        ConfigurationError: an invalid URL or option.
    """

    def __init__(self, url: str, *, timeout_seconds: float = 5.0, history: int = HISTORY) -> None:
        if not timeout_seconds > 0:
            raise ConfigurationError(f"a store's timeout must be positive, got {timeout_seconds}")
        check_integer("a store's history", history, least=1)
        self._url = url
        self._history = history
        self._connection = RedisConnection(url, timeout_seconds)
        self._lock = threading.Lock()
        # Content of an append whose call failed -> its token. The append may still have taken effect.
        self._unconfirmed: dict[tuple[str, ...], str] = {}

    def __repr__(self) -> str:
        return f"RedisRunStore({self.shown_url!r})"

    @property
    def shown_url(self) -> str:
        """The URL without its password, for people."""
        return self._connection.shown_url

    def with_timeout(self, seconds: float) -> RedisRunStore:
        """See `RunStore.with_timeout`."""
        store = RedisRunStore(self._url, timeout_seconds=seconds, history=self._history)
        store._connection.has_connected = self._connection.has_connected
        return store

    def close(self) -> None:
        """Close the connections; later calls raise `StoreUnavailable`."""
        self._connection.close()

    def health(self) -> StoreHealth:
        """See `RunStore.health`."""
        with self._connection.client() as client:
            info, (seconds, microseconds) = client.info(), client.time()
        warnings = []
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            warnings.append(
                f"it may delete runs when its memory is full: set maxmemory-policy noeviction, not {policy}"
            )
        if not info.get("aof_enabled", 1):
            warnings.append("a crash loses all data since its last snapshot: set appendonly yes")
        server = f"Redis {info.get('redis_version', 'of unknown version')}, {self.shown_url}"
        return StoreHealth(server, seconds + microseconds / 1e6, tuple(warnings))

    def register(self, record: RunRecord) -> None:
        """See `RunStore.register`."""
        check_record(record)
        fields = {
            "name": record.name,
            "created": repr(float(record.created)),
            "algorithm": record.algorithm,
            "environment": record.environment,
            "seed": str(record.seed),
            "host": record.host,
            "pid": str(int(record.pid)),
            "pid_started": repr(float(record.pid_started)),
            "state": record.state,
            "heartbeat": repr(float(record.heartbeat)),
            "config": json.dumps(plain_payload("config", record.config)),
        }
        if record.stopped_because is not None:
            fields["stopped_because"] = clean_text(record.stopped_because)
        keys = (_key("run", record.name), _RUNS_KEY, SCHEMA_KEY)
        with self._connection.client() as client:
            if not run_script(client, REGISTER, keys, record.name, SCHEMA_VERSION, *_flat(fields)):
                raise name_in_use(record.name)

    def get(self, name: str) -> RunRecord:
        """See `RunStore.get`."""
        with self._connection.client() as client:
            return as_read(self._stored_record(client, name))

    def list_runs(self) -> list[RunRecord]:
        """See `RunStore.list_runs`."""
        with self._connection.client() as client:
            pipeline = client.pipeline(transaction=False)
            for name in client.smembers(_RUNS_KEY):
                pipeline.hmget(_key("run", name), _RECORD_FIELDS)
            records = [_record(row) for row in pipeline.execute() if row[0] is not None]
        return [as_read(record) for record in sorted(records, key=lambda record: (-record.created, record.name))]

    def update_state(
        self, name: str, state: str, stopped_because: str | None = None, *, owner: ProcessIdentity | None = None
    ) -> None:
        """See `RunStore.update_state`."""
        check_state(state)
        reason = {} if stopped_because is None else {"stopped_because": clean_text(stopped_because)}
        self._update(name, owner, {"state": state, **reason})

    def adopt(self, name: str, host: str, pid: int, pid_started: float) -> RunRecord:
        """See `RunStore.adopt`."""
        check_time("pid_started", pid_started)
        check_integer("pid", pid, least=1)
        unread = json.dumps(UNREAD_COMMAND)
        keys = (_key("run", name), _key("commands", name), _key("answers", name))
        with self._connection.client() as client:
            while True:
                record = self._stored_record(client, name)
                check_adoptable(record)
                fields = {
                    "host": host,
                    "pid": str(int(pid)),
                    "pid_started": repr(float(pid_started)),
                    "state": "starting",
                    "heartbeat": repr(time.time()),
                }
                expected = f"{_state_and_owner(record)} {record.heartbeat!r}"
                if run_script(client, ADOPT, keys, expected, unread, *_flat(fields)):
                    return self._stored_record(client, name)

    def write_snapshot(
        self, name: str, snapshot: Mapping[str, Any], heartbeat: float, *, owner: ProcessIdentity | None = None
    ) -> None:
        """See `RunStore.write_snapshot`."""
        check_time("heartbeat", heartbeat)
        text = json.dumps(plain_payload("snapshot", snapshot))
        self._update(name, owner, {"snapshot": text, "heartbeat": repr(float(heartbeat))})

    def read_snapshot(self, name: str) -> dict[str, Any] | None:
        """See `RunStore.read_snapshot`."""
        with self._connection.client() as client:
            stored_name, text = client.hmget(_key("run", name), "name", "snapshot")
            if stored_name is None:
                raise _unknown(client, name)
        return payload_from_json(text)

    def send_command(self, name: str, kind: str, arguments: Mapping[str, Any]) -> int:
        """See `RunStore.send_command`."""
        payload = plain_payload("arguments", arguments)
        keys = (_key("run", name), _key("commands", name), _key("answers", name))
        with self._connection.client() as client:
            while True:
                record = self._stored_record(client, name)
                check_live(record, kind)
                text = json.dumps({"time": time.time(), "kind": clean_text(kind), "arguments": payload})
                id = run_script(client, SEND, keys, _state_and_owner(record), self._history, text)
                if id:
                    return int(id)

    def pending_commands(self, name: str) -> list[Command]:
        """See `RunStore.pending_commands`."""
        commands = self._read(name, lambda pipeline: pipeline.hgetall(_key("commands", name)))[0]
        return [
            Command(id, **json.loads(text)) for id, text in sorted((int(id), text) for id, text in commands.items())
        ]

    def acknowledge(
        self, name: str, id: int, result: Mapping[str, Any], *, owner: ProcessIdentity | None = None
    ) -> None:
        """See `RunStore.acknowledge`."""
        text = json.dumps(plain_payload("result", result))
        keys = (_key("run", name), _key("commands", name), _key("answers", name))
        with self._connection.client() as client:
            if not run_script(client, ACKNOWLEDGE, keys, _owner_text(owner), id, text):
                check_owner(self._stored_record(client, name), owner)
                raise UnknownCommand(f"run {name!r} has no command {id}")

    def command_result(self, name: str, id: int) -> dict[str, Any] | None:
        """See `RunStore.command_result`."""

        def queue_reads(pipeline: Any) -> None:
            pipeline.hget(_key("answers", name), id)
            pipeline.hexists(_key("commands", name), id)

        answer, is_pending = self._read(name, queue_reads)
        if answer is None and not is_pending:
            raise UnknownCommand(f"run {name!r} has no command {id}")
        return payload_from_json(answer)

    def add_event(self, name: str, kind: str, text: str, time: float) -> None:
        """See `RunStore.add_event`."""
        check_time("an event's time", time)
        self._append("events", name, time, {"kind": clean_text(kind), "text": clean_text(text)})

    def events(self, name: str, limit: int = 100, after_id: int | None = None) -> list[Event]:
        """See `RunStore.events`."""
        check_integer("limit", limit, least=1)
        key, count = _key("events", name), int(limit)
        if after_id is None:
            rows = self._read(name, lambda pipeline: pipeline.xrevrange(key, count=count))[0][::-1]
        else:
            first = f"({max(after_id, 0)}-0"
            rows = self._read(name, lambda pipeline: pipeline.xrange(key, min=first, count=count))[0]
        return [
            Event(_event_id(entry), float(values["time"]), values["kind"], values["text"]) for entry, values in rows
        ]

    def add_metrics(self, name: str, step: int, values: Mapping[str, float], time: float) -> None:
        """See `RunStore.add_metrics`."""
        check_integer("step", step, least=0)
        check_time("the metrics' time", time)
        self._append("metrics", name, time, {"step": str(int(step)), "values": metrics_to_json(values)})

    def metrics(self, name: str, limit: int = HISTORY) -> list[MetricsRow]:
        """See `RunStore.metrics`."""
        check_integer("limit", limit, least=1)
        rows = self._read(name, lambda pipeline: pipeline.xrevrange(_key("metrics", name), count=int(limit)))[0]
        return [
            MetricsRow(int(values["step"]), float(values["time"]), metrics_from_json(values["values"]))
            for _, values in reversed(rows)
        ]

    # Shared by several methods.

    @staticmethod
    def _stored_record(client: Any, name: str) -> RunRecord:
        row = client.hmget(_key("run", name), _RECORD_FIELDS)
        if row[0] is None:
            raise _unknown(client, name)
        return _record(row)

    def _update(self, name: str, owner: ProcessIdentity | None, fields: Mapping[str, str]) -> None:
        with self._connection.client() as client:
            while not run_script(client, UPDATE, (_key("run", name),), _owner_text(owner), *_flat(fields)):
                check_owner(self._stored_record(client, name), owner)

    def _read(self, name: str, queue_reads: Callable[[Any], object]) -> list[Any]:
        """Return the answers to the commands that `queue_reads` adds to a pipeline, read atomically.

        Raises:
            UnknownRun: no run has this name.
        """
        with self._connection.client() as client:
            pipeline = client.pipeline()
            pipeline.exists(_key("run", name))
            queue_reads(pipeline)
            answers: list[Any] = pipeline.execute()
            if not answers[0]:
                raise _unknown(client, name)
        return answers[1:]

    def _append(self, kind: str, name: str, time: float, values: Mapping[str, str]) -> None:
        """Append to a stream under the run's next id, only once even if the same call failed before."""
        fields = {"time": repr(float(time)), **values}
        content = (kind, name, *fields.values())
        with self._lock:
            earlier_token = self._unconfirmed.pop(content, None)
        token = earlier_token or secrets.token_hex(8)
        keys = (_key("run", name), _key(kind, name))
        try:
            with self._connection.client() as client:
                unconfirmed = 0 if earlier_token is None else 1
                if not run_script(client, APPEND, keys, kind, self._history, token, unconfirmed, *_flat(fields)):
                    raise _unknown(client, name)
        except BaseException:
            with self._lock:
                self._unconfirmed[content] = token
                if len(self._unconfirmed) > _MAX_UNCONFIRMED:
                    del self._unconfirmed[next(iter(self._unconfirmed))]
            raise


def _key(kind: str, name: str) -> str:
    return f"squall:{kind}:{name}"


def _unknown(client: Any, name: str) -> SquallError:
    return unknown_run(name, sorted(client.smembers(_RUNS_KEY)))


def _flat(fields: Mapping[str, str]) -> list[str]:
    return [text for pair in fields.items() for text in pair]


def _owner_text(owner: ProcessIdentity | None) -> str:
    return "" if owner is None else f"{owner.host} {owner.pid} {owner.pid_started!r}"


def _state_and_owner(record: RunRecord) -> str:
    return f"{record.state} {_owner_text(record.owner)}"


def _event_id(entry: str) -> int:
    return int(entry.removesuffix("-0"))


def _record(row: list[Any]) -> RunRecord:
    values = dict(zip(_RECORD_FIELDS, row, strict=True))
    for field in ("created", "pid_started", "heartbeat"):
        values[field] = float(values[field])
    for field in ("seed", "pid"):
        values[field] = int(values[field])
    return RunRecord(**{**values, "config": json.loads(values["config"])})
