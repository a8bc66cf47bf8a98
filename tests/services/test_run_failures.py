"""Real runs whose driver is killed or replaced, or whose environment fails."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from pathlib import Path

import pytest
import torch

from tests.services.running import LONG, Start, squall

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


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
    assert "worker-0 died 5 times in a row before it did any work" in run.err.read_text()
    assert "the simulator is gone" in run.err.read_text()
    assert run.out.read_text() == ""
    assert run.status()["state"] == "failed"
    assert run.leftovers() == []
