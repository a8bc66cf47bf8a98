"""Writes `artifacts/`: what version 0.1.0 left on disk and printed, for `test_artifacts.py` to read with today's code.

The files that are kept were made at commit a6fff50, before modules moved into sub-packages, in a checkout of it:

    unshare --uts sh -c 'hostname example; .venv/bin/python -m tests.upgrade.make_artifacts /srv/squall'

The folder is where the runs lie while they are made: its path is part of their events, and the host's name of their
records. The imports below follow today's modules; there they named the old ones. Made anew with later code the files
would prove nothing about old ones: add artifacts, replace none.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import learner
from learner.algorithms import ALGORITHMS, Algorithm
from learner.checkpoints import load_algorithm
from replay.types import Array
from services.rpc.squall_pb2 import DESCRIPTOR
from tests.services.redis_server import RedisServer
from tests.services.running import SQUALL, Run, environment

ARTIFACTS = Path(__file__).parent / "artifacts"

TINY = ("--actors", "1", "--set", "hidden_sizes=[8]", "--set", "eval_episodes=2", "--set", "final_eval_episodes=2")
REPLAY = ("--set", "replay_size=1000", "--set", "warm_start_size=200")
DQN = ("dqn", "CartPole-v1", *TINY, *REPLAY, "--set", "eval_every=300")
SAC = ("sac", "Pendulum-v1", *TINY, *REPLAY, "--set", "eval_every=300", "--steps", "600")
A2C = (
    "a2c", "CartPole-v1", *TINY, "--set", "eval_every=1000", "--steps", "3000",
    "--set", "normalize_observations=true", "--set", "normalize_rewards=true",
)  # fmt: skip

FILES_OF_A_RUN = (
    "config.yaml", "summary.json", "checkpoints/last.ckpt", "checkpoints/best.ckpt", "checkpoints/best.json",
)  # fmt: skip
COMMANDS = (
    "train", "evaluate", "runs", "status", "watch", "scale", "stop", "serve", "gateway", "plot", "doctor", "submit",
)  # fmt: skip

# What needs no cluster, asked in a home that holds the runs `finished` and `stopped`.
EXIT_STATUSES = (
    ["train", "dqn", "CartPol-v1"],
    ["train", "dqnn", "CartPole-v1"],
    ["train", "dqn", "CartPole-v1", "--typo", "3"],
    ["train", "dqn", "CartPole-v1", "--set", "learning_rat=1"],
    ["train", "dqn", "CartPole-v1", "--set", "batch_size=0"],
    ["train", "dqn", "CartPole-v1", "--actors", "many"],
    ["train", "dqn", "CartPole-v1", "--set", "replay_size=1000000000000"],
    ["train", "dqn", "CartPole-v1", "--name", "finished"],
    ["train", "--resume", "nosuch"],
    ["evaluate", "nosuch"],
    ["evaluate", "nosuch.ckpt"],
    ["status", "nosuch"],
    ["watch", "nosuch"],
    ["stop", "nosuch"],
    ["stop", "finished"],
    ["scale", "nosuch", "--actors", "2"],
    ["scale", "finished", "--actors", "2"],
    ["serve", "nosuch"],
    ["gateway", "--address", "nowhere"],
    ["plot", "nosuch"],
    ["runs", "--store", "postgres://host/0"],
    ["runs", "--store", "redis://127.0.0.1:1/0"],
    ["submit"],
    ["nosuch"],
    [],
)


def main(old_runs: Path) -> None:
    """Make all artifacts; `old_runs` is a new folder, which is removed at the end."""
    shutil.rmtree(ARTIFACTS, ignore_errors=True)
    old_runs.mkdir(parents=True)
    try:
        make_runs(old_runs / "runs")
        make_redis(old_runs / "redis")
        write_answers(old_runs / "runs")
        make_checkpoints()
        write_descriptions(old_runs / "nothing")
    finally:
        shutil.rmtree(old_runs)


def make_runs(old_runs: Path) -> None:
    """Keep a store in a file, with a finished and a stopped run of DQN and one of SAC and A2C each, and the folders."""
    summary = train_and_stop(old_runs)
    write("answers/train.json", summary)
    board = EventAccumulator(str(old_runs / "stopped" / "tensorboard")).Reload()
    write("answers/metrics.json", sorted(board.Tags()["scalars"]))
    for name, arguments in (("sac", SAC), ("a2c", A2C)):
        Run(old_runs, name, *arguments, "--name", name).finish(120)
    assert not list(old_runs.glob("squall.db-*")), "somebody still has the store open"
    kept = ARTIFACTS / "home"
    kept.mkdir(parents=True)
    shutil.copy(old_runs / "squall.db", kept)
    for name in ("finished", "stopped", "sac", "a2c"):
        (kept / name / "checkpoints").mkdir(parents=True)
        for file in FILES_OF_A_RUN:
            if (old_runs / name / file).exists():
                shutil.copy(old_runs / name / file, kept / name / file)


def make_redis(old_runs: Path) -> None:
    """Keep a Redis server's dump, with a finished and a stopped run."""
    old_runs.mkdir(parents=True)
    with RedisServer(old_runs) as server:
        train_and_stop(old_runs / "runs", server.url)
        for name, arguments in questions().items():
            write(f"answers/redis/{name}.json", ask(old_runs / "elsewhere", *arguments, "--store", server.url))
        server.command("SAVE")
    shutil.copy(old_runs / "dump.rdb", ARTIFACTS / "dump.rdb")


def train_and_stop(old_runs: Path, store: str = "") -> dict[str, Any]:
    """Run `finished` to its end and stop `stopped` on its way; return the summary of the first."""
    summary = Run(old_runs, "finished", *DQN, "--steps", "1000", "--name", "finished", store=store).finish(120)
    run = Run(old_runs, "stopped", *DQN, "--steps", "1000000", "--name", "stopped", store=store)
    run.wait_for(lambda status: status["state"] == "running" and status["env_steps"] > 1500)
    flag = ("--store", store) if store else ()
    ask(old_runs, "scale", "stopped", "--actors", "2", *flag)
    ask(old_runs, "stop", "stopped", *flag)
    run.finish(120)
    return summary


def questions() -> dict[str, tuple[str, ...]]:
    """Return the commands whose answers come from the store alone."""
    return {
        "runs": ("runs",),
        "status-finished": ("status", "finished"),
        "status-stopped": ("status", "stopped", "--events", "3"),
        "watch-finished": ("watch", "finished"),
        "plot": ("plot", "finished", "other=stopped", "--metric", "rollout/ep_rew_mean"),
    }


def write_answers(old_runs: Path) -> None:
    """Write what commands answer about the runs in `old_runs`, and with which status they refuse."""
    for name, arguments in questions().items():
        write(f"answers/sqlite/{name}.json", ask(old_runs, *arguments))
    write("answers/evaluate.json", ask(old_runs, "evaluate", "finished", "--episodes", "3"))
    for name in ("finished", "stopped", "sac", "a2c"):
        config = str(old_runs / name / "config.yaml")
        write(f"answers/config-{name}.json", ask(old_runs, "train", "--config", config, "--show-config"))
    statuses = [{"arguments": words, "status": run(old_runs, *words).returncode} for words in EXIT_STATUSES]
    write("answers/exit-statuses.json", statuses)


def make_checkpoints() -> None:
    """Keep a checkpoint of each algorithm, and write what its policy makes of fixed observations."""
    kept = ARTIFACTS / "checkpoints"
    kept.mkdir()
    for name, kind in ALGORITHMS.items():
        real = ARTIFACTS / "home" / {"dqn": "finished"}.get(name, name) / "checkpoints" / "last.ckpt"
        if real.exists():
            shutil.copy(real, kept / f"{name}.ckpt")
        else:
            fit(kind, kept / f"{name}.ckpt")
    write("outputs.json", {name: describe(kept / f"{name}.ckpt") for name in ALGORITHMS})
    networks = learner.DQN("PongNoFrameskip-v4", hidden_sizes=[8], replay_size=1000, warm_start_size=100)
    shapes = {name: list(tensor.shape) for name, tensor in networks.state_dict().items()}
    write("image-networks.json", shapes)


def fit(kind: type[Algorithm], path: Path) -> None:
    """Make a few updates with an algorithm in this process, and save a checkpoint."""
    options: dict[str, Any] = {"hidden_sizes": [8], "seed": 0}
    environment, updates = "CartPole-v1", 20
    if issubclass(kind, learner.DQN):
        options |= {"replay_size": 1000, "warm_start_size": 100, "batch_size": 8, "learning_rate": 0.01}
    if kind is learner.VanillaPolicyGradient:  # a policy over a box, and running statistics
        environment, updates = "Pendulum-v1", 4
        options |= {"normalize_observations": True, "normalize_rewards": True}
    trainer = quiet_trainer(updates)
    trainer.fit(kind(environment, **options))
    trainer.save_checkpoint(path)


def quiet_trainer(updates: int) -> Trainer:
    """Return a Trainer that stops after so many updates, counted from the first, and writes nothing."""
    silence = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(max_steps=updates, max_epochs=-1, accelerator="cpu", enable_model_summary=False, **silence)


def describe(path: Path) -> dict[str, Any]:
    """Return what a checkpoint's algorithm answers to fixed observations, and what it logs when it learns on."""
    algorithm = load_algorithm(path)
    shape = algorithm.environment.observation_shape
    observation = np.random.default_rng(1).normal(size=(6, *shape)).astype(np.float32)
    answers = {"class": type(algorithm).__name__, "observation": observation.tolist(), **act(algorithm, observation)}
    return {**answers, "metrics": sorted(learn_on(algorithm, path).callback_metrics)}


def act(algorithm: Algorithm, observation: Array) -> dict[str, Any]:
    """Return the networks' outputs and the greedy actions for observations `[B, ...]`."""
    algorithm.eval()
    with torch.inference_mode():
        output = algorithm(torch.from_numpy(observation))
    parts = output if isinstance(output, tuple) else (output,)
    action = algorithm.policy.act(observation, step=0, greedy=True).action
    return {"output": [part.tolist() for part in parts], "action": action.tolist()}


def learn_on(algorithm: Algorithm, path: Path) -> Trainer:
    """Make two more updates from a checkpoint, in this process, and return the Trainer."""
    trainer = quiet_trainer(torch.load(path, weights_only=True)["global_step"] + 2)
    trainer.fit(algorithm.train(), ckpt_path=path, weights_only=True)
    return trainer


def write_descriptions(old_runs: Path) -> None:
    """Write the help of every command, and the description of the gRPC messages and services."""
    for command in ("", *COMMANDS):
        text = run(old_runs, *filter(None, [command]), "--help").stdout
        write_text(f"help/{command or 'squall'}.txt", text)
    (ARTIFACTS / "squall.proto.bin").write_bytes(DESCRIPTOR.serialized_pb)


def run(old_runs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in the folder of its runs."""
    old_runs.mkdir(parents=True, exist_ok=True)
    command, variables = [*SQUALL, *arguments], {**environment(old_runs), "COLUMNS": "120"}
    return subprocess.run(
        command, cwd=old_runs, env=variables, capture_output=True, text=True, timeout=120, check=False
    )


def ask(old_runs: Path, *arguments: str) -> Any:
    """Return the JSON that a command prints."""
    done = run(old_runs, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def write(file: str, content: Any) -> None:
    """Write an artifact as JSON."""
    write_text(file, json.dumps(content, indent=1) + "\n")


def write_text(file: str, text: str) -> None:
    """Write an artifact as text."""
    path = ARTIFACTS / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
