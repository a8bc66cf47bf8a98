"""Real runs, small: from the command line, through Ray, with processes killed and signals sent."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from services.store.remote_control import command
from services.store.sqlite import SQLiteRunStore
from tests.services.running import Run, squall

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

SMALL = ("dqn", "CartPole-v1", "--set", "warm_start_size=500", "--set", "eval_episodes=2", "--set", "eval_every=1000")
LONG = (*SMALL, "--steps", "1000000")

AT_ITS_RETURN = (
    *LONG, "--set", "eval_every=600", "--set", "final_eval_episodes=3", "--actors", "1", "--stop-at-return", "5",
)  # fmt: skip

Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start runs, and leave nothing of them behind, whatever a test does."""
    runs: list[Run] = []

    def begin(name: str, *arguments: str) -> Run:
        named = arguments if "--resume" in arguments else (*arguments, "--name", name)
        runs.append(Run(tmp_path / "runs", name, *named))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill_everything()


def test_a_run_ends_by_itself_and_says_how_it_went(start: Start, tmp_path: Path) -> None:
    run = start("small", *SMALL, "--steps", "4000", "--actors", "3")
    status = run.wait_for(lambda s: s["state"] == "running" and s["updates"] > 0)
    roles = [(process["role"], process["index"]) for process in status["processes"]]
    assert roles == [
        ("coordinator", 0), ("weights", 0), ("replay", 0), ("learner", 0),
        ("worker", 0), ("worker", 1), ("worker", 2), ("evaluator", 0),
    ]  # fmt: skip
    pids = [process["pid"] for process in status["processes"]]
    assert None not in pids
    assert len(set(pids)) == len(pids)
    assert status["processes"][0]["pid"] == run.process.pid

    summary = run.finish(240)
    assert summary["stopped_because"] == "steps"
    assert 4000 <= summary["env_steps"] <= 4000 + 3 * 64
    wanted = 64 * 1.0
    assert summary["samples_per_insert"] == pytest.approx(wanted, rel=0.05)
    assert summary["updates"] * 64 == pytest.approx(wanted * (summary["env_steps"] - 500), rel=0.05)
    assert summary["eval_episodes"] == 20
    assert summary["eval_return_mean"] > 5
    assert run.leftovers() == []

    folder = tmp_path / "runs" / "small"
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert yaml.safe_load((folder / "config.yaml").read_text())["hyperparameters"]["warm_start_size"] == 500
    assert list((folder / "tensorboard").glob("events*"))
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == summary["updates"]
    assert (folder / "checkpoints" / "best.ckpt").exists()

    listed = json.loads(squall(tmp_path / "runs", "runs", "--json").stdout)
    assert [(row["name"], row["state"]) for row in listed] == [("small", "finished")]
    figures = json.loads(squall(tmp_path / "runs", "evaluate", "small", "--episodes", "3", "--json").stdout)
    assert figures["episodes"] == 3
    assert figures["return_min"] <= figures["return_mean"] <= figures["return_max"]


def test_a_run_that_another_process_resumed_ends_and_touches_nothing_more(start: Start, tmp_path: Path) -> None:
    run = start("adopted", *LONG, "--actors", "1")
    run.wait_for(lambda s: s["state"] == "running", 240)
    store = sqlite3.connect(tmp_path / "runs" / "squall.db", timeout=30, isolation_level=None)
    # As `adopt` does on a machine from which this run reads lost.
    store.execute("UPDATE runs SET host = 'elsewhere', state = 'starting', heartbeat = ?", (time.time(),))
    assert run.process.wait(60) == 1
    assert "was resumed by process" in run.err.read_text()
    assert run.leftovers() == []
    assert store.execute("SELECT host, state, stopped_because FROM runs").fetchall() == [
        ("elsewhere", "starting", None)
    ]
    store.close()
    assert not (tmp_path / "runs" / "adopted" / "summary.json").exists()


@pytest.mark.slow
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


@pytest.mark.slow
def test_every_process_may_die_and_the_run_still_reaches_its_score(start: Start) -> None:
    # Twice the preset's steps: what a replay held dies with it, late in a fast run, when actions explore little.
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
        # Everyone is at work again: steps and updates both grow from what they are now.
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


ON_POLICY = (
    "a2c", "CartPole-v1", "--set", "eval_every=4000", "--set", "eval_episodes=2", "--set", "final_eval_episodes=3",
)  # fmt: skip


def test_an_on_policy_run_trains_on_each_step_once(start: Start) -> None:
    run = start("on-policy", *ON_POLICY, "--steps", "8000", "--actors", "3")
    summary = run.finish(240)
    assert summary["stopped_because"] == "steps"
    # A batch of 128 rows, of which those after an episode's end are no steps; the last one is trained on too.
    assert 8000 <= summary["env_steps"] < 8000 + 128
    assert summary["samples_per_insert"] == 1.0
    assert summary["weights_version"] == summary["updates"]
    assert summary["updates"] * 110 < summary["env_steps"] <= summary["updates"] * 128
    assert summary["replay_size"] == 0
    status = run.status()
    assert status["replay"]["discarded_steps"] == 0
    assert sum(json.loads(line)["mean"] > 0 for line in map(json.dumps, status["evaluations"])) == 1
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
    # What a dead learner took is lost; nothing is trained on twice, whatever died.
    assert 0.9 < summary["samples_per_insert"] <= 1.0
    assert run.leftovers() == []


def workers_of(status: dict[str, Any]) -> list[tuple[int, str]]:
    return [(p["index"], p["state"]) for p in status["processes"] if p["role"] == "worker"]


def test_a_run_is_scaled_up_and_down_while_it_runs(start: Start) -> None:
    run = start("scaled", *LONG, "--set", "eval_every=0", "--actors", "2")
    run.wait_for(lambda s: s["state"] == "running" and s["updates"] > 0)
    answer = json.loads(squall(run.home, "scale", "scaled", "--actors", "4", "--json").stdout)
    assert answer == {"run": "scaled", "actors": 4, "before": 2}
    up = run.wait_for(lambda s: [index for index, state in workers_of(s) if state == "running"] == [0, 1, 2, 3])
    run.wait_for(lambda s: s["env_steps"] > up["env_steps"] + 1000)
    assert squall(run.home, "scale", "scaled", "--actors", "1").returncode == 0
    down = run.wait_for(lambda s: workers_of(s) == [(0, "running")])
    words = [event["text"] for event in down["events"] if event["kind"] == "scale"]
    assert sum("left, with everything sent: " in word for word in words) == 3, words
    run.wait_for(lambda s: s["env_steps"] > down["env_steps"] + 1000)
    # An index that is used again has another incarnation, and so other seeds.
    assert squall(run.home, "scale", "scaled", "--actors", "2").returncode == 0
    again = run.wait_for(lambda s: workers_of(s) == [(0, "running"), (1, "running")])
    assert [p["incarnation"] for p in again["processes"] if p["role"] == "worker"] == [0, 1]
    refused = squall(run.home, "scale", "scaled", "--actors", "0")
    assert refused.returncode == 1
    assert "actors must be auto or a whole number from 1 to" in refused.stderr
    assert squall(run.home, "stop", "scaled").returncode == 0
    summary = run.finish(30)
    assert summary["actors"] == 2
    assert summary["samples_per_insert"] == pytest.approx(64, rel=0.05)
    assert run.leftovers() == []
    ended = squall(run.home, "scale", "scaled", "--actors", "3")
    assert ended.returncode == 1
    assert "finished" in ended.stderr


@pytest.mark.slow
def test_no_step_is_lost_or_counted_twice_from_2_workers_to_5_to_1_with_a_shard_killed_in_between(start: Start) -> None:
    per = ("per-dqn", *SMALL[1:], "--steps", "1000000", "--set", "eval_every=0", "--replay-shards", "2")
    run = start("divided", *per, "--actors", "2")
    begun = run.wait_for(lambda s: s["state"] == "running" and s["updates"] > 0, 240)
    assert [p["name"] for p in begun["processes"]] == [
        "coordinator", "weights", "desk", "replay-0", "replay-1", "learner", "worker-0", "worker-1", "evaluator",
    ]  # fmt: skip
    assert squall(run.home, "scale", "divided", "--actors", "5").returncode == 0
    up = run.wait_for(lambda s: [index for index, state in workers_of(s) if state == "running"] == [0, 1, 2, 3, 4])
    os.kill(run.pid_of("replay", 1), signal.SIGKILL)
    back = run.wait_for(lambda s: any(p["name"] == "replay-1" and p["restarts"] and p["pid"] for p in s["processes"]))
    assert back["env_steps"] >= up["env_steps"]
    run.wait_for(lambda s: s["env_steps"] > back["env_steps"] + 1000 and s["updates"] > back["updates"] + 500)
    assert squall(run.home, "scale", "divided", "--actors", "1").returncode == 0
    down = run.wait_for(lambda s: workers_of(s) == [(0, "running")])
    run.wait_for(lambda s: s["env_steps"] > down["env_steps"] + 500)
    assert squall(run.home, "stop", "divided").returncode == 0
    summary = run.finish(30)
    assert summary["samples_per_insert"] == pytest.approx(64, rel=0.05)
    assert 0 < summary["replay_size"] <= summary["env_steps"]
    status = json.loads(squall(run.home, "status", "divided", "--events", "200", "--json").stdout)
    left = [text.split("left, with everything sent: ") for e in status["events"] if "left, with" in (text := e["text"])]
    assert sorted(who for who, _ in left) == ["worker-1 ", "worker-2 ", "worker-3 ", "worker-4 "]
    sent = [int(steps.removesuffix(" steps").replace(",", "")) for _, steps in left]
    assert min(sent) > 0
    total = sum(sent) + next(p["steps_sent"] for p in status["processes"] if p["name"] == "worker-0")
    # The last worker may not have heard of its last push, 16 rows of 4 environments.
    assert total <= summary["env_steps"] <= total + 4 * 16, [event["text"] for event in status["events"]]
    assert run.leftovers() == []


@pytest.mark.slow
def test_auto_adds_workers_while_the_learner_waits(start: Start) -> None:
    run = start("auto", *LONG, "--set", "eval_every=0", "--set", "updates_per_step=0.01", "--actors", "auto")
    # The snapshot is a little older than the events.
    run.wait_for(
        lambda s: (
            s.get("actors") == 2 and any("from 1 to 2 workers: the learner waited" in e["text"] for e in s["events"])
        ),
        240,
    )
    told = json.loads(squall(run.home, "scale", "auto", "--actors", "1", "--json").stdout)
    assert told["actors"] == 1
    assert json.loads(squall(run.home, "scale", "auto", "--actors", "auto", "--json").stdout)["auto"] is True
    assert squall(run.home, "stop", "auto").returncode == 0
    run.finish(30)
    assert run.leftovers() == []


@pytest.mark.slow
def test_a_worker_without_room_in_the_cluster_is_pending_and_the_run_goes_on(start: Start) -> None:
    every_cpu = str(os.cpu_count())
    run = start("full", *LONG, "--set", "eval_every=0", "--actors", "2", "--cpus-per-actor", every_cpu)
    status = run.wait_for(
        lambda s: (
            s["state"] == "running"
            and s["updates"] > 0
            and sorted(state for _, state in workers_of(s)) == ["pending", "running"]
        ),
        240,
    )
    last = next(p["index"] for p in status["processes"] if p["state"] == "pending")
    word = next(p["last_word"] for p in status["processes"] if p["state"] == "pending")
    assert word == f"waits for room: it wants {every_cpu} CPU, and 0 of the cluster's {every_cpu} are free"
    # Its turn comes when the other is gone.
    os.kill(run.pid_of("worker", 1 - last), signal.SIGKILL)
    run.wait_for(lambda s: (last, "running") in workers_of(s))
    assert squall(run.home, "stop", "full").returncode == 0
    run.finish(30)
    assert run.leftovers() == []


@pytest.mark.slow
def test_a_worker_that_cannot_leave_takes_no_permits_with_it(start: Start) -> None:
    """It is suspended with a share of the batch under way, so it neither completes that nor gives it back."""
    run = start(
        # Slow steps and a share for each worker: it holds one nearly always.
        "stuck", "a2c", "tests.actors.toys:SquallSlow-v0", "--steps", "1000000", "--actors", "3",
        "--set", "eval_every=0", "--set", "num_envs=4", "--set", "unroll_length=5", "--set", "batch_size=60",
    )  # fmt: skip
    run.wait_for(lambda s: s["state"] == "running" and s["updates"] > 3 and len(workers_of(s)) == 3)
    newest = run.pid_of("worker", 2)
    for _ in range(10):
        os.kill(newest, signal.SIGSTOP)
        time.sleep(2.0)
        before = run.status()["updates"]
        time.sleep(3.0)  # a batch takes half a second, the status follows within one
        if run.status()["updates"] == before:
            break  # all wait for what it holds
        os.kill(newest, signal.SIGCONT)
        time.sleep(0.7)  # into a later share
    else:
        pytest.fail("the worker never held a share when it was suspended")
    assert squall(run.home, "scale", "stuck", "--actors", "2").returncode == 0
    down = run.wait_for(lambda s: workers_of(s) == [(0, "running"), (1, "running")])
    assert any("did not leave within 10 s" in event["text"] for event in down["events"])
    run.wait_for(lambda s: s["updates"] > down["updates"] + 3)
    assert squall(run.home, "stop", "stuck").returncode == 0
    run.finish(30)
    assert run.leftovers() == []


def test_a_run_writes_a_checkpoint_when_it_is_asked_to(start: Start) -> None:
    run = start("asked", *LONG, "--actors", "1", "--set", "eval_every=0", "--set", "checkpoint_every=1000000")
    run.wait_for(lambda s: s["state"] == "running" and s["updates"] > 0)
    with SQLiteRunStore(run.home / "squall.db") as store:
        answer = command(store, "asked", "checkpoint")
    saved = torch.load(answer["checkpoint"], weights_only=True)
    assert saved["global_step"] > 0
    assert answer["weights_version"] > 0
    assert squall(run.home, "stop", "asked").returncode == 0
    summary = run.finish(30)
    assert summary["updates"] >= saved["global_step"]
    assert run.leftovers() == []


def test_a_run_is_watched_from_elsewhere(start: Start) -> None:
    run = start("watched", *SMALL, "--steps", "2500", "--actors", "1")
    run.wait_for(lambda s: s["state"] == "running")
    watched = squall(run.home, "watch", "watched", "--json", timeout=240)
    assert watched.returncode == 0, watched.stderr
    news = [json.loads(line) for line in watched.stdout.splitlines()]
    assert len(news) > 2
    steps = [told["env_steps"] for told in news if "env_steps" in told]
    assert steps == sorted(steps)
    assert news[-1]["state"] == "finished"
    events = [event["text"] for told in news for event in told["events"]]
    assert len(events) == len(set(events))
    assert any("has all its steps" in text for text in events)
    run.finish(10)


def test_stop_ends_a_run_in_order(start: Start) -> None:
    run = start("stopped", *LONG)
    run.wait_for(lambda s: s["state"] == "running" and s["updates"] > 0)
    assert squall(run.home, "stop", "stopped").returncode == 0
    summary = run.finish(15)
    assert summary["stopped_because"] == "stopped"
    saved = torch.load(run.home / "stopped" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == summary["updates"]
    assert run.status()["state"] == "finished"
    assert run.leftovers(2) == []


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
    # The replay refills first, and nothing is owed for that: no burst, no gap.
    assert summary["samples_per_insert"] == pytest.approx(64, rel=0.1)
    assert again.leftovers() == []
    assert again.status()["state"] == "finished"


def test_interrupt_stops_in_order_within_ten_seconds(start: Start) -> None:
    run = start("interrupted", *LONG)
    run.wait_for(lambda s: s["state"] == "running" and s["updates"] > 0)
    began = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    run.process.wait(20)
    assert time.monotonic() - began < 10
    assert run.process.returncode == 130
    assert json.loads(run.out.read_text())["stopped_because"] == "interrupted"
    assert (run.home / "interrupted" / "checkpoints" / "last.ckpt").exists()
    assert run.leftovers(2) == []
    assert run.status()["state"] == "finished"


def test_a_second_interrupt_stops_at_once(start: Start) -> None:
    run = start("twice", *LONG)
    run.wait_for(lambda s: s["state"] == "running")
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    began = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    run.process.wait(5)
    assert time.monotonic() - began < 2
    assert run.leftovers(5) == []


def test_an_interrupt_while_starting_is_obeyed(start: Start) -> None:
    run = start("early", *LONG)
    store = SQLiteRunStore(run.home / "squall.db")
    end = time.monotonic() + 60
    while not any(record.name == "early" for record in store.list_runs()) and time.monotonic() < end:
        time.sleep(0.05)
    store.close()
    run.process.send_signal(signal.SIGINT)
    run.process.wait(60)
    assert run.process.returncode != 0
    assert run.leftovers() == []
    assert run.status()["state"] in ("finished", "failed")


def test_a_run_ends_at_its_return(start: Start) -> None:
    """Every episode of CartPole lasts more than five steps, so the first evaluation is good enough."""
    run = start("goal", *AT_ITS_RETURN)
    summary = run.finish(120)
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


@pytest.mark.slow
def test_a_run_that_ended_at_its_return_goes_on_without_one(start: Start) -> None:
    summary = start("goal", *AT_ITS_RETURN).finish(120)
    steps = str(summary["env_steps"] + 1500)  # the replay, which is empty again, takes 500 of them before updates go on
    again = start("goal", "--resume", "goal", "--set", "stop_at_return=null", "--steps", steps).finish(120)
    assert again["stopped_because"] == "steps"
    assert again["updates"] > summary["updates"]


def test_two_runs_at_once_do_not_meet(start: Start) -> None:
    first, second = start("one", *SMALL, "--steps", "1500"), start("two", *SMALL, "--steps", "1500", "--seed", "1")
    assert {first.finish(300)["run"], second.finish(300)["run"]} == {"one", "two"}
    assert first.leftovers() == second.leftovers() == []


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


def test_terminated_stops_in_order(start: Start) -> None:
    """As `docker stop`, a job's stop and `timeout` do it: to the process, and to its group once more."""
    run = start("terminated", *LONG)
    run.wait_for(lambda s: s["state"] == "running" and s["updates"] > 0)
    run.process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    run.process.send_signal(signal.SIGTERM)
    run.process.wait(15)
    assert run.process.returncode == 143, run.err.read_text()
    assert json.loads(run.out.read_text())["stopped_because"] == "terminated"
    assert (run.home / "terminated" / "checkpoints" / "last.ckpt").exists()
    assert run.leftovers(2) == []


def test_a_recreated_weight_store_has_weights_at_once(start: Start) -> None:
    """Also when the learner dies with it: versions never fall behind what workers hold."""
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
