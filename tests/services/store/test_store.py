"""One suite for every store: what is said of a store in general runs on each of `BACKENDS`."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from replay.errors import ConfigurationError, SquallError
from services.errors import (
    NotStorable,
    RunIsLive,
    RunIsNotLive,
    RunNameInUse,
    RunTakenOver,
    StoreIncompatible,
    StoreTimeout,
    StoreUnavailable,
    UnknownCommand,
    UnknownRun,
)
from services.store.base import HISTORY, RunStore
from services.store.buffered import BufferedWriter
from services.store.locate import open_store
from services.store.records import LOST_AFTER, RunRecord, this_process
from services.store.redis import RedisRunStore
from services.store.sqlite import SQLiteRunStore
from services.supervision.signals import StopSignals
from tests.services.redis_server import RedisServer

ROOT = Path(__file__).parents[3]


class SQLiteBackend:
    """A file of its own; away, and silent, while another connection holds its write lock."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.path = request.getfixturevalue("tmp_path") / "squall.db"
        self.url = f"sqlite:///{self.path}"

    def open(self, **options: Any) -> RunStore:
        return SQLiteRunStore(self.path, **options)

    @contextmanager
    def outage(self) -> Iterator[None]:
        blocker = sqlite3.connect(self.path, isolation_level=None)
        try:
            blocker.execute("BEGIN EXCLUSIVE")
            yield
        finally:
            blocker.close()

    silence = outage


class RedisBackend:
    """A server that all tests share; away while it is ended, silent while it is suspended."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.server: RedisServer = request.getfixturevalue("redis_server")
        self.server.command("FLUSHALL")
        self.url = self.server.url

    def open(self, **options: Any) -> RunStore:
        return RedisRunStore(self.url, **options)

    @contextmanager
    def outage(self) -> Iterator[None]:
        self.server.stop()
        try:
            yield
        finally:
            self.server.start()

    @contextmanager
    def silence(self) -> Iterator[None]:
        with self.server.suspended():
            yield


Backend = SQLiteBackend | RedisBackend
BACKENDS: dict[str, type[Backend]] = {"sqlite": SQLiteBackend, "redis": RedisBackend}


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param](request)


@pytest.fixture
def store(backend: Backend) -> Iterator[RunStore]:
    with backend.open() as opened:
        yield opened


def record(name: str = "pong-1", **changes: Any) -> RunRecord:
    host, pid, started = this_process()
    now = time.time()
    made = RunRecord(
        name=name,
        created=now,
        algorithm="dqn",
        environment="PongNoFrameskip-v4",
        seed=0,
        host=host,
        pid=pid,
        pid_started=started,
        state="running",
        heartbeat=now,
        stopped_because=None,
        config={"actors": 2},
    )
    return replace(made, **changes)


def elsewhere(name: str = "pong-1", **changes: Any) -> RunRecord:
    """A run of another machine, whose processes cannot be looked up here."""
    return record(name, host="another-machine", pid=2**22 + 1, pid_started=1.0, **changes)


def ago(seconds: float) -> float:
    return time.time() - seconds


def start_python(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


# Runs


def test_a_run_reads_as_it_was_registered(store: RunStore) -> None:
    written = record(seed=2**127, config={"optimizer": {"lr": 1e-4, "betas": [0.9, 0.99]}, "name": "Grüße ☂"})
    store.register(written)
    assert store.get("pong-1") == written


def test_runs_are_listed_newest_first(store: RunStore) -> None:
    assert store.list_runs() == []
    for name, created in (("middle", 20.0), ("oldest", 10.0), ("newest", 30.0)):
        store.register(record(name, created=created))
    assert [run.name for run in store.list_runs()] == ["newest", "middle", "oldest"]


@pytest.mark.parametrize("state", ["running", "finished"])
def test_a_name_is_used_once(store: RunStore, state: str) -> None:
    first = record(state=state)
    store.register(first)
    with pytest.raises(RunNameInUse, match="'pong-1' exists already"):
        store.register(record(seed=7))
    assert store.get("pong-1") == first


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-flag", "a b", "a\n", "x" * 101, None])
def test_a_name_that_is_no_folder_name_is_refused(store: RunStore, name: Any) -> None:
    with pytest.raises(ConfigurationError, match="a run name"):
        store.register(record(name))
    assert store.list_runs() == []


@pytest.mark.parametrize(
    "changes",
    [
        {"state": "lost"},
        {"state": "asleep"},
        {"created": math.nan},
        {"heartbeat": math.inf},
        {"pid_started": -1.0},
        {"pid": 0},
        {"pid": 2**63},
        {"seed": 1.5},
        {"config": {"device": object()}},
        {"config": {1: 2}},
        {"config": None},
    ],
)
def test_a_record_that_cannot_be_is_refused(store: RunStore, changes: dict[str, Any]) -> None:
    with pytest.raises((ConfigurationError, NotStorable)):
        store.register(record(**changes))
    assert store.list_runs() == []


ON_A_RUN: dict[str, Callable[[RunStore, str], object]] = {
    "get": lambda store, name: store.get(name),
    "update_state": lambda store, name: store.update_state(name, "running"),
    "adopt": lambda store, name: store.adopt(name, *this_process()),
    "write_snapshot": lambda store, name: store.write_snapshot(name, {}, 1.0),
    "read_snapshot": lambda store, name: store.read_snapshot(name),
    "send_command": lambda store, name: store.send_command(name, "stop", {}),
    "pending_commands": lambda store, name: store.pending_commands(name),
    "acknowledge": lambda store, name: store.acknowledge(name, 1, {}),
    "command_result": lambda store, name: store.command_result(name, 1),
    "wait_for_acknowledgement": lambda store, name: store.wait_for_acknowledgement(name, 1, 1.0),
    "add_event": lambda store, name: store.add_event(name, "start", "", 1.0),
    "events": lambda store, name: store.events(name),
    "add_metrics": lambda store, name: store.add_metrics(name, 0, {}, 1.0),
    "metrics": lambda store, name: store.metrics(name),
}


@pytest.mark.parametrize("method", ON_A_RUN)
def test_an_unknown_run_is_an_error_that_lists_the_nearest(store: RunStore, method: str) -> None:
    with pytest.raises(UnknownRun, match=r"'pong-2': there are no runs yet"):
        ON_A_RUN[method](store, "pong-2")
    for name in ("pong-1", "pong-12", "walker"):
        store.register(record(name))
    with pytest.raises(UnknownRun, match=r"'pong-2'; the nearest: pong-12, pong-1$|: pong-1, pong-12$"):
        ON_A_RUN[method](store, "pong-2")
    with pytest.raises(UnknownRun, match=r"'zzz' among the 3 that `squall runs` lists"):
        ON_A_RUN[method](store, "zzz")


def test_a_name_that_no_run_can_have_costs_nothing(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.register(record("pong-1"))
    monkeypatch.setattr(difflib, "get_close_matches", lambda *_, **__: pytest.fail("the nearest were looked for"))
    for name in ("pong 1" * 1_000_000, "", "../pong-1"):
        with pytest.raises(UnknownRun, match="a run's name cannot be that") as caught:
            store.get(name)
        assert len(str(caught.value)) < 200


def test_the_nearest_are_looked_for_while_others_use_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SQLiteRunStore(tmp_path / "squall.db") as store, ThreadPoolExecutor(1) as pool:
        store.register(record("pong-1"))

        def look(*_: Any, **__: Any) -> list[str]:
            return [run.name for run in pool.submit(store.list_runs).result(20.0)]

        monkeypatch.setattr(difflib, "get_close_matches", look)
        with pytest.raises(UnknownRun, match="the nearest: pong-1"):
            store.get("pong-2")


def test_a_reason_to_stop_stays_until_another_is_given(store: RunStore) -> None:
    store.register(record())
    store.update_state("pong-1", "stopping", "squall stop")
    store.update_state("pong-1", "finished")
    assert (store.get("pong-1").state, store.get("pong-1").stopped_because) == ("finished", "squall stop")
    store.update_state("pong-1", "failed", "the learner died")
    assert (store.get("pong-1").state, store.get("pong-1").stopped_because) == ("failed", "the learner died")


@pytest.mark.parametrize("state", ["lost", "", "Running"])
def test_a_state_that_cannot_be_written_is_refused(store: RunStore, state: str) -> None:
    store.register(record())
    with pytest.raises(ConfigurationError, match="starting, running, stopping, finished, failed, got"):
        store.update_state("pong-1", state)
    assert store.get("pong-1").state == "running"


# Lost


@pytest.mark.parametrize("state", ["starting", "running", "stopping"])
def test_a_live_run_without_a_heartbeat_reads_lost(store: RunStore, state: str) -> None:
    store.register(elsewhere(state=state, heartbeat=ago(LOST_AFTER - 5)))
    assert store.get("pong-1").state == state
    store.write_snapshot("pong-1", {}, ago(LOST_AFTER + 5))
    assert store.get("pong-1").state == "lost"
    assert "no heartbeat for 1" in (store.get("pong-1").stopped_because or "")
    assert [run.state for run in store.list_runs()] == ["lost"]
    store.write_snapshot("pong-1", {}, time.time())
    assert store.get("pong-1").state == state


@pytest.mark.parametrize("state", ["finished", "failed"])
def test_a_run_that_ended_is_never_lost(store: RunStore, state: str) -> None:
    store.register(elsewhere(state=state, heartbeat=ago(1e6)))
    store.register(record("here", pid=2**22 + 1, state=state))
    assert [run.state for run in store.list_runs()] == [state, state]


def test_a_killed_process_is_lost_at_once_even_while_nobody_reaps_it(store: RunStore) -> None:
    with start_python("input()") as child:
        try:
            store.register(record(pid=child.pid, pid_started=psutil.Process(child.pid).create_time()))
            assert store.get("pong-1").state == "running"
            os.kill(child.pid, signal.SIGKILL)
            deadline = time.monotonic() + 5
            while store.get("pong-1").state != "lost":
                assert time.monotonic() < deadline
            assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
            assert store.get("pong-1").stopped_because == f"its process {child.pid} is gone"
        finally:
            child.kill()
    assert store.get("pong-1").state == "lost"


def test_another_process_with_the_same_pid_is_not_mistaken(store: RunStore) -> None:
    _, pid, started = this_process()
    store.register(record(pid=pid, pid_started=started - 60))
    assert store.get("pong-1").state == "lost"


# Resuming


def test_an_ended_run_is_adopted(store: RunStore) -> None:
    store.register(elsewhere(state="failed", heartbeat=5.0, stopped_because="the learner died"))
    adopted = store.adopt("pong-1", *this_process())
    assert adopted == store.get("pong-1")
    assert (adopted.state, adopted.stopped_because) == ("starting", None)
    assert (adopted.host, adopted.pid, adopted.pid_started) == this_process()
    assert adopted.heartbeat == pytest.approx(time.time(), abs=5)
    assert (adopted.algorithm, adopted.config) == ("dqn", {"actors": 2})


def test_a_lost_run_is_adopted_and_a_live_one_is_not(store: RunStore) -> None:
    store.register(elsewhere())
    with pytest.raises(RunIsLive, match=r"is running .*another-machine"):
        store.adopt("pong-1", *this_process())
    store.write_snapshot("pong-1", {}, ago(LOST_AFTER + 1))
    store.adopt("pong-1", *this_process())
    with pytest.raises(RunIsLive, match="is starting"):
        store.adopt("pong-1", *this_process())


def test_a_coordinator_that_was_thought_lost_cannot_write_into_an_adopted_run(store: RunStore) -> None:
    before = elsewhere()
    store.register(before)
    sent = store.send_command("pong-1", "stop", {})
    writes: list[Callable[..., None]] = [
        lambda owner: store.write_snapshot("pong-1", {"by": owner.host}, time.time(), owner=owner),
        lambda owner: store.update_state("pong-1", "running", "it goes on", owner=owner),
        lambda owner: store.acknowledge("pong-1", sent, {"by": owner.host}, owner=owner),
    ]
    writes[0](before.owner)
    store.write_snapshot("pong-1", {"n": 1}, ago(LOST_AFTER + 5), owner=before.owner)
    adopted = store.adopt("pong-1", *this_process())
    assert adopted.owner == this_process()
    others = [before.owner, adopted.owner._replace(pid=1), adopted.owner._replace(pid_started=1.5)]
    for write in writes:
        for other in others:
            with pytest.raises(RunTakenOver, match=rf"'pong-1' was resumed by process {os.getpid()} on {adopted.host}"):
                write(other)
    assert (store.get("pong-1"), store.read_snapshot("pong-1")) == (adopted, {"n": 1})
    assert "resumed" in (store.command_result("pong-1", sent) or {})["error"]
    for write in writes:
        write(adopted.owner)
    assert (store.get("pong-1").state, store.read_snapshot("pong-1")) == ("running", {"by": adopted.host})


def test_a_stuck_process_keeps_its_run(store: RunStore) -> None:
    store.register(record(heartbeat=ago(60)))
    assert store.get("pong-1").state == "lost"
    with pytest.raises(RunIsLive, match=rf"no heartbeat for 6\d s, but its process {os.getpid()} still exists"):
        store.adopt("pong-1", *this_process())
    assert store.get("pong-1").heartbeat < ago(50)


def test_commands_for_the_last_coordinator_do_not_reach_the_next(store: RunStore) -> None:
    store.register(elsewhere())
    answered, unread = (store.send_command("pong-1", "stop", {}) for _ in range(2))
    store.acknowledge("pong-1", answered, {"ok": True})
    store.update_state("pong-1", "failed")
    store.adopt("pong-1", *this_process())
    assert store.pending_commands("pong-1") == []
    assert store.command_result("pong-1", answered) == {"ok": True}
    assert "resumed" in (store.command_result("pong-1", unread) or {})["error"]
    assert [command.id for command in _sent(store, "scale")] == [unread + 1]


def _sent(store: RunStore, kind: str) -> list[Any]:
    store.send_command("pong-1", kind, {})
    return store.pending_commands("pong-1")


RACE = """
import json, sys, time
from pathlib import Path
from services.home import open_store
from services.store import RunIsLive, RunNameInUse, RunRecord, this_process
store = open_store(sys.argv[1], Path("."))
host, pid, started = this_process()
sys.stdin.readline()
won = {"register": [], "adopt": []}
for index in range(40):
    try:
        now = time.time()
        store.register(
            RunRecord(f"new-{index}", now, "dqn", "E", 0, host, pid, started, "running", now, None, {})
        )
        won["register"].append(index)
    except RunNameInUse:
        pass
    try:
        store.adopt(f"old-{index}", host, pid, started)
        won["adopt"].append(index)
    except RunIsLive:
        pass
print(json.dumps(won), flush=True)
sys.stdin.readline()
"""


def test_of_two_processes_one_gets_the_name_and_one_the_lost_run(backend: Backend, store: RunStore) -> None:
    for index in range(40):
        store.register(elsewhere(f"old-{index}", heartbeat=ago(60)))
    racers = [start_python(RACE, backend.url) for _ in range(2)]
    try:
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        won = [json.loads(racer.stdout.readline()) for racer in racers if racer.stdout is not None]
        for kind, prefix in (("register", "new"), ("adopt", "old")):
            assert sorted(won[0][kind] + won[1][kind]) == list(range(40)), kind
            owners = {index: racer.pid for racer, one in zip(racers, won, strict=True) for index in one[kind]}
            assert {index: store.get(f"{prefix}-{index}").pid for index in range(40)} == owners
    finally:
        for racer in racers:
            racer.communicate(timeout=10)


# Snapshots


def test_the_last_snapshot_is_read(store: RunStore) -> None:
    store.register(record())
    assert store.read_snapshot("pong-1") is None
    store.write_snapshot("pong-1", {"env_steps": 1}, time.time())
    heartbeat = time.time() + 1
    store.write_snapshot("pong-1", {"env_steps": 2, "waits": {"insert": None}, "pids": [1, 2]}, heartbeat)
    assert store.read_snapshot("pong-1") == {"env_steps": 2, "waits": {"insert": None}, "pids": [1, 2]}
    assert store.get("pong-1").heartbeat == heartbeat


def test_payloads_come_back_plain(store: RunStore) -> None:
    store.register(record())
    payload = {
        "nan": math.nan,
        "rates": (math.inf, -math.inf, 1.5),
        "float32": np.float32(0.5),
        "int64": np.int64(2**40),
        "numpy nan": np.float32("nan"),
        "big": 2**100,
        "yes": True,
        "file": "caf\udce9",
    }
    store.write_snapshot("pong-1", payload, time.time())
    plain = store.read_snapshot("pong-1")
    assert plain == {
        "nan": None,
        "rates": [None, None, 1.5],
        "float32": 0.5,
        "int64": 2**40,
        "numpy nan": None,
        "big": 2**100,
        "yes": True,
        "file": "caf?",
    }
    json.dumps(plain, allow_nan=False)


@pytest.mark.parametrize(
    ("payload", "place"),
    [
        (
            {"processes": [{"node": object()}]},
            r"snapshot\['processes'\]\[0\]\['node'\] must be .* got object",
        ),
        ({"array": np.zeros(2)}, r"snapshot\['array'\] must be .* got ndarray"),
        ({"by worker": {0: 1}}, r"keys of snapshot\['by worker'\] must be text, got 0"),
        ([1], "snapshot must be a dict, got list"),
    ],
)
def test_what_is_not_plain_is_refused_by_place(store: RunStore, payload: Any, place: str) -> None:
    store.register(record())
    with pytest.raises(NotStorable, match=place):
        store.write_snapshot("pong-1", payload, time.time())
    assert store.read_snapshot("pong-1") is None


@pytest.mark.parametrize("moment", [math.nan, math.inf, -1.0, "now", None])
def test_a_moment_that_cannot_be_is_refused(store: RunStore, moment: Any) -> None:
    store.register(record())
    for call in (
        lambda: store.write_snapshot("pong-1", {}, moment),
        lambda: store.add_event("pong-1", "start", "", moment),
        lambda: store.add_metrics("pong-1", 0, {}, moment),
        lambda: store.adopt("pong-1", "host", 1, moment),
    ):
        with pytest.raises(ConfigurationError, match="must be Unix seconds, got"):
            call()


# Commands


def test_a_command_is_read_and_answered_once(store: RunStore) -> None:
    store.register(record())
    assert store.pending_commands("pong-1") == []
    first = store.send_command("pong-1", "scale", {"actors": 4})
    second = store.send_command("pong-1", "stop", {})
    commands = store.pending_commands("pong-1")
    assert [(command.id, command.kind, command.arguments) for command in commands] == [
        (first, "scale", {"actors": 4}),
        (second, "stop", {}),
    ]
    assert commands[0].time == pytest.approx(time.time(), abs=5)
    assert store.command_result("pong-1", first) is None
    store.acknowledge("pong-1", first, {"actors": 4})
    store.acknowledge("pong-1", first, {"actors": 99})
    assert store.command_result("pong-1", first) == {"actors": 4}
    assert [command.id for command in store.pending_commands("pong-1")] == [second]


def test_commands_of_two_runs_do_not_mix(store: RunStore) -> None:
    store.register(record("a"))
    store.register(record("b"))
    sent = store.send_command("a", "stop", {})
    assert store.pending_commands("b") == []
    with pytest.raises(UnknownCommand, match=f"run 'b' has no command {sent}"):
        store.acknowledge("b", sent, {})
    with pytest.raises(UnknownCommand):
        store.command_result("b", sent)


def test_nobody_reads_a_command_for_an_ended_or_lost_run(store: RunStore) -> None:
    store.register(elsewhere(state="finished", stopped_because="it had all its steps"))
    with pytest.raises(RunIsNotLive, match=r"is finished \(it had all its steps\): nobody would read 'stop'"):
        store.send_command("pong-1", "stop", {})
    store.register(elsewhere("gone", heartbeat=ago(60)))
    with pytest.raises(RunIsNotLive, match="is lost"):
        store.send_command("gone", "stop", {})


def test_waiting_ends_with_the_answer(backend: Backend, store: RunStore) -> None:
    store.register(record())
    sent = store.send_command("pong-1", "stop", {})
    with backend.open() as coordinator:
        answer = threading.Timer(0.2, coordinator.acknowledge, ("pong-1", sent, {"checkpoint": "last"}))
        answer.start()
        assert store.wait_for_acknowledgement("pong-1", sent, deadline_seconds=5) == {"checkpoint": "last"}
        answer.join()


def test_waiting_ends_at_its_deadline_and_says_what_for(store: RunStore) -> None:
    store.register(elsewhere())
    sent = store.send_command("pong-1", "stop", {})
    store.write_snapshot("pong-1", {}, ago(60))
    started = time.monotonic()
    with pytest.raises(StoreTimeout, match=r"0\.2 s for run 'pong-1' to answer 'stop' .*lost: no heartbeat"):
        store.wait_for_acknowledgement("pong-1", sent, deadline_seconds=0.2)
    assert 0.2 <= time.monotonic() - started < 2
    assert [command.id for command in store.pending_commands("pong-1")] == [sent]
    with pytest.raises(UnknownCommand):
        store.wait_for_acknowledgement("pong-1", sent + 1, deadline_seconds=5)


# Events


def test_events_are_read_newest_or_followed(store: RunStore) -> None:
    store.register(record())
    assert store.events("pong-1") == []
    for index in range(10):
        store.add_event("pong-1", "restart", f"worker {index}", 100.0 + index)
    newest = store.events("pong-1", limit=3)
    assert [(event.kind, event.text, event.time) for event in newest] == [
        ("restart", f"worker {index}", 100.0 + index) for index in (7, 8, 9)
    ]
    followed: list[str] = []
    last = 0
    while batch := store.events("pong-1", limit=4, after_id=last):
        followed += [event.text for event in batch]
        last = batch[-1].id
    assert followed == [f"worker {index}" for index in range(10)]
    assert store.events("pong-1", after_id=last) == []


def test_any_text_can_be_an_event(store: RunStore) -> None:
    store.register(record())
    store.add_event("pong-1", "death", "no such file: caf\udce9\0'; DROP TABLE runs; --", 1.0)
    store.add_event("pong-1", "death", "x" * 50_000, 2.0)
    first, second = store.events("pong-1")
    assert first.text == "no such file: caf?\0'; DROP TABLE runs; --"
    assert second.text == "x" * 20_000 + "... (30000 characters more)"


# Metrics


def test_metrics_keep_what_json_cannot_say(store: RunStore) -> None:
    store.register(record())
    store.add_metrics("pong-1", 1000, {"loss": math.nan, "a": math.inf, "b": -math.inf, "fps": 61.5}, 5.0)
    store.add_metrics("pong-1", np.int64(2000), {"loss": np.float32(0.25), "n": 3}, 6.0)  # type: ignore[arg-type]
    first, second = store.metrics("pong-1")
    assert math.isnan(first.values.pop("loss"))
    assert (first.step, first.time, first.values) == (1000, 5.0, {"a": math.inf, "b": -math.inf, "fps": 61.5})
    assert (second.step, second.time, second.values) == (2000, 6.0, {"loss": 0.25, "n": 3.0})
    assert all(type(value) is float for value in second.values.values())


@pytest.mark.parametrize("values", [{"loss": "0.5"}, {"loss": None}, {"loss": np.zeros(1)}, {3: 1.0}])
def test_a_metric_is_a_number(store: RunStore, values: Any) -> None:
    store.register(record())
    with pytest.raises(NotStorable, match="must be a number, got"):
        store.add_metrics("pong-1", 0, values, 1.0)


@pytest.mark.parametrize("step", [-1, 1.5, 2**63, None])
def test_a_step_is_a_whole_number(store: RunStore, step: Any) -> None:
    store.register(record())
    with pytest.raises(ConfigurationError, match="step must be a whole number of at least 0, got"):
        store.add_metrics("pong-1", step, {}, 1.0)


@pytest.mark.parametrize("limit", [0, -1, 2.5])
def test_a_limit_is_positive(store: RunStore, limit: Any) -> None:
    store.register(record())
    for read in (store.metrics, store.events):
        with pytest.raises(ConfigurationError, match="limit must be a whole number of at least 1, got"):
            read("pong-1", limit)


def test_histories_are_bounded_for_each_run(backend: Backend) -> None:
    with backend.open(history=20) as store:
        store.register(record("long"))
        store.register(record("short"))
        for index in range(50):
            store.add_metrics("long", index, {"x": index}, 1.0)
            store.add_event("long", "tick", str(index), 1.0)
            if index < 5:
                store.add_metrics("short", index, {"x": index}, 1.0)
        assert [row.step for row in store.metrics("long")] == list(range(30, 50))
        assert [row.step for row in store.metrics("long", limit=3)] == [47, 48, 49]
        assert [event.text for event in store.events("long", after_id=0)] == [str(i) for i in range(30, 50)]
        assert [row.step for row in store.metrics("short")] == list(range(5))


# Several processes and threads


COORDINATOR = """
import sys, time
from pathlib import Path
from services.home import open_store
store = open_store(sys.argv[1], Path("."))
done = False
for step in range(1, 10_000):
    store.write_snapshot("pong-1", {"step": step, "twice": 2 * step}, time.time())
    store.add_metrics("pong-1", step, {"x": step}, time.time())
    store.add_event("pong-1", "tick", str(step), time.time())
    for command in store.pending_commands("pong-1"):
        store.acknowledge("pong-1", command.id, {"echo": command.arguments["n"]})
        done = command.kind == "stop"
    if done and step >= 200:
        break
print(step, flush=True)
"""


def test_a_coordinator_readers_and_a_commander_share_a_store(backend: Backend, store: RunStore) -> None:
    store.register(record())
    trouble: list[BaseException] = []
    stop = threading.Event()

    def read() -> None:
        try:
            with backend.open() as reader:
                last = 0
                while not stop.is_set():
                    snapshot = reader.read_snapshot("pong-1") or {"step": 0, "twice": 0}
                    assert snapshot["twice"] == 2 * snapshot["step"]
                    assert snapshot["step"] >= last
                    last = snapshot["step"]
                    assert reader.list_runs()[0].state == "running"
        except BaseException as error:
            trouble.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    coordinator = start_python(COORDINATOR, backend.url)
    try:
        for reader in readers:
            reader.start()
        for number in range(20):
            sent = store.send_command("pong-1", "scale" if number < 19 else "stop", {"n": number})
            assert store.wait_for_acknowledgement("pong-1", sent, deadline_seconds=10) == {"echo": number}
        output, _ = coordinator.communicate(timeout=20)
    finally:
        stop.set()
        coordinator.kill()
        coordinator.communicate()
        for reader in readers:
            reader.join(timeout=10)
    assert trouble == []
    steps = int(output)
    assert [row.step for row in store.metrics("pong-1")] == list(range(1, steps + 1))
    assert [event.text for event in store.events("pong-1", limit=HISTORY)] == [
        str(step) for step in range(1, steps + 1)
    ]
    assert store.read_snapshot("pong-1") == {"step": steps, "twice": 2 * steps}


def test_threads_may_share_one_store(store: RunStore) -> None:
    store.register(record())
    trouble: list[BaseException] = []

    def write(offset: int) -> None:
        try:
            for index in range(50):
                store.add_metrics("pong-1", offset + index, {}, 1.0)
                store.get("pong-1")
        except BaseException as error:
            trouble.append(error)

    threads = [threading.Thread(target=write, args=(50 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert trouble == []
    assert sorted(row.step for row in store.metrics("pong-1")) == list(range(200))


# A store that is away


def test_a_store_that_is_away_is_an_error_in_time(backend: Backend, store: RunStore) -> None:
    store.register(record())
    with store.with_timeout(0.2) as impatient:
        with backend.outage():
            started = time.monotonic()
            with pytest.raises(StoreUnavailable, match="store"):
                impatient.update_state("pong-1", "stopping")
            assert time.monotonic() - started < 2
        assert impatient.get("pong-1").state == "running"
        impatient.update_state("pong-1", "stopping")
    assert store.get("pong-1").state == "stopping"


def test_a_call_outlasts_a_short_outage(backend: Backend, store: RunStore) -> None:
    store.register(record())
    with ThreadPoolExecutor(1) as thread:
        with backend.silence():
            waiting = thread.submit(store.update_state, "pong-1", "stopping")
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
        waiting.result(timeout=5)
    assert store.get("pong-1").state == "stopping"


def test_health_names_the_server(store: RunStore, backend: Backend) -> None:
    health = store.health()
    assert health.warnings == ()
    if isinstance(backend, RedisBackend):
        assert re.match(r"Redis \d+\.\d+\.\d+, redis://127", health.server)
        assert health.clock == pytest.approx(time.time(), abs=5.0)
    else:
        assert str(backend.path) in health.server
        assert health.clock is None


def test_health_of_a_server_that_is_away(redis_server: RedisServer) -> None:
    with (
        RedisRunStore(redis_server.url, timeout_seconds=0.3) as store,
        redis_server.suspended(),
        pytest.raises(StoreUnavailable, match="no answer within"),
    ):
        store.health()


def test_a_redis_that_may_forget_is_warned_about(tmp_path: Path) -> None:
    options = ("--appendonly", "no", "--maxmemory-policy", "allkeys-lru", "--requirepass", "hunter2")
    with RedisServer(tmp_path, *options) as server, RedisRunStore(server.url.replace("//", "//:hunter2@")) as store:
        health = store.health()
    assert [("noeviction" in warning, "appendonly" in warning) for warning in health.warnings] == [
        (True, False),
        (False, True),
    ]
    assert "hunter2" not in str(health)


def test_a_closed_store_says_so(backend: Backend) -> None:
    store = backend.open()
    store.register(record())
    store.close()
    store.close()
    with pytest.raises(StoreUnavailable, match="was closed"):
        store.get("pong-1")


@pytest.mark.parametrize("options", [{"timeout_seconds": 0}, {"timeout_seconds": math.nan}, {"history": 0}])
def test_options_that_cannot_work_are_refused(backend: Backend, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"a store's .* must be"):
        backend.open(**options)


# The coordinator's pen


@pytest.fixture
def writer(store: RunStore) -> Iterator[BufferedWriter]:
    store.register(record())
    made = BufferedWriter(store, "pong-1", patience_seconds=0.25, retry_seconds=0.1)
    yield made
    made.close(deadline_seconds=0)


def write_everything(writer: BufferedWriter, index: int) -> None:
    writer.write_snapshot({"index": index}, time.time())
    writer.add_event("tick", str(index), 100.0 + index)
    writer.add_metrics(index, {"loss": math.nan}, 100.0 + index)


def test_a_writer_writes_at_once(store: RunStore, writer: BufferedWriter) -> None:
    write_everything(writer, 1)
    writer.update_state("stopping", "Ctrl-C")
    sent = store.send_command("pong-1", "stop", {"n": 1})
    assert [command.id for command in writer.pending_commands()] == [sent]
    writer.acknowledge(sent, {"ok": True})
    assert writer.pending_commands() == []
    assert (writer.waiting, writer.problem, writer.dropped) == (0, None, {})
    assert store.read_snapshot("pong-1") == {"index": 1}
    assert [event.text for event in store.events("pong-1")] == ["1"]
    assert [row.step for row in store.metrics("pong-1")] == [1]
    assert store.get("pong-1").stopped_because == "Ctrl-C"
    assert store.command_result("pong-1", sent) == {"ok": True}


def test_a_writer_catches_up_when_the_store_is_back(backend: Backend, store: RunStore, writer: BufferedWriter) -> None:
    sent = store.send_command("pong-1", "stop", {})
    assert len(writer.pending_commands()) == 1
    write_everything(writer, 0)
    with backend.outage():
        for index in range(1, 300):
            started = time.monotonic()
            write_everything(writer, index)
            assert time.monotonic() - started < 1
        writer.update_state("stopping", "squall stop")
        writer.acknowledge(sent, {"ok": True})
        assert writer.pending_commands() == []
        assert writer.problem is not None
        assert "store" in writer.problem
        assert writer.waiting == 2 * 299 + 1 + 2
    assert store.read_snapshot("pong-1") == {"index": 0}
    time.sleep(0.11)
    deadline = time.monotonic() + 5
    while writer.waiting:
        assert time.monotonic() < deadline
        assert writer.pending_commands() == []
    assert (writer.problem, writer.dropped) == (None, {})
    assert store.read_snapshot("pong-1") == {"index": 299}
    assert [event.text for event in store.events("pong-1", limit=1000)] == [str(i) for i in range(300)]
    assert [row.step for row in store.metrics("pong-1")] == list(range(300))
    assert [row.time for row in store.metrics("pong-1")] == [100.0 + i for i in range(300)]
    assert (store.get("pong-1").state, store.get("pong-1").stopped_because) == ("stopping", "squall stop")
    assert store.command_result("pong-1", sent) == {"ok": True}


def test_a_command_is_not_carried_out_twice_while_its_answer_waits(backend: Backend, store: RunStore) -> None:
    store.register(record())
    writer = BufferedWriter(store, "pong-1", retry_seconds=0)
    sent = store.send_command("pong-1", "scale", {})
    with backend.outage():
        writer.acknowledge(sent, {})
        assert writer.pending_commands() == []
    assert writer.close(deadline_seconds=5)
    assert store.command_result("pong-1", sent) == {}


def test_a_full_buffer_drops_the_oldest_metrics_first(backend: Backend, store: RunStore) -> None:
    store.register(record())
    writer = BufferedWriter(store, "pong-1", capacity=10, patience_seconds=0.1, retry_seconds=60)
    with backend.outage():
        for index in range(8):
            writer.add_metrics(index, {}, 1.0)
        writer.update_state("stopping", "squall stop")
        for index in range(6):
            writer.add_event("tick", str(index), 1.0)
        writer.write_snapshot({"n": 1}, time.time())
        assert (writer.waiting, writer.dropped) == (11, {"metrics": 5})
        for index in range(6, 12):
            writer.add_event("tick", str(index), 1.0)
        assert (writer.waiting, writer.dropped) == (11, {"metrics": 8, "event": 3})
    assert writer.close(deadline_seconds=5)
    assert store.metrics("pong-1") == []
    assert [event.text for event in store.events("pong-1")] == [str(index) for index in range(3, 12)]
    assert store.get("pong-1").state == "stopping"
    assert store.read_snapshot("pong-1") == {"n": 1}


def test_a_writer_rests_between_tries(backend: Backend, store: RunStore) -> None:
    store.register(record())
    writer = BufferedWriter(store, "pong-1", patience_seconds=0.1, retry_seconds=60)
    with backend.outage():
        started = time.monotonic()
        for index in range(100):
            write_everything(writer, index)
        assert time.monotonic() - started < 2
        assert not writer.flush(deadline_seconds=0.2)
        assert time.monotonic() - started < 3
        assert not writer.close(deadline_seconds=0)


def test_a_writer_refuses_bad_values_at_once_and_keeps_none(backend: Backend, writer: BufferedWriter) -> None:
    with backend.outage():
        for call in (
            lambda: writer.write_snapshot({"x": object()}, 1.0),
            lambda: writer.write_snapshot({}, math.nan),
            lambda: writer.update_state("lost"),
            lambda: writer.add_event("tick", "", math.nan),
            lambda: writer.add_metrics(-1, {}, 1.0),
            lambda: writer.add_metrics(1, {"x": None}, 1.0),  # type: ignore[dict-item]
            lambda: writer.acknowledge(1, {"x": object()}),
        ):
            with pytest.raises((NotStorable, ConfigurationError)):
                call()
    assert writer.waiting == 0


def test_what_waits_is_a_copy(backend: Backend, store: RunStore, writer: BufferedWriter) -> None:
    snapshot, values = {"n": [1]}, {"x": 1.0}
    with backend.outage():
        writer.write_snapshot(snapshot, time.time())
        writer.add_metrics(1, values, 1.0)
        snapshot["n"].append(2)
        values["x"] = 2.0
    assert writer.flush(deadline_seconds=5)
    assert store.read_snapshot("pong-1") == {"n": [1]}
    assert store.metrics("pong-1")[0].values == {"x": 1.0}


def test_what_the_store_refuses_is_counted_and_stops_nothing(store: RunStore) -> None:
    writer = BufferedWriter(store, "never-registered")
    write_everything(writer, 1)
    assert (writer.waiting, writer.dropped) == (0, {"snapshot": 1, "event": 1, "metrics": 1})
    assert "no run is named 'never-registered'" in (writer.problem or "")
    assert writer.pending_commands() == []
    assert writer.close()


def test_a_writer_whose_run_was_adopted_meanwhile_drops_what_it_has_and_says_so(
    backend: Backend, store: RunStore
) -> None:
    before = elsewhere(heartbeat=ago(60))
    store.register(before)
    writer = BufferedWriter(store, "pong-1", owner=before.owner, retry_seconds=0)
    with backend.outage():
        write_everything(writer, 1)
        writer.update_state("stopping")
        assert writer.pending_commands() == []
        writer.check_owner()
    adopted = store.adopt("pong-1", *this_process())
    store.send_command("pong-1", "stop", {})
    for call in (writer.pending_commands, writer.check_owner):
        with pytest.raises(RunTakenOver, match="goes on there"):
            call()
    write_everything(writer, 2)
    assert (writer.waiting, writer.dropped) == (0, {"snapshot": 2, "event": 2, "metrics": 2, "state": 1})
    assert writer.close()
    assert (store.get("pong-1"), store.read_snapshot("pong-1")) == (adopted, None)
    assert (store.events("pong-1"), store.metrics("pong-1")) == ([], [])


def test_at_the_end_a_store_that_is_away_is_waited_for(backend: Backend, store: RunStore) -> None:
    store.register(record())
    writer = BufferedWriter(store, "pong-1", retry_seconds=0)
    told: list[str] = []
    with ThreadPoolExecutor(1) as thread:
        with backend.outage():
            writer.update_state("finished", "steps")
            handing_in = thread.submit(writer.hand_in, lambda: False, told.append)
            end = time.monotonic() + 30
            while not told and not handing_in.done():
                assert time.monotonic() < end
                time.sleep(0.05)
        handing_in.result(timeout=30)
    assert [text.partition(",")[0] for text in told] == ["waiting up to 60 s for the run store"]
    assert (store.get("pong-1").state, store.get("pong-1").stopped_because) == ("finished", "steps")


def test_a_signal_ends_the_wait_for_the_store_and_what_it_never_got_is_told(backend: Backend, store: RunStore) -> None:
    store.register(record())
    writer = BufferedWriter(store, "pong-1", retry_seconds=0)
    told: list[str] = []
    with backend.outage(), StopSignals(lambda: pytest.fail("it was a first wish")) as signals:
        signal.raise_signal(signal.SIGINT)  # which ended the run
        writer.update_state("finished", signals.wanted)
        writer.add_event("end", "", 1.0)
        signals.forget()
        threading.Timer(1.0, signal.raise_signal, (signal.SIGINT,)).start()
        started = time.monotonic()
        writer.hand_in(lambda: signals.wanted is not None, told.append)
        assert time.monotonic() - started < 30
    assert re.match("not delivered .*: 1 x event, 1 x state; run pong-1 will read lost there: run store", told[-1])
    assert store.get("pong-1").state == "running"


# SQLite


def test_every_error_is_a_squall_error(store: RunStore) -> None:
    for kind in (RunNameInUse, UnknownRun, UnknownCommand, RunIsLive, RunIsNotLive, RunTakenOver, NotStorable):
        assert issubclass(kind, SquallError)
    for kind in (StoreUnavailable, StoreIncompatible, StoreTimeout):
        assert issubclass(kind, SquallError)


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url, path in (
        (None, tmp_path / "home" / "squall.db"),
        ("sqlite:///runs/here.db", tmp_path / "runs" / "here.db"),
        (f"sqlite:///{tmp_path}/odd ?#%20.db", tmp_path / "odd ?#%20.db"),
    ):
        with open_store(url, tmp_path / "home") as store:
            assert not path.exists()
            store.register(record())
            assert path.exists()
            assert store.get("pong-1").algorithm == "dqn"


@pytest.mark.parametrize(
    "url",
    ["", "squall.db", "sqlite:", "sqlite://x.db", "sqlite:///", "sqlite:///:memory:", "postgres://host:5432/0"],
)
def test_a_url_that_names_no_store_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match=r"a store is sqlite:///relative/file\.db, .*redis.*unix.*, got ") as caught:
        open_store(url, tmp_path)
    assert isinstance(caught.value, ConfigurationError)
    assert repr(url) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["postgres://me:hunter2@host/0", "postgres:me:hun/ter2@host", "hunter2@host"])
def test_a_password_is_not_shown(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"\*\*\*@host") as caught:
        open_store(url, tmp_path)
    assert "ter2" not in str(caught.value)


def test_looking_makes_no_file_and_sees_one_that_appears(tmp_path: Path) -> None:
    runs_dir = tmp_path / "runs"
    with open_store(None, runs_dir, create=False) as reader:
        assert reader.list_runs() == []
        with pytest.raises(UnknownRun, match="there are no runs yet"):
            reader.get("pong-1")
        with pytest.raises(StoreUnavailable, match="there is no run store at"):
            reader.register(record())
        assert not runs_dir.exists()
        with open_store(None, runs_dir) as writer:
            writer.register(record())
            assert [run.name for run in reader.list_runs()] == ["pong-1"]
            sent = reader.send_command("pong-1", "stop", {})
            assert [command.id for command in writer.pending_commands("pong-1")] == [sent]


def test_closing_leaves_one_file(tmp_path: Path) -> None:
    with open_store(None, tmp_path) as store:
        store.register(record())
        probe = sqlite3.connect(tmp_path / "squall.db")
        assert probe.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        probe.close()
    assert [path.name for path in tmp_path.iterdir()] == ["squall.db"]


def test_a_store_of_a_newer_squall_is_refused_and_left_alone(tmp_path: Path) -> None:
    with open_store(None, tmp_path) as store:
        store.register(record())
    newer = sqlite3.connect(tmp_path / "squall.db")
    newer.execute("PRAGMA user_version = 7")
    newer.close()
    with open_store(None, tmp_path) as store:
        for call in (store.list_runs, lambda: store.register(record("other"))):
            with pytest.raises(StoreIncompatible, match=r"version 7, made by a newer Squall.*up to version 1"):
                call()


def test_another_programs_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "squall.db"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE runs (id INTEGER)")
    other.execute("PRAGMA user_version = 1")
    other.commit()
    other.close()
    before = path.read_bytes()
    with open_store(None, tmp_path) as store, pytest.raises(StoreIncompatible, match="of something else"):
        store.list_runs()
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "squall.db"
    path.write_text("dear diary\n" * 1000)
    with open_store(None, tmp_path) as store, pytest.raises(StoreIncompatible, match="is no SQLite file"):
        store.list_runs()
    assert path.read_text() == "dear diary\n" * 1000


@pytest.mark.parametrize("create", [True, False])
def test_a_folder_that_cannot_be_is_unavailable(tmp_path: Path, create: bool) -> None:
    (tmp_path / "runs").write_text("")
    with (
        open_store(None, tmp_path / "runs", create=create) as store,
        pytest.raises(StoreUnavailable, match=r"squall\.db: Not a directory"),
    ):
        store.list_runs()


def test_a_deleted_file_is_unavailable_until_it_is_back(tmp_path: Path) -> None:
    path = tmp_path / "squall.db"
    with open_store(None, tmp_path) as store:
        store.register(record())
        store.add_event("pong-1", "tick", "before", 1.0)
    with open_store(None, tmp_path) as store:
        writer = BufferedWriter(store, "pong-1", retry_seconds=0)
        writer.add_event("tick", "connected", 2.0)
        path.rename(tmp_path / "aside.db")
        writer.add_event("tick", "while away", 3.0)
        assert "was deleted or moved away" in (writer.problem or "")
        assert not path.exists()
        (tmp_path / "aside.db").rename(path)
        assert writer.close(deadline_seconds=5)
        assert [event.text for event in store.events("pong-1")] == ["before", "connected", "while away"]


def test_two_processes_may_make_the_file_at_once(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from services.home import open_store
sys.stdin.readline()
for index in range(20):
    with open_store(None, Path(sys.argv[1]) / str(index)) as store:
        assert store.list_runs() == []
"""
    makers = [start_python(script, str(tmp_path)) for _ in range(2)]
    for maker in makers:
        assert maker.stdin is not None
        maker.stdin.write("go\n")
        maker.stdin.flush()
    for maker in makers:
        maker.communicate(timeout=20)
    assert [maker.returncode for maker in makers] == [0, 0]


def test_an_interrupted_change_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SQLiteRunStore(tmp_path / "squall.db") as store:
        store.register(record())
        append = store._append

        def interrupted(*arguments: Any) -> int:
            append(*arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(store, "_append", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.add_event("pong-1", "tick", "half", 1.0)
        store.add_event("pong-1", "tick", "whole", 2.0)
        assert [(event.id, event.text) for event in store.events("pong-1")] == [(1, "whole")]


def test_metrics_are_json_that_any_language_reads(tmp_path: Path) -> None:
    with open_store(None, tmp_path) as store:
        store.register(record())
        store.add_metrics("pong-1", 0, {"loss": math.nan, "x": 1.0}, 1.0)
    probe = sqlite3.connect(tmp_path / "squall.db")
    (text,) = probe.execute('SELECT "values" FROM metrics').fetchone()
    probe.close()
    assert text == '{"loss": "nan", "x": 1.0}'


def test_this_process_is_this_process() -> None:
    host, pid, started = this_process()
    assert (host, pid) == (socket.gethostname(), os.getpid())
    assert started == pytest.approx(psutil.Process().create_time(), abs=2)
