"""Real runs whose processes are killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable

import pytest

from tests.services.running import LONG, ON_POLICY, Run, Start, squall

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def kill_each(run: Run, roles: Iterable[str]) -> None:
    """Kill a process of each role, one after the other; each returns, and the run goes on, before the next dies."""
    for role in roles:
        before = run.status()
        os.kill(run.pid_of(role), signal.SIGKILL)
        died = time.monotonic()
        after = run.wait_for(
            lambda s, role=role: any(p["role"] == role and p["restarts"] == 1 and p["pid"] for p in s["processes"])
        )
        process = next(p for p in after["processes"] if p["role"] == role and p["index"] == 0)
        assert "killed" in process["last_death"], process
        if role == "worker":
            assert time.monotonic() - died < 15
        assert any(event["kind"] == "death" and role in event["text"] for event in after["events"])
        # All processes work again: both steps and updates grow.
        run.wait_for(lambda s, at=after: s["env_steps"] > at["env_steps"] + 1000 and s["updates"] > at["updates"] + 100)
        assert after["env_steps"] >= before["env_steps"] - 1
    assert [p["restarts"] for p in run.status()["processes"] if p["role"] == "worker"] == [1, 0]


ROLES = ("worker", "learner", "replay", "weights", "evaluator")


@pytest.mark.slow
def test_every_process_may_die_and_the_run_goes_on(start: Start) -> None:
    run = start("killed", *LONG)
    run.wait_for(lambda s: s["state"] == "running" and s["updates"] > 100 and s["best_return"] is not None)
    kill_each(run, ROLES)
    assert squall(run.home, "stop", "killed").returncode == 0
    assert run.finish(30)["samples_per_insert"] == pytest.approx(64, rel=0.05)
    assert run.leftovers() == []


@pytest.mark.long
def test_every_process_may_die_and_the_run_still_reaches_its_score(start: Start) -> None:
    # Twice the preset's steps: killing the replay loses its experience, when exploration is low already.
    run = start("killed", "dqn", "CartPole-v1", "--steps", "100000")
    run.wait_for(lambda s: s["state"] == "running" and s["updates"] > 100 and s["best_return"] is not None)
    kill_each(run, ROLES)
    summary = run.finish(420)
    assert summary["samples_per_insert"] == pytest.approx(64, rel=0.05)
    assert summary["eval_return_mean"] >= 475
    assert run.leftovers() == []


@pytest.mark.slow
def test_every_process_of_an_on_policy_run_may_die(start: Start) -> None:
    run = start("on-policy-killed", *ON_POLICY, "--steps", "1000000")
    run.wait_for(lambda s: s["state"] == "running" and s["updates"] > 20)
    for role in ("worker", "replay", "weights", "learner"):
        os.kill(run.pid_of(role), signal.SIGKILL)
        after = run.wait_for(
            lambda s, role=role: any(p["role"] == role and p["restarts"] == 1 and p["pid"] for p in s["processes"])
        )
        run.wait_for(lambda s, at=after: s["env_steps"] > at["env_steps"] + 2000 and s["updates"] > at["updates"] + 20)
    assert squall(run.home, "stop", "on-policy-killed").returncode == 0
    summary = run.finish(30)
    # Batches of a killed learner are lost, but no batch is trained on twice.
    assert 0.9 < summary["samples_per_insert"] <= 1.0
    assert run.leftovers() == []


def test_a_recreated_weight_store_has_weights_at_once(start: Start) -> None:
    """Also when the learner is killed too: versions never fall behind those of the workers."""
    run = start("stores", *LONG, "--set", "eval_every=0", "--set", "publish_every=50")
    before = run.wait_for(lambda s: s["state"] == "running" and s["weights_version"] > 20)
    for role in ("weights", "learner"):
        os.kill(run.pid_of(role), signal.SIGKILL)
    run.wait_for(
        lambda s: (
            [p["restarts"] for p in s["processes"] if p["role"] in ("weights", "learner") and p["pid"]] == [1, 1]
            and s["weights_version"] > before["weights_version"]
        )
    )
    os.kill(run.pid_of("weights"), signal.SIGKILL)
    run.wait_for(lambda s: any(p["role"] == "weights" and p["restarts"] == 2 and p["pid"] for p in s["processes"]))
    os.kill(run.pid_of("worker"), signal.SIGKILL)
    run.wait_for(
        lambda s: any(
            p["role"] == "worker" and p["restarts"] == 1 and p["last_word"] == "rolling out" for p in s["processes"]
        ),
        seconds=40,
    )
