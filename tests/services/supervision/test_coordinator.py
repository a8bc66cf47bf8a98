"""The order of a run's end, and what a command to scale is answered; with stand-ins for all actors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from services.config import resolve
from services.rpc.endpoint import EndpointReport
from services.supervision import coordinator, endpoint_process, processes
from services.supervision.coordinator import Coordinator
from services.supervision.placement import WORKER_BYTES, Placement
from services.supervision.processes import Process, ProcessExit
from services.supervision.progress import RunObserver
from services.supervision.topology import plan

TOLD = EndpointReport(1, "here", "127.0.0.1:5", ("squall.v1.Experience",), "serves")


class Actor:
    """Remembers what it was told, as `handle.method.remote(...)`."""

    def __init__(self, log: list[str], name: str) -> None:
        self._log, self._name = log, name

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *_: self._log.append(f"{self._name}.{method}"))


class Notes(RunObserver):
    def __init__(self, log: list[str]) -> None:
        self.log, self.events, self.last = log, [""], {"endpoints": None}

    def snapshot(self, snapshot: dict[str, Any]) -> None:
        self.last = snapshot

    def event(self, kind: str, text: str) -> None:
        self.events.append(text)


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Coordinator:
    """A run that serves, of which only some actors are up."""
    monkeypatch.setattr(coordinator, "RunMetrics", lambda run: SimpleNamespace(record=lambda *_: None))
    monkeypatch.setattr(endpoint_process, "is_ready", lambda reference: True)
    monkeypatch.setattr(processes.ray, "kill", lambda handle: None)
    monkeypatch.setattr(Process, "start", lambda self, pause=0.0: None)
    config, _ = resolve("dqn", "CartPole-v1", overrides={"serve": "auto"})
    log: list[str] = []
    made = Coordinator(plan(config, "mine", tmp_path), config, tmp_path, Notes(log))
    for process in (made.learner, made.replay.front, *made.endpoint_process.processes):
        process.handle = Actor(log, process.name)
        monkeypatch.setattr(process, "poll", lambda process=process: setattr(process, "done", True))
    made.endpoint_process.processes[0].report = TOLD
    monkeypatch.setattr(made.replay, "last_words", lambda take_in: log.append("last words"))
    monkeypatch.setattr(made.statistics, "summary", lambda final: {})
    return made


@pytest.mark.parametrize(
    ("why", "order"),
    [
        ("steps", ["replay.finish", "endpoint.finish", "last words", "scored", "endpoint.close"]),
        (
            "return",
            [
                "learner.stop",
                "last words",
                "replay.finish",
                "endpoint.finish",
                "last words",
                "scored",
                "endpoint.close",
            ],
        ),
        ("stopped", ["learner.stop", "endpoint.close", "replay.finish", "last words"]),
    ],
)
def test_sessions_hear_of_the_end_and_the_endpoint_closes_in_order(
    watched: Coordinator, monkeypatch: pytest.MonkeyPatch, why: str, order: list[str]
) -> None:
    observer: Any = watched.observer

    def watch_over() -> None:
        watched.learner.done = why == "steps"
        watched.stopped_because = "stopped" if why == "stopped" else None

    def score(tick: Any) -> None:
        observer.log.append("scored")
        watched._snapshot()
        assert [told["address"] for told in observer.last["endpoints"]] == ["127.0.0.1:5"], "it serves on meanwhile"

    monkeypatch.setattr(watched, "_watch_over", watch_over)
    monkeypatch.setattr(watched.evaluation_scheduler, "finish", score)
    assert watched.run()["stopped_because"] == why
    assert observer.log == order
    assert observer.last["endpoints"] == [], "nobody is sent to what is closed"


def test_a_run_outlives_its_endpoint(watched: Coordinator) -> None:
    observer: Any = watched.observer
    endpoint = watched.endpoint_process.processes[0]
    watched._state = "running"
    for _ in range(8):
        endpoint._handle_exit(ProcessExit("failed to start: no such device"))
        watched._recreate(endpoint, ProcessExit("failed to start: no such device"))
    assert observer.events[-1].startswith("endpoint is recreated in 60 s")


def test_more_workers_than_memory_holds_are_refused_with_the_figures(
    watched: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "memory": 20.0 * WORKER_BYTES})
    answer = watched.worker_manager.scale_as_told(10_000)
    assert answer["error"].startswith("10,000 actors need about 2,929.7 GiB of memory, 300 MiB each")
    assert len(watched.worker_pool.workers) == 2
    assert watched.worker_manager.scale_as_told(20) == {"actors": 20, "before": 2}
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "memory": 10.0 * WORKER_BYTES})
    assert watched.worker_manager.scale_as_told(15) == {"actors": 15, "before": 20}, "fewer are never refused"


def test_a_learner_that_waits_for_a_gpu_says_so(watched: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "no_room", lambda wanted, what="CPU": f"waits for room: {wanted:g} {what}")
    watched.topology = replace(watched.topology, placement=Placement(learner_gpus=1))
    watched._ask_for_reports()
    assert watched.learner.describe()["last_word"] == "waits for room: 1 GPU"
    assert watched.learner.state == "pending"


def test_workers_start_a_few_a_tick(watched: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    watched.worker_manager.scale_as_told(20)
    for left in (16, 12, 8, 4, 0, 0):
        watched.worker_manager.start_some(learner_is_up=True)
        assert len(watched.worker_pool.starting) == left


@pytest.mark.parametrize(("cpus", "at_once"), [(1.0, 1), (2.0, 1), (4.0, 3), (64.0, 4)])
def test_until_the_learner_is_up_workers_leave_it_a_cpu(
    watched: Coordinator, monkeypatch: pytest.MonkeyPatch, cpus: float, at_once: int
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus})
    monkeypatch.setattr(Process, "start", lambda self, pause=0.0: setattr(self, "handle", Actor([], self.name)))
    watched.worker_manager.scale_as_told(8)

    def started() -> int:
        watched.worker_manager.start_some(learner_is_up=False)
        return 8 - len(watched.worker_pool.starting)

    assert started() == at_once
    if cpus < 64.0:
        assert started() == at_once, "the next starts when one is up"
        watched.worker_pool.workers[0].report = object()
        assert started() == at_once + 1


def test_the_evaluator_starts_once_the_learner_is_up_and_holds_nothing_up(
    watched: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    told: list[bool] = []
    monkeypatch.setattr(Process, "start", lambda self, pause=0.0: started.append(self.name))
    for unasked in ("_obey", "_poll", "_read_replay", "_every"):
        monkeypatch.setattr(watched, unasked, lambda *_: None)
    monkeypatch.setattr(watched.worker_manager, "start_some", lambda *, learner_is_up: told.append(learner_is_up))
    monkeypatch.setattr(watched.evaluation_scheduler, "finish", lambda tick: started.append("scored"))

    def watch_over() -> None:
        assert {"learner", "weights"} < set(started)
        watched._tick()
        assert "evaluator" not in started
        watched.learner.report = SimpleNamespace(waiting_for=None)
        watched._tick()
        watched._tick()
        assert told == [False, True, True]
        for process in watched.processes:
            process.report = None if process is watched.evaluator else watched.learner.report
        watched._look_whether_all_are_up(0.0)
        assert watched._state == "running"
        watched.learner.done = True

    monkeypatch.setattr(watched, "_watch_over", watch_over)
    monkeypatch.setattr(watched.endpoint_process, "told", lambda: [])
    watched.run()
    assert started[-2:] == ["evaluator", "scored"]
    assert started.count("evaluator") == 1
