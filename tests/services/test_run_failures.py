"""Real runs whose processes are killed, whose driver is killed or replaced, or whose environment fails."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from pathlib import Path

import pytest
import torch

from tests.services.running import LONG, ON_POLICY, Start, squall

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.mark.slow
def test_every_process_may_die_and_the_run_still_reaches_its_score(start: Start) -> None:
    # Twice the preset's steps: killing the replay loses its experience, late in the run, when exploration is low.
    run = start("killed", "dqn", "CartPole-v1", "--steps", "100000")
    run.wait_for(lambda s: s["state"] == "running" and s["updates"] > 100 and s["best_return"] is not None)
    for role in ("worker", "learner", "replay", "weights", "evaluator"):
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
        run.wait_for(
            lambda s, at=after, role=role: (
                s["env_steps"] > at["env_steps"] + 1000 and s["updates"] > at["updates"] + 100
            )
        )
        assert after["env_steps"] >= before["env_steps"] - 1
    assert [p["restarts"] for p in run.status()["processes"] if p["role"] == "worker"] == [1, 0]
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


def test_a_run_that_another_process_resumed_ends_and_touches_nothing_more(start: Start, tmp_path: Path) -> None:
    run = start("adopted", *LONG, "--actors", "1")
    run.wait_for(lambda s: s["state"] == "running", 240)
    store = sqlite3.connect(tmp_path / "runs" / "squall.db", timeout=30, isolation_level=None)
    # As `RunStore.adopt` does on a machine that regards this run as lost.
    store.execute("UPDATE runs SET host = 'elsewhere', state = 'starting', heartbeat = ?", (time.time(),))
    assert run.process.wait(60) == 1
    assert "was resumed by process" in run.err.read_text()
    assert run.leftovers() == []
    assert store.execute("SELECT host, state, stopped_because FROM runs").fetchall() == [
        ("elsewhere", "starting", None)
    ]
    store.close()
    assert not (tmp_path / "runs" / "adopted" / "summary.json").exists()


def test_a_killed_driver_leaves_nothing_reads_lost_and_resumes(start: Start) -> None:
    run = start("lost", *LONG, "--set", "checkpoint_every=200")
    run.wait_for(lambda s: s["state"] == "running" and s["updates"] > 600)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait(5)
    assert run.leftovers(20) == []
    status = run.status()
    assert status["state"] == "lost"
    saved = torch.load(run.home / "lost" / "checkpoints" / "last.ckpt", weights_only=True)
    steps_then = saved["squall"]["run"]["counters"]["env_steps"]
    assert saved["global_step"] > 200
    assert squall(run.home, "stop", "lost").returncode != 0

    again = start("lost", "--resume", "lost", "--steps", str(steps_then + 3000))
    summary = again.finish(240)
    assert summary["updates"] > saved["global_step"]
    assert steps_then + 3000 <= summary["env_steps"] <= steps_then + 3200
    # The replay is filled first. The rate limiter does not count these inserts, so the ratio stays the same.
    assert summary["samples_per_insert"] == pytest.approx(64, rel=0.1)
    assert again.leftovers() == []
    assert again.status()["state"] == "finished"


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


def test_an_environment_that_always_fails_ends_the_run_with_its_reason(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_for_test.py").write_text(
        "import gymnasium as gym\n"
        "class Broken(gym.Env):\n"
        "    observation_space = gym.spaces.Discrete(5)\n"
        "    action_space = gym.spaces.Discrete(2)\n"
        "    def reset(self, *, seed=None, options=None):\n"
        "        self.at = 0\n"
        "        return 0, {}\n"
        "    def step(self, action):\n"
        "        self.at += 1\n"
        "        if self.at == 3:\n"
        "            raise OSError('the simulator is gone')\n"
        "        return self.at, 0.0, False, False, {}\n"
        "gym.register('Broken-v0', Broken, max_episode_steps=20)\n"
    )
    monkeypatch.chdir(tmp_path)
    run = start("broken", "dqn", "broken_for_test:Broken-v0", "--actors", "1", "--steps", "20000")
    run.process.wait(200)
    assert run.process.returncode == 1
    assert "worker-0 died 5 times in a row before it got to work" in run.err.read_text()
    assert "the simulator is gone" in run.err.read_text()
    assert run.out.read_text() == ""
    assert run.status()["state"] == "failed"
    assert run.leftovers() == []
