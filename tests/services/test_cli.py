"""The command line: bad input gives one clear line and a non-zero exit before anything starts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from services.cli import main


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SQUALL_HOME", str(tmp_path / "runs"))
    return tmp_path / "runs"


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must be refused; return its one line."""
    before = ray.is_initialized()
    status = main(arguments)
    out, err = capfd.readouterr()
    assert status == 2
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert ray.is_initialized() == before
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dqn", "CartPol-v1"], "unknown environment CartPol-v1; did you mean CartPole-v1"),
        (["dqnn", "CartPole-v1"], "unknown algorithm 'dqnn'; did you mean 'dqn'?"),
        (["dqn", "Pendulum-v1"], "DQN needs a Discrete action space; Pendulum-v1 has Box(-2.0, 2.0, (1,), float32)"),
        (["dqn", "Blackjack-v1"], "Squall needs Box or Discrete observations; Blackjack-v1 has Tuple("),
        (["dqn", "nowhere:Thing-v0"], "cannot import the module of environment nowhere:Thing-v0"),
        (
            ["dqn", "CartPole-v1", "--set", "learning_rat=1"],
            "unknown key 'learning_rat'; did you mean 'learning_rate'?",
        ),
        (["dqn", "CartPole-v1", "--set", "eval_evry=1"], "unknown key 'eval_evry'; did you mean 'eval_every'?"),
        (["dqn", "CartPole-v1", "--set", "lr=1"], "unknown key 'lr'; did you mean 'learning_rate'?"),
        (["dqn", "CartPole-v1", "--set", "environment=Pendulum-v1"], "--set cannot change environment"),
        (["dqn", "CartPole-v1", "--set", "learning_rate"], "--set takes key=value, got 'learning_rate'"),
        (["dqn", "CartPole-v1", "--set", "batch_size=many"], "batch_size: input should be a valid integer"),
        (["dqn", "CartPole-v1", "--set", "batch_size=0"], "batch_size must be positive, got 0"),
        (["dqn", "CartPole-v1", "--set", "gamma=1.5"], "gamma must lie in [0, 1], got 1.5"),
        (["dqn", "CartPole-v1", "--set", "eps_end=-1"], "eps_end must lie in [0, 1], got -1.0"),
        (["dqn", "CartPole-v1", "--set", "hidden_sizes=[]"], "hidden_sizes must name at least one positive width"),
        (["dqn", "CartPole-v1", "--set", "precision=half"], "precision must be one of"),
        (["dqn", "CartPole-v1", "--actors", "0"], "actors: input should be greater than 0, got 0"),
        (["dqn", "CartPole-v1", "--actors", "-2"], "actors: input should be greater than 0, got -2"),
        (["dqn", "CartPole-v1", "--envs-per-actor", "0"], "num_envs must be positive, got 0"),
        (["dqn", "CartPole-v1", "--steps", "0"], "steps: input should be greater than 0, got 0"),
        (["dqn", "CartPole-v1", "--steps", "500"], "ends before the first update: warm_start_size is 1000"),
        (["dqn", "CartPole-v1", "--seed", "-1"], "seed: input should be greater than or equal to 0, got -1"),
        (["dqn", "CartPole-v1", "--set", "replay_size=32"], "smaller than"),
        (["dqn", "CartPole-v1", "--set", "replay_size=0"], "replay_size must be positive, got 0"),
        (["dqn", "CartPole-v1", "--set", "replay_size=900"], "the learner could never start"),
        (["dqn", "PongNoFrameskip-v4", "--set", "replay_size=100000000"], "GiB are available here"),
        (["dqn", "CartPole-v1", "--name", "../up"], "a run name has"),
        (["dqn", "CartPole-v1", "--config", "nowhere.yaml"], "there is no file nowhere.yaml"),
        (["--resume", "nothing"], "nothing"),
        ([], "name an algorithm and an environment"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], words: str, capfd: pytest.CaptureFixture[str], home: Path
) -> None:
    assert words in refused(capfd, "train", *arguments)
    assert not list(home.glob("*/config.yaml"))


def test_a_run_that_does_not_exist(capfd: pytest.CaptureFixture[str], home: Path) -> None:
    for command in ("status", "stop", "evaluate"):
        assert "nosuch" in refused(capfd, command, "nosuch")
    assert not home.exists()


def test_a_name_in_use(capfd: pytest.CaptureFixture[str], home: Path) -> None:
    (home / "mine").mkdir(parents=True)
    (home / "mine" / "config.yaml").write_text("{}")
    assert "mine" in refused(capfd, "train", "dqn", "CartPole-v1", "--name", "mine")


def test_help_is_quick_and_worth_reading() -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "services.cli", "--help"], capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 5
    for command in ("train", "evaluate", "runs", "status", "stop", "plot"):
        assert f"squall {command}" in done.stdout
    loaded = "import services.cli, sys; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", loaded], check=False).returncode == 0


def test_show_config_resolves_preset_file_and_flags(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("algorithm: dqn\nenvironment: CartPole-v1\nseed: 7\nhyperparameters:\n  gamma: 0.9\n")
    assert main(["train", "--config", str(file), "--set", "batch_size=16", "--show-config", "--json"]) == 0
    config = json.loads(capfd.readouterr().out)
    assert (config["seed"], config["hyperparameters"]["gamma"], config["hyperparameters"]["batch_size"]) == (7, 0.9, 16)
    assert config["hyperparameters"]["warm_start_size"] == 1000
