"""Resuming a run: one coordinator takes it over, and the previous one can no longer write; on every store."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from services.errors import (
    RunIsLive,
    RunTakenOver,
)
from services.store.base import RunStore
from services.store.records import LOST_AFTER, this_process
from tests.services.store.backends import Backend, ago, elsewhere, record, start_python


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
    with pytest.raises(RunIsLive, match=rf"no heartbeat for 6\d s\), but its process {os.getpid()} still exists"):
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
    assert [command.id for command in _send_and_read(store, "scale")] == [unread + 1]


def _send_and_read(store: RunStore, kind: str) -> list[Any]:
    store.send_command("pong-1", kind, {})
    return store.pending_commands("pong-1")


RACE = """
import json, sys, time
from pathlib import Path
from services.errors import RunIsLive, RunNameInUse
from services.store.locate import open_store
from services.store.records import RunRecord, this_process
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
