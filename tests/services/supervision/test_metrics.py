"""Metrics that a real local Ray exports to Prometheus."""

from __future__ import annotations

import importlib.util
import re
import time
import urllib.request
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from services.supervision.metrics import RunMetrics

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

RUN = "measured"
VALUES = {
    "time/total_timesteps": 1_000.0, "train/n_updates": 250.0, "replay/size": 900.0, "replay/bytes": 12_345.0,
    "replay/sample_age": 300.0, "rollout/policy_lag": 1.5, "train/weights_version": 7.0, "rollout/ep_rew_mean": 21.0,
    "time/fps": 99.0, "time/updates_per_second": 25.0,
}  # fmt: skip


def process(name: str, role: str, incarnation: int, restarts: int, waited: float) -> Any:
    report = SimpleNamespace(seconds_waited=waited)
    return SimpleNamespace(name=name, role=role, incarnation=incarnation, restarts=restarts, report=report)


def exported(seconds: float) -> dict[tuple[str, str, str], float]:
    """Return this run's exported values by (metric, process, cause), once all have arrived or `seconds` have passed."""
    port, end = ray.nodes()[0]["MetricsExportPort"], time.monotonic() + seconds
    found: dict[tuple[str, str, str], float] = {}
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                lines = answer.read().decode().splitlines()
        except OSError:
            lines = []
        for line in lines:
            labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
            if labels.get("run") == RUN:
                name = line.partition("{")[0].removesuffix("_total")
                found[name, labels["process"], labels.get("cause", "")] = float(line.split()[-1])
        if ("ray_squall_wait_seconds", "worker-0", "learner") in found:
            return found
        time.sleep(0.5)
    return found


def test_recording_is_quick_whether_or_not_anything_is_exported() -> None:
    metrics = RunMetrics("unheard")
    begun = time.monotonic()
    for _ in range(20):
        metrics.record(VALUES, [process("learner", "learner", 0, 0, 1.0)], 2)
    assert time.monotonic() - begun < 5.0


@pytest.mark.skipif(
    importlib.util.find_spec("prometheus_client") is None, reason="only ray[default], the extra `cluster`, exports"
)
def test_prometheus_finds_a_runs_figures() -> None:
    metrics = RunMetrics(RUN)
    learner = process("learner", "learner", 0, 1, 10.0)
    metrics.record({tag: value / 2 for tag, value in VALUES.items()}, [learner], 2)
    # A recreated worker counts from 0 again; the waiting time of its predecessor still counts.
    metrics.record(VALUES, [learner, process("worker-0", "worker", 0, 0, 4.0)], 3)
    metrics.record(VALUES, [learner, process("worker-0", "worker", 1, 1, 0.5)], 3)
    found = exported(60)
    of_run = "coordinator", ""
    assert {name: found.get((f"ray_squall_{name}", *of_run)) for name in ("env_steps", "updates", "actors")} == {
        "env_steps": 1_000.0, "updates": 250.0, "actors": 3.0,
    }, found  # fmt: skip
    gauges = {
        "replay_size": 900.0, "replay_bytes": 12_345.0, "sample_age": 300.0, "policy_lag": 1.5, "weights_version": 7.0,
        "episode_return_mean": 21.0, "env_steps_per_second": 99.0, "updates_per_second": 25.0,
    }  # fmt: skip
    assert {name: found.get((f"ray_squall_{name}", *of_run)) for name in gauges} == gauges
    assert found["ray_squall_restarts", "learner", ""] == 1.0
    assert found["ray_squall_restarts", "worker-0", ""] == 1.0
    assert found["ray_squall_wait_seconds", "learner", "experience"] == 10.0
    assert found["ray_squall_wait_seconds", "worker-0", "learner"] == 4.5
