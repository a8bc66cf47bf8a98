"""Tests of presets: all files are usable, and ids of a family share a preset unless they have their own."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import yaml

import learner.presets
from actors.environments import ContinuousActions, EnvironmentSpec
from learner import DQN, AdvantageActorCritic
from learner.algorithms import ALGORITHMS
from learner.presets import Preset, load_preset
from replay.errors import ConfigurationError
from services.config import RUN_KEYS, resolve
from services.supervision.topology import plan

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = {"atari": "BreakoutNoFrameskip-v4", "mujoco": "HalfCheetah-v5"}
# The spaces of HalfCheetah-v5: MuJoCo itself is an optional dependency.
CHEETAH = EnvironmentSpec(None, (17,), "float32", 1, ContinuousActions((6,), (-1.0,) * 6, (1.0,) * 6))
FILES = sorted(Path(learner.presets.__file__).parent.glob("*.yaml"))


def environments_of(algorithm: str) -> set[str]:
    """Return the keys of an algorithm's file, and of the file it inherits from."""
    content = yaml.safe_load((FILES[0].parent / f"{algorithm}.yaml").read_text())
    base = content.pop("inherits", None)
    return set(content) | (environments_of(base) if base else set())


def resolved(algorithm: str, environment: str) -> dict[str, Any]:
    preset = load_preset(algorithm, FAMILIES.get(environment, environment))
    assert preset is not None
    return {"run": preset.run, "hyperparameters": preset.hyperparameters}


ALL = [
    (file.stem, environment, resolved(file.stem, environment))
    for file in FILES
    for environment in sorted(environments_of(file.stem))
]


def test_there_are_presets_for_algorithms_only() -> None:
    assert FILES
    assert {file.stem for file in FILES} <= set(ALGORITHMS)


@pytest.mark.parametrize(("algorithm", "environment", "content"), ALL, ids=[f"{a}-{e}" for a, e, _ in ALL])
def test_every_preset_names_what_exists(algorithm: str, environment: str, content: dict[str, Any]) -> None:
    assert FAMILIES.get(environment, environment) in gym.registry
    assert set(content) <= {"run", "hyperparameters"}
    assert set(content["run"]) <= set(RUN_KEYS) - {"seed"}
    assert set(content["hyperparameters"]) <= set(ALGORITHMS[algorithm].hyperparameter_types()) - {"seed"}


@pytest.mark.parametrize(("algorithm", "environment", "content"), ALL, ids=[f"{a}-{e}" for a, e, _ in ALL])
def test_every_preset_makes_an_algorithm(algorithm: str, environment: str, content: dict[str, Any]) -> None:
    kind = ALGORITHMS[algorithm]
    if environment == "mujoco":
        module = kind(CHEETAH, **content["hyperparameters"])
    else:
        module = kind.from_preset(FAMILIES.get(environment, environment))
    assert {key: module.hparams[key] for key in content["hyperparameters"]} == content["hyperparameters"]
    rest = {
        key: parameter.default
        for key, parameter in type(module).hyperparameter_types().items()
        if key not in content["hyperparameters"]
    }
    if content["hyperparameters"].get("learning_rate_schedule", "constant") != "constant" and environment != "mujoco":
        rest["learning_rate_last_frame"] = content["run"]["steps"]
    assert {key: module.hparams[key] for key in rest} == rest


def test_a_preset_inherits_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dqn.yaml").write_text("Known-v0: {run: {steps: 3}, hyperparameters: {gamma: 0.5, n_steps: 2}}\n")
    (tmp_path / "per-dqn.yaml").write_text("inherits: dqn\nKnown-v0: {hyperparameters: {gamma: 0.25}}\n")
    monkeypatch.setattr(learner.presets.resources, "files", lambda _: tmp_path)
    assert load_preset("per-dqn", "Known-v0") == Preset({"steps": 3}, {"gamma": 0.25, "n_steps": 2})
    assert load_preset("per-dqn", "Other-v0") is None


def test_overrides_win_over_the_preset() -> None:
    module = DQN.from_preset("CartPole-v1", learning_rate=0.5, seed=7)
    assert (module.hparams["learning_rate"], module.seed) == (0.5, 7)
    with pytest.raises(TypeError, match="learning_rat"):
        DQN.from_preset("CartPole-v1", learning_rat=0.5)


@pytest.mark.parametrize("environment", ["BreakoutNoFrameskip-v4", "ALE/Breakout-v5"])
def test_atari_ids_share_a_preset(environment: str) -> None:
    preset = load_preset("dqn", environment)
    shared = next(content for name, key, content in ALL if (name, key) == ("dqn", "atari"))
    assert preset == Preset(shared["run"], shared["hyperparameters"])


@pytest.mark.parametrize("environment", ["HalfCheetah-v5", "Humanoid-v4"])
def test_mujoco_ids_share_a_preset(environment: str) -> None:
    preset = load_preset("sac", environment)
    shared = next(content for name, key, content in ALL if (name, key) == ("sac", "mujoco"))
    assert preset == Preset(shared["run"], shared["hyperparameters"])
    assert preset != load_preset("sac", "Pendulum-v1")
    assert load_preset("sac", "BipedalWalker-v3") is None


def test_a_preset_of_its_own_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dqn.yaml").write_text(
        "atari: {hyperparameters: {gamma: 0.5}}\nALE/Pong-v5: {run: {steps: 3}, hyperparameters: {gamma: 0.25}}\n"
    )
    monkeypatch.setattr(learner.presets.resources, "files", lambda _: tmp_path)
    assert load_preset("dqn", "ALE/Pong-v5") == Preset({"steps": 3}, {"gamma": 0.25})
    assert load_preset("dqn", "ALE/Breakout-v5") == Preset({}, {"gamma": 0.5})


def test_no_preset_is_none_and_from_preset_says_so() -> None:
    assert load_preset("dqn", "MountainCar-v0") is None
    assert load_preset("sarsa", "CartPole-v1") is None
    with pytest.raises(ConfigurationError, match=r"dqn has no preset for MountainCar-v0; DQN\('MountainCar-v0'\) uses"):
        DQN.from_preset("MountainCar-v0")


def test_presets_are_part_of_what_is_installed() -> None:
    # An editable install finds every file, a wheel only the listed files.
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "learner.presets" in setuptools["packages"]
    assert setuptools["package-data"]["learner.presets"] == ["*.yaml"]


def test_a_schedule_ends_with_the_run() -> None:
    preset = load_preset("a2c", "CartPole-v1")
    assert preset is not None
    assert preset.hyperparameters["learning_rate_schedule"] == "linear"
    assert AdvantageActorCritic.from_preset("CartPole-v1").hparams["learning_rate_last_frame"] == preset.run["steps"]


@pytest.mark.parametrize(
    ("overrides", "last_frame"),
    [({"steps": 7_000}, 7_000), ({"steps": 7_000, "learning_rate_last_frame": 9_000}, 9_000)],
)
def test_a_run_of_another_length_takes_its_schedule_along(overrides: dict[str, int], last_frame: int) -> None:
    config, _ = resolve("a2c", "CartPole-v1", overrides=overrides)
    # The saved configuration contains only the given values, so that more steps later mean a longer schedule.
    assert config.hyperparameters["learning_rate_last_frame"] == overrides.get("learning_rate_last_frame")
    topology = plan(config, "unnamed", Path())
    assert topology.learner.hyperparameters["learning_rate_last_frame"] == last_frame
