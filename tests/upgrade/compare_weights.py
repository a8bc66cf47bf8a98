"""Compares what two checkouts learn, bit by bit: `python -m tests.upgrade.compare_weights --old PYTHON --old-tree DIR`.

Each algorithm makes 200 updates with a fixed seed, in one thread, in a process of each checkout: the old one, with the
interpreter `--old`, and this one, with the interpreter that runs this. Exit status 1 if any weight differs. On another
machine, or with another PyTorch, both sides may come out otherwise; they must still be the same.

A process of either checkout runs this very file, so what it imports of Squall must be there in both: `learner` alone.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer

import learner
from learner import (
    DQN,
    PERDQN,
    SAC,
    AdvantageActorCritic,
    DoubleDQN,
    DuelingDQN,
    NoisyDQN,
    NonDistributionalRainbow,
    NStepDQN,
    Reinforce,
    VanillaPolicyGradient,
)

ROOT = Path(__file__).resolve().parents[2]
UPDATES = 200
REPLAY = {"replay_size": 2_000, "warm_start_size": 200, "batch_size": 32}
FASTER = {"sync_rate": 20, "learning_rate": 0.01}
SLOWER = {"lr": 0.001}  # so that episodes stay short
# What is off by default and changes the arithmetic.
MORE = {
    "num_envs": 2,
    "optimizer": "rmsprop",
    "max_grad_norm": 0.5,
    "learning_rate_schedule": "linear",
    "learning_rate_last_frame": 1_000,
    "normalize_observations": True,
    "normalize_rewards": True,
}
MORE_OF_REPLAY = {**MORE, "updates_per_training_step": 4, "updates_per_step": 2.0, "segment_length": 8}

# name: algorithm, environment, updates, arguments
CASES: dict[str, tuple[type[LightningModule], str, int, dict[str, Any]]] = {
    "dqn": (DQN, "CartPole-v1", UPDATES, {**REPLAY, **FASTER}),
    "double-dqn": (DoubleDQN, "CartPole-v1", UPDATES, {**REPLAY, **FASTER}),
    "dueling-dqn": (DuelingDQN, "CartPole-v1", UPDATES, {**REPLAY, **FASTER}),
    "noisy-dqn": (NoisyDQN, "CartPole-v1", UPDATES, {**REPLAY, **FASTER}),
    "n-step-dqn": (NStepDQN, "CartPole-v1", UPDATES, {**REPLAY, **FASTER}),
    "per-dqn": (PERDQN, "CartPole-v1", UPDATES, {**REPLAY, **FASTER}),
    "non-distributional-rainbow": (NonDistributionalRainbow, "CartPole-v1", UPDATES, {**REPLAY, **FASTER}),
    "sac": (SAC, "Pendulum-v1", UPDATES, REPLAY),
    "reinforce": (Reinforce, "CartPole-v1", UPDATES, SLOWER),
    "vpg": (VanillaPolicyGradient, "CartPole-v1", UPDATES, SLOWER),
    "a2c": (AdvantageActorCritic, "CartPole-v1", UPDATES, {}),
    "dqn, more options": (DQN, "CartPole-v1", UPDATES, {**REPLAY, **FASTER, **MORE_OF_REPLAY}),
    "rainbow, more options": (NonDistributionalRainbow, "CartPole-v1", UPDATES, {**REPLAY, **FASTER, **MORE_OF_REPLAY}),
    "sac, more options": (SAC, "Pendulum-v1", UPDATES, {**REPLAY, **MORE_OF_REPLAY}),
    "dqn, images": (DQN, "PongNoFrameskip-v4", 50, {**REPLAY, **FASTER}),
    "vpg, more options": (VanillaPolicyGradient, "Pendulum-v1", 20, MORE),
    "a2c, more options": (AdvantageActorCritic, "Pendulum-v1", UPDATES, MORE),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Train in both checkouts, print a line a case, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, metavar="PYTHON", help="interpreter of the old checkout's environment")
    parser.add_argument("--old-tree", type=Path, metavar="DIR", help="the old checkout")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help="only these")
    parser.add_argument("--train-into", type=Path, metavar="FILE", help=argparse.SUPPRESS)  # what both processes do
    parsed = parser.parse_args(arguments)
    if parsed.train_into:
        train_all(parsed.cases, parsed.train_into)
        return 0
    if not (parsed.old and parsed.old_tree):
        parser.error("--old and --old-tree are needed")
    with tempfile.TemporaryDirectory() as folder:
        old, new = Path(folder) / "old.pt", Path(folder) / "new.pt"
        for python, tree, file in ((parsed.old, parsed.old_tree, old), (Path(sys.executable), ROOT, new)):
            train_in(python.absolute(), tree.resolve(), parsed.cases, file)
        return compare(old, new)


def train_in(python: Path, tree: Path, cases: list[str], file: Path) -> None:
    """Train the cases in a process of a checkout's own, and have its weights written to a file."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SQUALL_", "PYTHON"))}
    variables = {**kept, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [str(python), "-P", str(Path(__file__).resolve()), "--train-into", str(file), "--cases", *cases]
    subprocess.run(command, cwd=tree, env=variables, check=True, stdout=subprocess.DEVNULL)


def train_all(cases: list[str], file: Path) -> None:
    """Train the cases and write their weights, and where `learner` comes from."""
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.save({"": learner.__file__, **{case: train(case) for case in cases}}, file)


def train(case: str) -> dict[str, Any]:
    """Train one case and return its weights, with the number of environment steps and updates it took."""
    algorithm, environment, updates, options = CASES[case]
    module: Any = algorithm(environment, seed=7, hidden_sizes=[16, 16], **options)
    silence: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=updates, max_epochs=-1, accelerator="cpu", enable_model_summary=False, **silence)
    trainer.fit(module)
    counts = {"updates": trainer.global_step, "environment steps": module.env_steps}
    return {**module.state_dict(), **{name: torch.tensor(count) for name, count in counts.items()}}


def compare(old_file: Path, new_file: Path) -> int:
    """Print for each case whether all is equal; return 1 if something is not."""
    old, new = torch.load(old_file, weights_only=True), torch.load(new_file, weights_only=True)
    print(f"old: {Path(old.pop('')).parent}\nnew: {Path(new.pop('')).parent}")
    lines = {case: difference(old[case], new[case]) for case in old}
    for case, words in lines.items():
        counts = f"{old[case]['updates']} updates, {old[case]['environment steps']} environment steps"
        print(f"{case:28} {words or 'equal'} ({counts})")
    return int(any(lines.values()))


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return in words what differs, or nothing."""
    if old.keys() != new.keys():
        return f"DIFFERENT NAMES {sorted(old.keys() ^ new.keys())}"
    other = [name for name in old if old[name].dtype != new[name].dtype or old[name].shape != new[name].shape]
    if other:
        return f"DIFFERENT SHAPES OR TYPES {other}"
    other = [name for name in old if not torch.equal(old[name], new[name])]
    if other:
        largest = max(float((old[name].double() - new[name].double()).abs().max()) for name in other)
        return f"DIFFERENT by at most {largest:g} in {', '.join(other)}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
