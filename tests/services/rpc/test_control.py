"""The RunControl service on both stores, with a stand-in for the coordinator of a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from replay.errors import ConfigurationError
from services.client.run_client import SquallClient
from services.errors import CommandRefused, Overloaded, RunIsNotLive, ServerUnavailable, StoreTimeout, UnknownRun
from services.rpc import control
from services.rpc import squall_pb2 as pb
from services.rpc.control import RunControlService
from services.store.base import RunStore
from tests.services.serving import open_backend, register, serving

SNAPSHOT = {
    "state": "running", "env_steps": 500, "steps": 1000, "updates": 20, "episodes": 4, "weights_version": 2,
    "env_steps_per_second": 12.5, "updates_per_second": 0.5, "samples_per_insert": 8.0, "train_return_mean": None,
    "best_return": 21.5, "actors": 2, "replay": {"size": 400, "bytes": 12345, "capacity": 1000},
    "waiting": {"learner": "data"},
    "processes": [
        {"role": "worker", "index": 1, "node": "here", "pid": None, "state": "starting", "incarnation": 3,
         "restarts": 1, "last_word": "", "last_death": "killed"},
    ],
}  # fmt: skip


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunStore]:
    with open_backend(request.param, tmp_path) as store:
        yield store


@pytest.fixture
def client(store: RunStore) -> Iterator[SquallClient]:
    with serving(RunControlService(store)) as address, SquallClient(address) as client:
        yield client


class Coordinator:
    """A stand-in for a coordinator, which answers the commands of a run until its `with` block ends."""

    def __init__(self, store: RunStore, run: str, **answers: dict[str, Any]) -> None:
        self._store, self._run, self._answers = store, run, answers
        self.received: list[tuple[str, dict[str, Any]]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._answer)

    def _answer(self) -> None:
        while not self._stopping.wait(0.01):
            for command in self._store.pending_commands(self._run):
                self.received.append((command.kind, command.arguments))
                self._store.acknowledge(self._run, command.id, self._answers[command.kind])

    def __enter__(self) -> Coordinator:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()


def test_runs_are_listed_newest_first(client: SquallClient, store: RunStore) -> None:
    assert client.list_runs() == []
    register(store, "first")
    register(store, "second")
    store.update_state("first", "finished", "steps")
    runs = client.list_runs()
    assert [(run.name, run.state, run.stopped_because) for run in runs] == [
        ("second", "running", ""), ("first", "finished", "steps"),
    ]  # fmt: skip
    assert (runs[0].algorithm, runs[0].environment, runs[0].seed) == ("dqn", "CartPole-v1", 3)
    assert runs[0].created == store.get("second").created


def test_status_tells_what_the_run_told(client: SquallClient, store: RunStore) -> None:
    register(store, "mine")
    assert client.status("mine").env_steps == 0
    store.write_snapshot("mine", SNAPSHOT, time.time())
    for number in range(5):
        store.add_event("mine", "note", f"event {number}", time.time())
    status = client.status("mine", events=2)
    assert (status.run.name, status.run.state) == ("mine", "running")
    assert (status.env_steps, status.steps, status.updates, status.actors) == (500, 1000, 20, 2)
    assert (status.replay_size, status.replay_bytes, dict(status.waiting)) == (400, 12345, {"learner": "data"})
    assert not status.HasField("train_return_mean")
    assert status.best_return == 21.5
    assert [event.text for event in status.events] == ["event 3", "event 4"]
    worker = status.processes[0]
    assert (worker.role, worker.index, worker.pid, worker.restarts, worker.last_death) == ("worker", 1, 0, 1, "killed")
    assert list(client.status("mine", events=0).events) == []


def test_a_run_that_is_not_there_or_has_ended(client: SquallClient, store: RunStore) -> None:
    register(store, "pong")
    with pytest.raises(UnknownRun, match="no run is named 'pung'; the nearest: pong"):
        client.status("pung")
    with pytest.raises(UnknownRun):
        list(client.watch("pung"))
    with pytest.raises(UnknownRun):
        client.stop("pung")
    with pytest.raises(ConfigurationError, match="events must be a whole number from 0 to 100, got -1"):
        client.status("pong", events=-1)
    store.update_state("pong", "finished", "steps")
    for command in (client.stop, client.checkpoint, lambda run: client.scale(run, 2)):
        with pytest.raises(RunIsNotLive, match="finished"):
            command("pong")


def test_commands_reach_the_run_and_its_answers_come_back(client: SquallClient, store: RunStore) -> None:
    register(store, "mine")
    answers = {
        "scale": {"before": 2, "actors": 5}, "checkpoint": {"checkpoint": "/there/last.ckpt", "weights_version": 9},
        "stop": {"ok": True},
    }  # fmt: skip
    with Coordinator(store, "mine", **answers) as coordinator:
        scaled = client.scale("mine", 5)
        assert (scaled.before, scaled.actors) == (2, 5)
        written = client.checkpoint("mine")
        assert (written.checkpoint, written.weights_version) == ("/there/last.ckpt", 9)
        client.stop("mine")
    assert coordinator.received == [("scale", {"actors": 5}), ("checkpoint", {}), ("stop", {})]
    with (
        Coordinator(store, "mine", scale={"error": "actors must be positive"}),
        pytest.raises(CommandRefused, match="run 'mine' refused 'scale': actors must be positive"),
    ):
        client.scale("mine", -5)


def test_a_run_that_does_not_answer_ends_the_wait(
    client: SquallClient, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(store, "silent")
    monkeypatch.setattr(control.remote_control, "COMMAND_SECONDS", 0.3)
    with pytest.raises(StoreTimeout, match="for run 'silent' to answer 'stop'"):
        client.stop("silent")


def test_commands_that_wait_keep_nobody_from_asking(
    client: SquallClient, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(store, "silent")
    monkeypatch.setattr(control, "_MAX_COMMANDS", 2)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(client.stop, "silent") for _ in range(2)]
        deadline = time.monotonic() + 20.0
        while len(store.pending_commands("silent")) < 2:
            assert time.monotonic() < deadline, "the commands did not arrive"
            time.sleep(0.01)
        assert client.status("silent").run.state == "running"
        with pytest.raises(Overloaded, match="2 commands are waiting for their runs already"):
            client.stop("silent")
        with Coordinator(store, "silent", stop={"ok": True}):
            for call in waiting:
                call.result()


def test_a_command_whose_caller_has_gone_counts_until_its_thread_is_free(
    client: SquallClient, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(store, "silent")
    monkeypatch.setattr(control, "_MAX_COMMANDS", 1)
    call = client._control.Stop.future(pb.StopRequest(run="silent"), timeout=30)
    deadline = time.monotonic() + 20.0
    while not store.pending_commands("silent"):
        assert time.monotonic() < deadline, "the command did not arrive"
        time.sleep(0.01)
    call.cancel()
    for _ in range(10):
        with pytest.raises(Overloaded, match="1 commands are waiting"):
            client.stop("silent")
    with Coordinator(store, "silent", stop={"ok": True}):
        while True:
            try:
                return client.stop("silent")
            except Overloaded:
                assert time.monotonic() < deadline, "the thread is still in use"


def test_watches_are_limited(client: SquallClient, store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_MAX_WATCHES", 1)
    register(store, "mine", snapshot=SNAPSHOT)
    first = client.watch("mine")
    assert next(first).run.name == "mine"
    with pytest.raises(Overloaded, match="1 calls watch runs already"):
        next(client.watch("mine"))
    first.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 20.0
    while True:
        try:
            next(client.watch("mine"))
            return
        except Overloaded:
            assert time.monotonic() < deadline, "the first watch still counts"


def test_a_run_is_watched_to_its_end(client: SquallClient, store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control.remote_control, "POLL_SECONDS", 0.05)
    register(store, "mine", snapshot=SNAPSHOT)
    store.add_event("mine", "note", "before", time.time())
    updates = client.watch("mine")
    first = next(updates)
    assert (first.env_steps, [event.text for event in first.events]) == (500, ["before"])
    store.add_event("mine", "note", "meanwhile", time.time())
    store.update_state("mine", "finished", "steps")
    rest = list(updates)
    assert rest[-1].run.state == "finished"
    assert [event.text for status in rest for event in status.events] == ["meanwhile"]


def test_a_server_that_is_not_there_is_said_so() -> None:
    with serving() as address:
        pass
    with SquallClient(address) as client, pytest.raises(ServerUnavailable, match=address):
        client.list_runs()
