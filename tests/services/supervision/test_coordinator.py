"""The coordinator's order of calls at the end of a run, starts of workers, and results of scale commands.

All actors are fakes.
"""

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

REPORT = EndpointReport(1, "here", "127.0.0.1:5", ("squall.v1.Experience",), "serves")


class FakeActor:
    """Logs calls `handle.method.remote(...)`."""

    def __init__(self, log: list[str], name: str) -> None:
        self._log, self._name = log, name

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *_: self._log.append(f"{self._name}.{method}"))


class LoggingObserver(RunObserver):
    def __init__(self, log: list[str]) -> None:
        self.log, self.events, self.last = log, [""], {"endpoints": None}

    def snapshot(self, snapshot: dict[str, Any]) -> None:
        self.last = snapshot

    def event(self, kind: str, text: str) -> None:
        self.events.append(text)


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Coordinator:
    """Return the coordinator of a run with an endpoint; only some of its actors have started."""
    monkeypatch.setattr(coordinator, "RunMetrics", lambda run: SimpleNamespace(record=lambda *_: None))
    monkeypatch.setattr(endpoint_process, "is_ready", lambda reference: True)
    monkeypatch.setattr(processes.ray, "kill", lambda handle: None)
    monkeypatch.setattr(Process, "start", lambda self, pause=0.0: None)
    config, _ = resolve("dqn", "CartPole-v1", overrides={"serve": "auto"})
    log: list[str] = []
    supervisor = Coordinator(plan(config, "mine", tmp_path), config, tmp_path, LoggingObserver(log))
    for process in (supervisor.learner, supervisor.replay.primary, *supervisor.endpoint_process.processes):
        process.handle = FakeActor(log, process.name)
        monkeypatch.setattr(process, "poll", lambda process=process: setattr(process, "done", True))
    supervisor.endpoint_process.processes[0].report = REPORT
    monkeypatch.setattr(supervisor.replay, "final_report", lambda collect: log.append("final report"))
    monkeypatch.setattr(supervisor.statistics, "summary", lambda final: {})
    return supervisor


@pytest.mark.parametrize(
    ("why", "order"),
    [
        ("steps", ["replay.finish", "endpoint.finish", "final report", "scored", "endpoint.close"]),
        (
            "return",
            [
                "learner.stop",
                "final report",
                "replay.finish",
                "endpoint.finish",
                "final report",
                "scored",
                "endpoint.close",
            ],
        ),
        ("stopped", ["learner.stop", "endpoint.close", "replay.finish", "final report"]),
    ],
)
def test_sessions_hear_of_the_end_and_the_endpoint_closes_in_order(
    supervisor: Coordinator, monkeypatch: pytest.MonkeyPatch, why: str, order: list[str]
) -> None:
    observer: Any = supervisor.observer

    def supervise() -> None:
        supervisor.learner.done = why == "steps"
        supervisor.stopped_because = "stopped" if why == "stopped" else None

    def score(tick: Any) -> None:
        observer.log.append("scored")
        supervisor._report_snapshot()
        assert [endpoint["address"] for endpoint in observer.last["endpoints"]] == ["127.0.0.1:5"], (
            "the endpoint serves during the evaluation"
        )

    monkeypatch.setattr(supervisor, "_supervise", supervise)
    monkeypatch.setattr(supervisor.evaluation_scheduler, "finish", score)
    assert supervisor.run()["stopped_because"] == why
    assert observer.log == order
    assert observer.last["endpoints"] == [], "no caller is sent to a closed endpoint"


def test_a_run_outlives_its_endpoint(supervisor: Coordinator) -> None:
    observer: Any = supervisor.observer
    endpoint = supervisor.endpoint_process.processes[0]
    supervisor._state = "running"
    for _ in range(8):
        endpoint._handle_exit(ProcessExit("failed to start: no such device"))
        supervisor._recreate(endpoint, ProcessExit("failed to start: no such device"))
    assert observer.events[-1].startswith("endpoint is recreated in 60 s")


def test_more_workers_than_memory_holds_are_refused_with_the_figures(
    supervisor: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "memory": 20.0 * WORKER_BYTES})
    answer = supervisor.worker_manager.handle_scale(10_000)
    assert answer["error"].startswith("10,000 actors need about 2,929.7 GiB of memory, 300 MiB each")
    assert len(supervisor.worker_pool.workers) == 2
    assert supervisor.worker_manager.handle_scale(20) == {"actors": 20, "before": 2}
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "memory": 10.0 * WORKER_BYTES})
    assert supervisor.worker_manager.handle_scale(15) == {"actors": 15, "before": 20}, "fewer are never refused"


def test_a_learner_that_waits_for_a_gpu_says_so(supervisor: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "resource_shortage", lambda needed, resource="CPU": f"needs {needed:g} {resource}")
    supervisor.topology = replace(supervisor.topology, placement=Placement(learner_gpus=1))
    supervisor._request_reports()
    assert supervisor.learner.describe()["last_word"] == "needs 1 GPU"
    assert supervisor.learner.state == "pending"


def test_workers_start_a_few_a_tick(supervisor: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    supervisor.worker_manager.handle_scale(20)
    for left in (16, 12, 8, 4, 0, 0):
        supervisor.worker_manager.start_some(learner_ready=True)
        assert len(supervisor.worker_pool.starting) == left


@pytest.mark.parametrize(("cpus", "at_once"), [(1.0, 1), (2.0, 1), (4.0, 3), (64.0, 4)])
def test_until_the_learner_is_up_workers_leave_it_a_cpu(
    supervisor: Coordinator, monkeypatch: pytest.MonkeyPatch, cpus: float, at_once: int
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus})
    monkeypatch.setattr(Process, "start", lambda self, pause=0.0: setattr(self, "handle", FakeActor([], self.name)))
    supervisor.worker_manager.handle_scale(8)

    def started() -> int:
        supervisor.worker_manager.start_some(learner_ready=False)
        return 8 - len(supervisor.worker_pool.starting)

    assert started() == at_once
    if cpus < 64.0:
        assert started() == at_once, "the next worker starts when one has started"
        supervisor.worker_pool.workers[0].report = object()
        assert started() == at_once + 1


def test_the_evaluator_starts_once_the_learner_is_up_and_holds_nothing_up(
    supervisor: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    ready: list[bool] = []
    monkeypatch.setattr(Process, "start", lambda self, pause=0.0: started.append(self.name))
    for skipped in ("_handle_commands", "_poll", "_read_reports", "_every"):
        monkeypatch.setattr(supervisor, skipped, lambda *_: None)
    monkeypatch.setattr(supervisor.worker_manager, "start_some", lambda *, learner_ready: ready.append(learner_ready))
    monkeypatch.setattr(supervisor.evaluation_scheduler, "finish", lambda tick: started.append("scored"))

    def supervise() -> None:
        assert {"learner", "weights"} < set(started)
        supervisor._tick()
        assert "evaluator" not in started
        supervisor.learner.report = SimpleNamespace(waiting_for=None)
        supervisor._tick()
        supervisor._tick()
        assert ready == [False, True, True]
        for process in supervisor.processes:
            process.report = None if process is supervisor.evaluator else supervisor.learner.report
        supervisor._check_started(0.0)
        assert supervisor._state == "running"
        supervisor.learner.done = True

    monkeypatch.setattr(supervisor, "_supervise", supervise)
    monkeypatch.setattr(supervisor.endpoint_process, "describe", lambda: [])
    supervisor.run()
    assert started[-2:] == ["evaluator", "scored"]
    assert started.count("evaluator") == 1
