"""Real runs that receive commands, and workers that are added automatically, pending, or stuck."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from typing import Any

import pytest
import torch

from services.store.remote_control import command
from services.store.sqlite import SQLiteRunStore
from tests.services.running import LONG, SMALL, Run, Start, squall

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def workers_of(status: dict[str, Any]) -> list[tuple[int, str]]:
    return [(p["index"], p["state"]) for p in status["processes"] if p["role"] == "worker"]


@pytest.fixture(scope="module")
def live(start_for_module: Start) -> Run:
    """A run that the first tests of this module command, one after the other; the last of them stops it."""
    run = start_for_module(
        "scaled", *LONG, "--set", "eval_every=0", "--set", "checkpoint_every=1000000", "--actors", "2"
    )
    run.wait_for(lambda s: s["state"] == "running" and s["updates"] > 0)
    return run


def test_a_run_writes_a_checkpoint_when_it_is_asked_to(live: Run) -> None:
    with SQLiteRunStore(live.home / "squall.db") as store:
        answer = command(store, live.name, "checkpoint")
    saved = torch.load(answer["checkpoint"], weights_only=True)
    assert saved["global_step"] > 0
    assert answer["weights_version"] > 0


def test_a_run_is_scaled_up_and_down_while_it_runs(live: Run) -> None:
    run = live
    answer = json.loads(squall(run.home, "scale", "scaled", "--actors", "4", "--json").stdout)
    assert answer == {"run": "scaled", "actors": 4, "before": 2}
    up = run.wait_for(lambda s: [index for index, state in workers_of(s) if state == "running"] == [0, 1, 2, 3])
    run.wait_for(lambda s: s["env_steps"] > up["env_steps"] + 1000)
    assert squall(run.home, "scale", "scaled", "--actors", "1").returncode == 0
    down = run.wait_for(lambda s: workers_of(s) == [(0, "running")])
    messages = [event["text"] for event in down["events"] if event["kind"] == "scale"]
    assert sum("left, with everything sent: " in message for message in messages) == 3, messages
    run.wait_for(lambda s: s["env_steps"] > down["env_steps"] + 1000)
    # A reused index has a new incarnation, and so new seeds.
    assert squall(run.home, "scale", "scaled", "--actors", "2").returncode == 0
    again = run.wait_for(lambda s: workers_of(s) == [(0, "running"), (1, "running")])
    assert [p["incarnation"] for p in again["processes"] if p["role"] == "worker"] == [0, 1]
    refused = squall(run.home, "scale", "scaled", "--actors", "0")
    assert refused.returncode == 1
    assert "actors must be auto or a whole number from 1 to" in refused.stderr


def test_stop_ends_a_run_in_order(live: Run) -> None:
    run = live
    workers = len(workers_of(run.status()))
    assert squall(run.home, "stop", "scaled").returncode == 0
    summary = run.finish(15)
    assert summary["stopped_because"] == "stopped"
    assert summary["actors"] == workers
    assert summary["samples_per_insert"] == pytest.approx(64, rel=0.05)
    saved = torch.load(run.home / "scaled" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == summary["updates"]
    assert run.status()["state"] == "finished"
    assert run.leftovers(2) == []
    ended = squall(run.home, "scale", "scaled", "--actors", "3")
    assert ended.returncode == 1
    assert "finished" in ended.stderr


@pytest.mark.slow
def test_no_step_is_lost_or_counted_twice_from_2_workers_to_5_to_1_with_a_shard_killed_in_between(start: Start) -> None:
    per = ("per-dqn", *SMALL[1:], "--steps", "1000000", "--set", "eval_every=0", "--replay-shards", "2")
    run = start("divided", *per, "--actors", "2")
    begun = run.wait_for(lambda s: s["state"] == "running" and s["updates"] > 0, 240)
    assert [p["name"] for p in begun["processes"]] == [
        "coordinator", "weights", "router", "replay-0", "replay-1", "learner", "worker-0", "worker-1", "evaluator",
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
    # On a busy machine a worker may leave with steps that were not taken within its deadline.
    pattern = re.compile(r"(worker-\d) left, with (?:everything sent: )?([\d,]+) steps")
    left = {match[1]: int(match[2].replace(",", "")) for e in status["events"] if (match := pattern.match(e["text"]))}
    assert sorted(left) == ["worker-1", "worker-2", "worker-3", "worker-4"]
    sent = list(left.values())
    assert min(sent) > 0
    total = sum(sent) + next(p["steps_sent"] for p in status["processes"] if p["name"] == "worker-0")
    # The reply to the last worker's last push, 16 rows of 4 environments, may not have arrived.
    assert total <= summary["env_steps"] <= total + 4 * 16, [event["text"] for event in status["events"]]
    assert run.leftovers() == []


@pytest.mark.long
def test_auto_adds_workers_while_the_learner_waits(start: Start) -> None:
    run = start("auto", *LONG, "--set", "eval_every=0", "--set", "updates_per_step=0.01", "--actors", "auto")
    # The snapshot may be older than the events.
    run.wait_for(
        lambda s: (
            s.get("actors") == 2 and any("from 1 to 2 workers: the learner waited" in e["text"] for e in s["events"])
        ),
        240,
    )
    answer = json.loads(squall(run.home, "scale", "auto", "--actors", "1", "--json").stdout)
    assert answer["actors"] == 1
    assert json.loads(squall(run.home, "scale", "auto", "--actors", "auto", "--json").stdout)["auto"] is True
    assert squall(run.home, "stop", "auto").returncode == 0
    run.finish(30)
    assert run.leftovers() == []


@pytest.mark.long
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
    message = next(p["last_word"] for p in status["processes"] if p["state"] == "pending")
    assert message == f"waiting for resources: needs {every_cpu} CPU, but 0 of the cluster's {every_cpu} are free"
    # The pending worker starts when the other one has exited.
    os.kill(run.pid_of("worker", 1 - last), signal.SIGKILL)
    run.wait_for(lambda s: (last, "running") in workers_of(s))
    assert squall(run.home, "stop", "full").returncode == 0
    run.finish(30)
    assert run.leftovers() == []


@pytest.mark.slow
def test_a_worker_that_cannot_leave_takes_no_permits_with_it(start: Start) -> None:
    """The worker is suspended while it holds permits, so it neither uses nor releases them."""
    run = start(
        # Slow steps and a share of each batch per worker: a worker holds permits nearly always.
        "stuck", "a2c", "tests.actors.toys:SquallSlow-v0", "--steps", "1000000", "--actors", "3",
        "--set", "eval_every=0", "--set", "num_envs=4", "--set", "unroll_length=5", "--set", "batch_size=60",
    )  # fmt: skip
    run.wait_for(lambda s: s["state"] == "running" and s["updates"] > 3 and len(workers_of(s)) == 3)
    newest = run.pid_of("worker", 2)
    for _ in range(10):
        os.kill(newest, signal.SIGSTOP)
        time.sleep(2.0)
        before = run.status()["updates"]
        time.sleep(3.0)  # a batch takes 0.5 s, and the status is at most 1 s old
        if run.status()["updates"] == before:
            break  # all other workers wait for the permits of this one
        os.kill(newest, signal.SIGCONT)
        time.sleep(0.7)  # until a later share
    else:
        pytest.fail("the worker never held permits when it was suspended")
    assert squall(run.home, "scale", "stuck", "--actors", "2").returncode == 0
    down = run.wait_for(lambda s: workers_of(s) == [(0, "running"), (1, "running")])
    assert any("did not leave within 10 s" in event["text"] for event in down["events"])
    run.wait_for(lambda s: s["updates"] > down["updates"] + 3)
    assert squall(run.home, "stop", "stuck").returncode == 0
    run.finish(30)
    assert run.leftovers() == []
