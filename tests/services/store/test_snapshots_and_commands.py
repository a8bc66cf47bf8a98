"""Snapshots and commands of a run, on every store."""

from __future__ import annotations

import json
import math
import threading
import time
from typing import Any

import numpy as np
import pytest

from replay.errors import ConfigurationError
from services.errors import (
    NotStorable,
    RunIsNotLive,
    StoreTimeout,
    UnknownCommand,
)
from services.store.base import RunStore
from tests.services.store.backends import Backend, ago, elsewhere, record


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


# Commands.


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
    with pytest.raises(
        RunIsNotLive, match=r"is finished \(it had all its steps\) and has no coordinator to read 'stop'"
    ):
        store.send_command("pong-1", "stop", {})
    store.register(elsewhere("lost", heartbeat=ago(60)))
    with pytest.raises(RunIsNotLive, match="is lost"):
        store.send_command("lost", "stop", {})


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
