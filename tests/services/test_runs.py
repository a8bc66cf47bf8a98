"""Small real runs, from the command line through Ray: results, checkpoints, returns, and environments."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from tests.services.running import LONG, ON_POLICY, SMALL, SQUALL, Run, Start, environment, squall

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

AT_ITS_RETURN = (
    *LONG, "--set", "eval_every=600", "--set", "final_eval_episodes=3", "--actors", "1", "--stop-at-return", "5",
)  # fmt: skip


class Finished(NamedTuple):
    """A run that has ended, with what others saw of it while it was running, beside another one at the same time."""

    run: Run
    other: dict[str, Any]
    status: dict[str, Any]
    summary: dict[str, Any]
    watched: tuple[int, str, str]


@pytest.fixture(scope="module")
def finished(start_for_module: Start) -> Finished:
    run = start_for_module("small", *SMALL, "--steps", "4000", "--actors", "3")
    other = start_for_module("other", *SMALL, "--steps", "1500", "--actors", "1", "--seed", "1")
    status = run.wait_for(lambda s: s["state"] == "running")
    with Popen(
        [*SQUALL, "watch", "small", "--json"], env=environment(run.home), stdout=PIPE, stderr=PIPE, text=True
    ) as watch:
        status = run.wait_for(lambda s: s["state"] == "running" and s["updates"] > 0)
        summary = run.finish(240)
        out, err = watch.communicate(timeout=60)
        other_summary = other.finish(240)
    return Finished(run, other_summary, status, summary, (watch.returncode, out, err))


def test_a_run_ends_by_itself_and_says_how_it_went(finished: Finished) -> None:
    run, _, status, summary, _ = finished
    roles = [(process["role"], process["index"]) for process in status["processes"]]
    assert roles == [
        ("coordinator", 0), ("weights", 0), ("replay", 0), ("learner", 0),
        ("worker", 0), ("worker", 1), ("worker", 2), ("evaluator", 0),
    ]  # fmt: skip
    pids = [process["pid"] for process in status["processes"]]
    assert None not in pids
    assert len(set(pids)) == len(pids)
    assert status["processes"][0]["pid"] == run.process.pid

    assert summary["stopped_because"] == "steps"
    assert 4000 <= summary["env_steps"] <= 4000 + 3 * 64
    wanted = 64 * 1.0
    assert summary["samples_per_insert"] == pytest.approx(wanted, rel=0.05)
    assert summary["updates"] * 64 == pytest.approx(wanted * (summary["env_steps"] - 500), rel=0.05)
    assert summary["eval_episodes"] == 20
    assert summary["eval_return_mean"] > 5
    assert run.leftovers() == []

    folder = run.home / "small"
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert yaml.safe_load((folder / "config.yaml").read_text())["hyperparameters"]["warm_start_size"] == 500
    assert list((folder / "tensorboard").glob("events*"))
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == summary["updates"]
    assert (folder / "checkpoints" / "best.ckpt").exists()

    listed = json.loads(squall(run.home, "runs", "--json").stdout)
    assert {(row["name"], row["state"]) for row in listed} == {("small", "finished"), ("other", "finished")}
    scores = json.loads(squall(run.home, "evaluate", "small", "--episodes", "3", "--json").stdout)
    assert scores["episodes"] == 3
    assert scores["return_min"] <= scores["return_mean"] <= scores["return_max"]


@pytest.mark.long
@pytest.mark.parametrize("actors", [1, 4])
def test_pong_keeps_the_ratio_and_stores_each_frame_once(start: Start, actors: int) -> None:
    shape = ("--actors", str(actors), "--envs-per-actor", "2", "--steps", "3500")
    sets = ("--set", "warm_start_size=1500", "--set", "final_eval_episodes=1", "--set", "eval_every=0")
    run = start(f"pong-{actors}", "dqn", "PongNoFrameskip-v4", *shape, *sets)
    summary = run.finish(400)
    assert summary["samples_per_insert"] == pytest.approx(8.0, rel=0.05)
    assert summary["updates"] == pytest.approx((summary["env_steps"] - 1500) / 4, rel=0.05)
    assert 7056 < summary["replay_bytes"] / summary["replay_size"] < 1.15 * 7056
    assert -21 <= summary["eval_return_mean"] <= 21
    assert run.leftovers() == []


def test_an_on_policy_run_trains_on_each_step_once(start: Start) -> None:
    run = start("on-policy", *ON_POLICY, "--steps", "8000", "--actors", "3")
    summary = run.finish(240)
    assert summary["stopped_because"] == "steps"
    # A batch has 128 rows, but rows after an episode's end are not steps. The last batch is trained on too.
    assert 8000 <= summary["env_steps"] < 8000 + 128
    assert summary["samples_per_insert"] == 1.0
    assert summary["weights_version"] == summary["updates"]
    assert summary["updates"] * 110 < summary["env_steps"] <= summary["updates"] * 128
    assert summary["replay_size"] == 0
    status = run.status()
    assert status["replay"]["discarded_steps"] == 0
    assert sum(json.loads(line)["mean"] > 0 for line in map(json.dumps, status["evaluations"])) == 1
    assert run.leftovers() == []


def test_two_runs_at_once_do_not_meet(finished: Finished) -> None:
    assert finished.other["run"] == "other"
    assert 1500 <= finished.other["env_steps"] <= 1500 + 64
    assert finished.other["seed"] == 1
    assert finished.summary["seed"] == 0


def test_a_run_is_watched_from_elsewhere(finished: Finished) -> None:
    returncode, out, err = finished.watched
    assert returncode == 0, err
    updates = [json.loads(line) for line in out.splitlines()]
    assert len(updates) > 2
    steps = [update["env_steps"] for update in updates if "env_steps" in update]
    assert steps == sorted(steps)
    assert updates[-1]["state"] == "finished"
    events = [event["text"] for update in updates for event in update["events"]]
    assert len(events) == len(set(events))
    assert any("has all its steps" in text for text in events)


@pytest.fixture(scope="module")
def at_its_return(start_for_module: Start) -> tuple[Run, dict[str, Any]]:
    """A run that ended at its return, and its summary: each CartPole episode lasts more than five steps."""
    run = start_for_module("goal", *AT_ITS_RETURN)
    return run, run.finish(120)


def test_a_run_ends_at_its_return(at_its_return: tuple[Run, dict[str, Any]]) -> None:
    run, summary = at_its_return
    assert summary["stopped_because"] == "return"
    assert 600 <= summary["env_steps"] < 1_000_000
    assert summary["eval_episodes"] == 3
    assert summary["eval_return_mean"] > 5
    assert summary["final_return_mean"] > 5
    assert "a mean return of 5 is reached: the run stops learning" in run.err.read_text()
    saved = torch.load(run.home / "goal" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == summary["updates"] > 0
    assert yaml.safe_load((run.home / "goal" / "config.yaml").read_text())["stop_at_return"] == 5.0
    status = run.status()
    assert (status["state"], status["stopped_because"]) == ("finished", "return")

    refused = squall(run.home, "train", "--resume", "goal", "--steps", "2000000")
    assert refused.returncode == 2
    assert "run 'goal' has reached a mean return of 5 already" in refused.stderr


def test_a_run_that_ended_at_its_return_goes_on_without_one(
    start_for_module: Start, at_its_return: tuple[Run, dict[str, Any]]
) -> None:
    _, summary = at_its_return
    steps = str(summary["env_steps"] + 1500)  # the empty replay is filled with 500 steps before updates continue
    again = start_for_module("goal", "--resume", "goal", "--set", "stop_at_return=null", "--steps", steps).finish(120)
    assert again["stopped_because"] == "steps"
    assert again["updates"] > summary["updates"]


def test_a_users_own_environment_runs_in_the_workers(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corridor_for_test.py").write_text(
        "import gymnasium as gym\n"
        "class Corridor(gym.Env):\n"
        "    observation_space = gym.spaces.Discrete(5)\n"
        "    action_space = gym.spaces.Discrete(2)\n"
        "    def reset(self, *, seed=None, options=None):\n"
        "        super().reset(seed=seed)\n"
        "        self.at = 0\n"
        "        return 0, {}\n"
        "    def step(self, action):\n"
        "        self.at = max(0, self.at + (1 if action else -1))\n"
        "        return self.at, float(self.at == 4), self.at == 4, False, {}\n"
        "gym.register('Corridor-v0', Corridor, max_episode_steps=20)\n"
    )
    monkeypatch.chdir(tmp_path)
    settings = ("warm_start_size=200", "updates_per_step=0.25", "eps_last_frame=1000", "batch_size=16", "eval_every=0")
    sets = [part for setting in settings for part in ("--set", setting)]
    run = start("own", "dqn", "corridor_for_test:Corridor-v0", "--steps", "2000", *sets)
    assert run.finish(240)["eval_return_mean"] == 1.0
