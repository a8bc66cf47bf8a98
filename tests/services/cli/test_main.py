"""The command line: bad input prints one clear line and exits with a non-zero status before anything starts."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import gymnasium as gym
import pytest
import ray
from pytorch_lightning import Trainer

from actors import video
from learner import DQN
from services.cli.main import main


@pytest.fixture(autouse=True)
def runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SQUALL_HOME", str(tmp_path / "runs"))
    return tmp_path / "runs"


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must be refused; return its one line of output."""
    before = ray.is_initialized()
    status = main(arguments)
    out, err = capfd.readouterr()
    assert status == 2
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert ray.is_initialized() == before
    return lines[0]


SMALL_REPLAY = ("--set", "replay_size=500", "--set", "warm_start_size=100")


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
        (["dqn", "CartPole-v1", "--set", "hidden_sizes=[]"], "hidden_sizes must be one or more positive widths"),
        (["dqn", "CartPole-v1", "--set", "precision=half"], "precision must be one of"),
        (["dqn", "CartPole-v1", "--actors", "0"], "actors must be positive, got 0: without rollout workers"),
        (["dqn", "CartPole-v1", "--actors", "-2"], "actors: input should be greater than or equal to 0, got -2"),
        (["dqn", "CartPole-v1", "--replay-shards", "0"], "replay_shards: input should be greater than 0, got 0"),
        (["dqn", "CartPole-v1", "--replay-shards", "257"], "replay_shards must lie in [1, 256], got 257"),
        (
            ["dqn", "CartPole-v1", "--replay-shards", "4", "--envs-per-actor", "16", *SMALL_REPLAY],
            "a replay of 500 transitions has shards of 125 with replay_shards 4, and each must hold one push of 256",
        ),
        (["a2c", "CartPole-v1", "--replay-shards", "2"], "a2c has no replay to shard: replay_shards must be 1"),
        (["dqn", "CartPole-v1", "--learner-gpus", "2"], "one GPU: learner_gpus must be auto, 0, or 1, got 2"),
        (
            ["dqn", "CartPole-v1", "--cpus-per-actor", "-1"],
            "cpus_per_actor: input should be greater than or equal to 0",
        ),
        (
            ["dqn", "CartPole-v1", "--set", "learner_threads=0"],
            "learner_threads: input should be greater than 0, got 0",
        ),
        (["dqn", "CartPole-v1", "--envs-per-actor", "0"], "num_envs must be positive, got 0"),
        (["dqn", "CartPole-v1", "--steps", "0"], "steps: input should be greater than 0, got 0"),
        (["dqn", "CartPole-v1", "--steps", "500"], "ends before the first update: warm_start_size is 1000"),
        (["dqn", "CartPole-v1", "--seed", "-1"], "seed: input should be greater than or equal to 0, got -1"),
        (["dqn", "CartPole-v1", "--set", "replay_size=32"], "smaller than"),
        (["dqn", "CartPole-v1", "--set", "replay_size=0"], "replay_size must be positive, got 0"),
        (["dqn", "CartPole-v1", "--set", "replay_size=900"], "the learner could never start"),
        (["dqn", "PongNoFrameskip-v4", "--set", "replay_size=100000000"], "GiB are available here"),
        (
            ["dqn", "CartPole-v1", "--stop-at-return", "9", "--set", "eval_every=0"],
            "stop_at_return needs a periodic evaluation before the run's end: eval_every is 0",
        ),
        (["dqn", "CartPole-v1", "--stop-at-return", "9", "--steps", "2000", "--set", "eval_every=2000"], "2,000 steps"),
        (["dqn", "CartPole-v1", "--serve", "here"], "an address is host:port, such as 127.0.0.1:50051, got 'here'"),
        (["dqn", "CartPole-v1", "--serve", "10.0.0.1:0"], "listening on 10.0.0.1:0, beyond this machine's loopback"),
        (["dqn", "CartPole-v1", "--stop-at-return", "nan"], "stop_at_return: input should be a finite number, got nan"),
        (["dqn", "CartPole-v1", "--name", "../up"], "a run name has"),
        (["dqn", "CartPole-v1", "--config", "nowhere.yaml"], "there is no file nowhere.yaml"),
        (["--resume", "nothing"], "nothing"),
        ([], "name an algorithm and an environment"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], words: str, capfd: pytest.CaptureFixture[str], runs_folder: Path
) -> None:
    assert words in refused(capfd, "train", *arguments)
    assert not list(runs_folder.glob("*/config.yaml"))


def test_a_port_in_use_is_refused_before_anything_starts(capfd: pytest.CaptureFixture[str], runs_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        words = refused(capfd, "train", "dqn", "CartPole-v1", "--serve", address)
    assert f"cannot listen on {address}: Address already in use" in words
    assert not list(runs_folder.glob("*/config.yaml"))


def test_a_run_that_does_not_exist(capfd: pytest.CaptureFixture[str], runs_folder: Path) -> None:
    for command in ("status", "stop", "evaluate"):
        assert "nosuch" in refused(capfd, command, "nosuch")
    assert not runs_folder.exists()


def test_a_number_of_workers_that_cannot_be_is_refused_before_the_run_is_looked_for(
    capfd: pytest.CaptureFixture[str], runs_folder: Path
) -> None:
    assert "actors must not be negative, got -3" in refused(capfd, "scale", "nosuch", "--actors", "-3")
    assert not runs_folder.exists()


@pytest.mark.parametrize(
    "command", [["serve", "run"], ["train", "dqn", "CartPole-v1"], ["scale", "run", "--actors", "2"]]
)
def test_an_option_that_a_command_does_not_know_is_answered_with_that_commands_usage(
    command: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--typo", "3"])
    words = capfd.readouterr().err
    assert end.value.code == 2
    assert words.startswith(f"usage: squall {command[0]} ")
    assert f"squall {command[0]}: error: unrecognized arguments: --typo" in words


def test_a_name_in_use(capfd: pytest.CaptureFixture[str], runs_folder: Path) -> None:
    (runs_folder / "mine").mkdir(parents=True)
    (runs_folder / "mine" / "config.yaml").write_text("{}")
    assert "mine" in refused(capfd, "train", "dqn", "CartPole-v1", "--name", "mine")


def test_help_is_quick_and_worth_reading() -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "services.cli.main", "--help"], capture_output=True, text=True, check=True
    )
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


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two checkpoints: of CartPole, and of an environment that cannot be rendered."""
    folder = tmp_path_factory.mktemp("checkpoints")
    if "SquallUnseen-v0" not in gym.registry:
        gym.register("SquallUnseen-v0", Unseen, max_episode_steps=5)
    for environment in ("CartPole-v1", "SquallUnseen-v0"):
        trainer = Trainer(
            max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
        )
        trainer.fit(DQN(environment, warm_start_size=50, batch_size=8, replay_size=200, hidden_sizes=(8,)))
        trainer.save_checkpoint(folder / f"{environment}.ckpt", weights_only=False)
    return folder


class Unseen(gym.Env[int, int]):
    """An environment that cannot be rendered to a video, and that counts its steps."""

    metadata = {"render_modes": ["ansi"]}  # noqa: RUF012
    observation_space = gym.spaces.Discrete(5)
    action_space = gym.spaces.Discrete(2)
    steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
        return 0, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        Unseen.steps += 1
        return 0, 0.0, False, False, {}


def test_evaluate_records_the_episodes_it_scores(
    checkpoints: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("evaluate", str(checkpoints / "CartPole-v1.ckpt"), "--episodes", "3", "--json")
    assert main(command) == 0
    plain = json.loads(capfd.readouterr().out)
    assert main([*command, "--video", str(tmp_path / "play.mp4")]) == 0
    recorded = json.loads(capfd.readouterr().out)
    assert recorded == plain | {
        "video": str(tmp_path / "play.mp4"), "frames": round(3 * plain["length_mean"]) + 3, "frames_left_out": 0,
    }  # fmt: skip
    with av.open(tmp_path / "play.mp4") as container:
        assert sum(1 for _ in container.decode(video=0)) == recorded["frames"]

    monkeypatch.setattr(video, "MAX_FRAMES", 12)
    assert main([*command, "--video", str(tmp_path / "play.mp4")]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["frames"] == 12
    assert "the video is full: it has 12 frames" in err


@pytest.mark.parametrize(
    ("environment", "name", "words"),
    [
        ("CartPole-v1", "play.gif", "the path of a video must end in .mp4, got "),
        ("CartPole-v1", "nowhere/play.mp4", "nowhere/play.mp4: No such file or directory"),
        (
            "SquallUnseen-v0",
            "play.mp4",
            "SquallUnseen-v0 cannot be recorded: a video needs render mode rgb_array, its ",
        ),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_anything_is_played(
    environment: str, name: str, words: str, checkpoints: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    steps = Unseen.steps
    line = refused(capfd, "evaluate", str(checkpoints / f"{environment}.ckpt"), "--video", str(tmp_path / name))
    assert words in line
    assert Unseen.steps == steps
    assert not list(tmp_path.iterdir())


def test_a_missing_video_library_is_named(
    checkpoints: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    words = refused(capfd, "evaluate", str(checkpoints / "CartPole-v1.ckpt"), "--video", str(tmp_path / "play.mp4"))
    assert "pip install av" in words


def test_an_unknown_kind_of_store(capfd: pytest.CaptureFixture[str], runs_folder: Path) -> None:
    assert "a store is sqlite:///relative/file.db" in refused(capfd, "runs", "--store", "postgres://me:hunter2@host/0")
    assert not runs_folder.exists()


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_store_that_is_not_there(
    by_variable: bool, capfd: pytest.CaptureFixture[str], runs_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    url = f"redis://:hunter2@{address}/0"
    monkeypatch.setenv("SQUALL_STORE", url if by_variable else "redis://elsewhere.invalid")
    flag = [] if by_variable else ["--store", url]
    for command in ("runs", "status x", "stop x", "plot x", "evaluate x", "train dqn CartPole-v1", "train --resume x"):
        assert main([*command.split(), *flag]) == 1
        out, err = capfd.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert f"run store redis://***@{address}/0: " in err
        assert "refused" in err
    assert not runs_folder.exists()
