"""Squall end to end: `squall train` as a user starts it, its own counters read from the run store at both ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import arguments, report
from settings import WORK, Work, loss_fell

parsed = arguments("case")
os.environ.pop("SQUALL_STORE", None)

from learner.checkpoints import make_algorithm  # noqa: E402  # after the number of threads is settled
from replay.errors import SquallError  # noqa: E402
from services.store.sqlite import SQLiteRunStore  # noqa: E402

RUN = "benchmark"
START_SECONDS = 180.0


def command(work: Work) -> list[str]:
    """Return the command line."""
    settings: dict[str, Any] = {
        "batch_size": work.batch_size,
        "replay_size": work.replay_size,
        "warm_start_size": work.warm_start,
        "updates_per_step": work.updates_per_step,
        "eval_every": 0,
        "learner_threads": parsed.threads,
        "compile_updates": work.compiled,
        "num_envs": work.envs // work.actors,
    }
    if work.algorithm == "dqn":
        settings |= {"eps_start": work.epsilon, "eps_end": work.epsilon, "sync_rate": work.sync_rate}
        settings |= {"learning_rate": work.learning_rate, "max_grad_norm": 10.0}
    else:
        settings |= {"policy_learning_rate": work.learning_rate, "q_learning_rate": work.learning_rate}
    if work.hidden:
        settings["hidden_sizes"] = list(work.hidden)
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    line = [
        sys.executable,
        "-m",
        "services.cli.main",
        "train",
        work.algorithm,
        work.env,
        "--name",
        RUN,
        "--steps",
        "1e9",
    ]
    return [*line, "--actors", str(work.actors), *sets]


def look(home: Path) -> tuple[float, dict[str, Any]] | None:
    """Return the time of the newest snapshot and the snapshot, once the learner has made updates."""
    try:
        with SQLiteRunStore(home / "squall.db", create=False) as store:
            record, snapshot = store.get(RUN), store.read_snapshot(RUN)
    except SquallError:
        return None
    if snapshot is None or not snapshot.get("updates"):
        return None
    return record.heartbeat, snapshot


def wait(home: Path, process: subprocess.Popen[bytes], until: float, log: Path) -> tuple[float, dict[str, Any]]:
    """Return the first look at or after the moment `until`, of a run that has made updates."""
    end = max(until, time.time()) + START_SECONDS
    while time.time() < end and process.poll() is None:
        seen = look(home)
        if seen is not None and seen[0] >= until:
            return seen
        time.sleep(0.1)
    sys.exit(f"the run did not get to work: {log.read_text().strip().splitlines()[-1:]}")


def main() -> None:
    """Start, warm up, look, wait, look again, stop."""
    work = WORK[parsed.case]
    with tempfile.TemporaryDirectory(prefix="squall-bench-") as folder:
        home, log = Path(folder), Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command(work),
                env={**os.environ, "SQUALL_HOME": folder},
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
            )
        try:
            began, at_work = wait(home, process, 0.0, log)
            began, first = wait(home, process, began + parsed.warm_up, log)
            ended, last = wait(home, process, began + parsed.seconds, log)
            with SQLiteRunStore(home / "squall.db", create=False) as store:
                losses = [row.values["train/loss"] for row in store.metrics(RUN) if "train/loss" in row.values]
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
    # Steps are counted by pushes, which for Pong have 256: over a window alone, updates a step would be too coarse.
    steps, updates = (last[counted] - at_work[counted] for counted in ("env_steps", "updates"))
    hyperparameters = {"env": work.env, **({"hidden_sizes": list(work.hidden)} if work.hidden else {})}
    module = make_algorithm(work.algorithm, hyperparameters)
    learned = module.policy if work.algorithm == "dqn" else module
    report(
        (last["env_steps"] - first["env_steps"]) / (ended - began),
        parameters=sum(p.numel() for p in learned.parameters() if p.requires_grad),
        batch_size=work.batch_size,
        updates_per_step=updates / max(steps, 1),
        samples_per_insert=last["samples_per_insert"],
        loss_fell=loss_fell(losses),
    )


main()
