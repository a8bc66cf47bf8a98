"""RedisRunStore: the run store in a Redis server, for runs and visitors on several machines.

Keys, all on one server and one database (no Redis Cluster). A run's name has no colon, so none can collide:

    squall:schema             "1", the version of this layout
    squall:runs               set: the names of all runs
    squall:run:<run>          hash: the fields of `RunRecord` as text (`config` as JSON; no `stopped_because` means
                              None), `snapshot` as JSON, and `commands`, `events`, `metrics`: the last id given out
    squall:commands:<run>     hash: id -> {"time", "kind", "arguments"} as JSON, of commands without an answer
    squall:answers:<run>      hash: id -> the answer as JSON
    squall:events:<run>       stream: entry <id>-0 with token, time, kind, text
    squall:metrics:<run>      stream: entry <id>-0 with token, time, step, values

Each change is one Lua script or one MULTI, so all or nothing and alone. `adopt` and `send_command` first read the
run, because only Python can look for a process, and change it if it is still as it was read.

No call is repeated in here. One that raised `StoreUnavailable` may have been carried out nevertheless: the
connection broke before the answer. Repeating it at the same store object is then safe for all that sets
something, and for events and metrics, whose token the server looks up before it appends them once more. A
registration or a command is sent at most once; whoever repeats those may find the first one done.

A server keeps what was acknowledged over its own restart only with `appendonly yes`. A snapshot that was held up on
a broken connection may arrive after a newer one; the next, a second later, replaces it.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

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
from services.store.redis_scripts import ACKNOWLEDGE, ADOPT, APPEND, REGISTER, SEND, UPDATE, run_script
from services.store.redis_url import hide_password, parse_url

_SCHEMA, _RUNS = "squall:schema", "squall:runs"
_SCHEMA_VERSION = 1
_OLDEST_SERVER = (6, 2)
_MOST_UNSURE = 1000
# A script's error carries the code of the command that failed inside the text.
_UNAVAILABLE = re.compile(r"\b(OOM|MISCONF|READONLY|BUSY|LOADING|MASTERDOWN|NOREPLICAS|UNKILLABLE)\b")
_RECORD = (
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
    """A `RunStore` in a Redis server, version 6.2 or newer, which it first speaks to when first called.

    A password that is refused when the store is first reached raises `ConfigurationError`; later it counts as an
    outage, so that a writer keeps what it has. No error shows the password.

    Args:
        url: one of `SCHEMES`; user and password are percent-encoded. TLS takes `?ssl_ca_certs=FILE`, and
            `ssl_certfile`, `ssl_keyfile` where the server wants to see a certificate.
        timeout_seconds: how long to wait for a connection, and for each answer.
        history: rows of metrics, of events and of commands kept for a run.

    Raises:
        ConfigurationError: a URL or option that cannot work.
    """

    def __init__(self, url: str, *, timeout_seconds: float = 5.0, history: int = HISTORY) -> None:
        if not timeout_seconds > 0:
            raise ConfigurationError(f"a store's timeout must be positive, got {timeout_seconds}")
        check_whole("a store's history", history, least=1)
        self._url = url
        self.shown = hide_password(url)
        self._timeout = timeout_seconds
        self._history = history
        connection_class, options, self._secrets = parse_url(url)
        self._client: Any = redis.Redis(
            connection_pool=redis.ConnectionPool(
                connection_class=connection_class,
                **options,
                socket_timeout=timeout_seconds,
                socket_connect_timeout=timeout_seconds,
                retry=Retry(NoBackoff(), 0),
                driver_info=None,
                protocol=2,
                decode_responses=True,
                encoding_errors="replace",
                redis_connect_func=self._greet,
            )
        )
        self._reached = False
        self._closed = False
        self._lock = threading.Lock()
        self._unsure: dict[tuple[str, ...], str] = {}

    def __repr__(self) -> str:
        return f"RedisRunStore({self.shown!r})"

    def with_timeout(self, seconds: float) -> RedisRunStore:
        """Open the same store once more, with calls that give up after about `seconds`."""
        store = RedisRunStore(self._url, timeout_seconds=seconds, history=self._history)
        store._reached = self._reached
        return store

    def close(self) -> None:
        """Close the connections; calls after that raise `StoreUnavailable`."""
        self._closed = True
        self._client.connection_pool.disconnect()

    def health(self) -> StoreHealth:
        """See `RunStore.health`."""
        with self._asking() as client:
            info, (seconds, microseconds) = client.info(), client.time()
        warnings = []
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            warnings.append(f"it may forget runs when it is full: set maxmemory-policy noeviction, not {policy}")
        if not info.get("aof_enabled", 1):
            warnings.append("it forgets what is newer than its last snapshot when it dies: set appendonly yes")
        server = f"Redis {info.get('redis_version', 'of no version')}, {self.shown}"
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
        keys = (_key("run", record.name), _RUNS, _SCHEMA)
        with self._asking() as client:
            if not run_script(client, REGISTER, keys, record.name, _SCHEMA_VERSION, *_flat(fields)):
                raise RunNameInUse(f"a run named {record.name!r} exists already: choose another name, or resume it")

    def get(self, name: str) -> RunRecord:
        """See `RunStore.get`."""
        with self._asking() as client:
            return as_read(self._written(client, name))

    def list_runs(self) -> list[RunRecord]:
        """See `RunStore.list_runs`."""
        with self._asking() as client:
            pipeline = client.pipeline(transaction=False)
            for name in client.smembers(_RUNS):
                pipeline.hmget(_key("run", name), _RECORD)
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
        check_whole("pid", pid, least=1)
        unread = json.dumps({"error": "the run was resumed before it read this command"})
        keys = (_key("run", name), _key("commands", name), _key("answers", name))
        with self._asking() as client:
            while True:
                record = self._written(client, name)
                check_adoptable(record)
                fields = {
                    "host": host,
                    "pid": str(int(pid)),
                    "pid_started": repr(float(pid_started)),
                    "state": "starting",
                    "heartbeat": repr(time.time()),
                }
                expected = f"{_as_written(record)} {record.heartbeat!r}"
                if run_script(client, ADOPT, keys, expected, unread, *_flat(fields)):
                    return self._written(client, name)

    def write_snapshot(
        self, name: str, snapshot: Mapping[str, Any], heartbeat: float, *, owner: ProcessIdentity | None = None
    ) -> None:
        """See `RunStore.write_snapshot`."""
        check_time("heartbeat", heartbeat)
        text = json.dumps(plain_payload("snapshot", snapshot))
        self._update(name, owner, {"snapshot": text, "heartbeat": repr(float(heartbeat))})

    def read_snapshot(self, name: str) -> dict[str, Any] | None:
        """See `RunStore.read_snapshot`."""
        with self._asking() as client:
            there, text = client.hmget(_key("run", name), "name", "snapshot")
            if there is None:
                raise _unknown(client, name)
        return _payload(text)

    def send_command(self, name: str, kind: str, arguments: Mapping[str, Any]) -> int:
        """See `RunStore.send_command`."""
        payload = plain_payload("arguments", arguments)
        keys = (_key("run", name), _key("commands", name), _key("answers", name))
        with self._asking() as client:
            while True:
                written = self._written(client, name)
                record = as_read(written)
                if not record.live:
                    reason = f" ({record.stopped_because})" if record.stopped_because else ""
                    raise RunIsNotLive(f"run {name!r} is {record.state}{reason}: nobody would read {kind!r}")
                text = json.dumps({"time": time.time(), "kind": clean_text(kind), "arguments": payload})
                id = run_script(client, SEND, keys, _as_written(written), self._history, text)
                if id:
                    return int(id)

    def pending_commands(self, name: str) -> list[Command]:
        """See `RunStore.pending_commands`."""
        commands = self._read(name, lambda ask: ask.hgetall(_key("commands", name)))[0]
        return [
            Command(id, **json.loads(text)) for id, text in sorted((int(id), text) for id, text in commands.items())
        ]

    def acknowledge(
        self, name: str, id: int, result: Mapping[str, Any], *, owner: ProcessIdentity | None = None
    ) -> None:
        """See `RunStore.acknowledge`."""
        text = json.dumps(plain_payload("result", result))
        keys = (_key("run", name), _key("commands", name), _key("answers", name))
        with self._asking() as client:
            if not run_script(client, ACKNOWLEDGE, keys, _identity(owner), id, text):
                check_owner(self._written(client, name), owner)
                raise UnknownCommand(f"run {name!r} has no command {id}")

    def command_result(self, name: str, id: int) -> dict[str, Any] | None:
        """See `RunStore.command_result`."""

        def ask(pipeline: Any) -> None:
            pipeline.hget(_key("answers", name), id)
            pipeline.hexists(_key("commands", name), id)

        answer, waiting = self._read(name, ask)
        if answer is None and not waiting:
            raise UnknownCommand(f"run {name!r} has no command {id}")
        return _payload(answer)

    def add_event(self, name: str, kind: str, text: str, time: float) -> None:
        """See `RunStore.add_event`."""
        check_time("an event's time", time)
        self._append("events", name, time, {"kind": clean_text(kind), "text": clean_text(text)})

    def events(self, name: str, limit: int = 100, after_id: int | None = None) -> list[Event]:
        """See `RunStore.events`."""
        check_whole("limit", limit, least=1)
        key, count = _key("events", name), int(limit)
        if after_id is None:
            rows = self._read(name, lambda ask: ask.xrevrange(key, count=count))[0][::-1]
        else:
            rows = self._read(name, lambda ask: ask.xrange(key, min=f"({max(after_id, 0)}-0", count=count))[0]
        return [Event(_id(row), float(values["time"]), values["kind"], values["text"]) for row, values in rows]

    def add_metrics(self, name: str, step: int, values: Mapping[str, float], time: float) -> None:
        """See `RunStore.add_metrics`."""
        check_whole("step", step, least=0)
        check_time("the metrics' time", time)
        self._append("metrics", name, time, {"step": str(int(step)), "values": metrics_to_json(values)})

    def metrics(self, name: str, limit: int = HISTORY) -> list[MetricsRow]:
        """See `RunStore.metrics`."""
        check_whole("limit", limit, least=1)
        rows = self._read(name, lambda ask: ask.xrevrange(_key("metrics", name), count=int(limit)))[0]
        return [
            MetricsRow(int(values["step"]), float(values["time"]), metrics_from_json(values["values"]))
            for _, values in reversed(rows)
        ]

    # What several methods do.

    @staticmethod
    def _written(client: Any, name: str) -> RunRecord:
        row = client.hmget(_key("run", name), _RECORD)
        if row[0] is None:
            raise _unknown(client, name)
        return _record(row)

    def _update(self, name: str, owner: ProcessIdentity | None, fields: Mapping[str, str]) -> None:
        with self._asking() as client:
            while not run_script(client, UPDATE, (_key("run", name),), _identity(owner), *_flat(fields)):
                check_owner(self._written(client, name), owner)

    def _read(self, name: str, ask: Callable[[Any], object]) -> list[Any]:
        """Return the answers to what `ask` asks of a pipeline, all of one moment. Raises `UnknownRun`."""
        with self._asking() as client:
            pipeline = client.pipeline()
            pipeline.exists(_key("run", name))
            ask(pipeline)
            answers: list[Any] = pipeline.execute()
            if not answers[0]:
                raise _unknown(client, name)
        return answers[1:]

    def _append(self, kind: str, name: str, moment: float, values: Mapping[str, str]) -> None:
        """Append to a stream under the run's next id, once even if the same call failed before."""
        fields = {"time": repr(float(moment)), **values}
        content = (kind, name, *fields.values())
        with self._lock:
            known = self._unsure.pop(content, None)
        token = known or secrets.token_hex(8)
        keys = (_key("run", name), _key(kind, name))
        try:
            with self._asking() as client:
                unsure = 0 if known is None else 1
                if not run_script(client, APPEND, keys, kind, self._history, token, unsure, *_flat(fields)):
                    raise _unknown(client, name)
        except BaseException:
            with self._lock:
                self._unsure[content] = token
                if len(self._unsure) > _MOST_UNSURE:
                    del self._unsure[next(iter(self._unsure))]
            raise

    # The server.

    @contextmanager
    def _asking(self) -> Iterator[Any]:
        if self._closed:
            raise StoreUnavailable(f"run store {self.shown} was closed")
        try:
            yield self._client
        except redis.RedisError as error:
            hidden = any(secret in str(error) for secret in self._secrets)
            raise self._translated(error) from (None if hidden else error)

    def _greet(self, connection: Any) -> None:
        """Log in on a new connection, and look whom it reached: a restart may have put another server there."""
        try:
            connection.on_connect()
            connection.send_command("INFO", "server")
            info = str(connection.read_response())
            version = re.search(r"redis_version:(\d+)\.(\d+)", info)
            if version is None or tuple(map(int, version.groups())) < _OLDEST_SERVER:
                found = "no Redis" if version is None else f"Redis {'.'.join(version.groups())}"
                wanted = ".".join(map(str, _OLDEST_SERVER))
                raise StoreIncompatible(f"run store {self.shown} is {found}; Squall needs {wanted} or newer")
            connection.send_command("GET", _SCHEMA)
            schema = connection.read_response() or "0"
            if not schema.isdecimal():
                raise StoreIncompatible(f"run store {self.shown}: {_SCHEMA} is of something else; use another database")
            if int(schema) > _SCHEMA_VERSION:
                raise StoreIncompatible(
                    f"run store {self.shown} is of version {schema}, made by a newer Squall;"
                    f" this one reads up to version {_SCHEMA_VERSION}: upgrade, or use another store"
                )
        except BaseException:
            connection.disconnect()
            raise
        self._reached = True

    def _translated(self, error: redis.RedisError) -> SquallError:
        text = str(error)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        text = f"run store {self.shown}: {' '.join(text.split())[:300]}"
        if isinstance(error, redis.exceptions.AuthenticationError | redis.exceptions.NoPermissionError):
            return StoreUnavailable(text) if self._reached else ConfigurationError(text)
        if isinstance(error, redis.TimeoutError):
            return StoreUnavailable(f"run store {self.shown}: no answer within {self._timeout:g} s")
        if isinstance(error, redis.InvalidResponse):
            return StoreIncompatible(f"what answers at {self.shown} is no Redis")
        if isinstance(error, redis.ConnectionError) or _is_temporary(error):
            return StoreUnavailable(text)
        return StoreIncompatible(text)


def _is_temporary(error: redis.RedisError) -> bool:
    temporary = redis.OutOfMemoryError | redis.ReadOnlyError | redis.exceptions.MasterDownError
    return isinstance(error, temporary) or _UNAVAILABLE.search(str(error)) is not None


def _key(kind: str, name: str) -> str:
    return f"squall:{kind}:{name}"


def _unknown(client: Any, name: str) -> SquallError:
    return unknown_run(name, sorted(client.smembers(_RUNS)))


def _flat(fields: Mapping[str, str]) -> list[str]:
    return [text for pair in fields.items() for text in pair]


def _identity(owner: ProcessIdentity | None) -> str:
    return "" if owner is None else f"{owner.host} {owner.pid} {owner.pid_started!r}"


def _as_written(record: RunRecord) -> str:
    return f"{record.state} {_identity(record.owner)}"


def _id(entry: str) -> int:
    return int(entry.removesuffix("-0"))


def _payload(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    payload: dict[str, Any] = json.loads(text)
    return payload


def _record(row: list[Any]) -> RunRecord:
    values = dict(zip(_RECORD, row, strict=True))
    for field in ("created", "pid_started", "heartbeat"):
        values[field] = float(values[field])
    for field in ("seed", "pid"):
        values[field] = int(values[field])
    return RunRecord(**{**values, "config": json.loads(values["config"])})
