"""Runs in the store: registration, names, states, and lost runs, on every store."""

from __future__ import annotations

import difflib
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

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
from services.store.base import RunStore
from services.store.records import LOST_AFTER, this_process
from tests.services.store.backends import ago, elsewhere, record, start_python


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
    monkeypatch.setattr(difflib, "get_close_matches", lambda *_, **__: pytest.fail("searched for similar names"))
    for name in ("pong 1" * 1_000_000, "", "../pong-1"):
        with pytest.raises(UnknownRun, match="that is not a valid run name") as caught:
            store.get(name)
        assert len(str(caught.value)) < 200


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


def test_this_process_is_this_process() -> None:
    host, pid, started = this_process()
    assert (host, pid) == (socket.gethostname(), os.getpid())
    assert started == pytest.approx(psutil.Process().create_time(), abs=2)


def test_every_error_is_a_squall_error(store: RunStore) -> None:
    for kind in (RunNameInUse, UnknownRun, UnknownCommand, RunIsLive, RunIsNotLive, RunTakenOver, NotStorable):
        assert issubclass(kind, SquallError)
    for kind in (StoreUnavailable, StoreIncompatible, StoreTimeout):
        assert issubclass(kind, SquallError)


# Lost runs.


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
            assert store.get("pong-1").stopped_because == f"its process {child.pid} has exited"
        finally:
            child.kill()
    assert store.get("pong-1").state == "lost"


def test_another_process_with_the_same_pid_is_not_mistaken(store: RunStore) -> None:
    _, pid, started = this_process()
    store.register(record(pid=pid, pid_started=started - 60))
    assert store.get("pong-1").state == "lost"
