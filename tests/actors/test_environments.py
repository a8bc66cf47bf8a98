"""Environment ids and their specifications, the errors of unsupported environments, and seeds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from actors.environments import (
    ContinuousActions,
    DiscreteActions,
    EnvironmentSpec,
    SingleEnvironment,
    family,
    seeds_for,
    specify,
)
from actors.policies import PolicySpec
from actors.rebuilding import RebuildingEnv
from actors.vector_runner import VectorRunner
from replay.errors import ConfigurationError, SquallError
from replay.types import Array
from tests.actors.toys import RandomPolicy

PONG = "PongNoFrameskip-v4"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (PONG, "atari"),
        ("ALE/Breakout-v5", "atari"),
        ("HalfCheetah-v5", "mujoco"),
        ("Humanoid-v4", "mujoco"),
        ("CartPole-v1", None),
        ("Pendulum-v1", None),
        ("SquallShort-v0", None),
        ("some.module:Outside-v0", None),
        ("Nowhere-v0", None),
    ],
)
def test_families(name: str, expected: str | None) -> None:
    assert family(name) == expected


def test_one_seed_gives_one_episode_and_lanes_differ() -> None:
    spec = specify(PONG)

    def first(seed: int) -> Array:
        env = spec.make(2)
        env.reset(seed=seeds_for(env, np.random.SeedSequence(seed)))
        observation: Array = np.stack([env.step(np.full(2, 2))[0] for _ in range(20)])
        env.close()
        return observation

    shown = first(0)
    assert (shown == first(0)).all()
    assert (shown != first(1)).any()
    assert (shown[:, 0] != shown[:, 1]).any()


@pytest.mark.parametrize("name", ["Acrobot-v1", PONG])
def test_every_lane_has_a_seed_that_no_other_worker_has(name: str) -> None:
    env = specify(name).make(2)
    seeds = [int(seed) for number in range(50) for seed in seeds_for(env, np.random.SeedSequence(number))]
    env.close()
    assert len(set(seeds)) == 100
    assert min(seeds) >= 0
    # Consecutive seeds would overlap with those of the next worker.
    assert min(np.diff(sorted(seeds))) > 1


def test_cart_pole_steps_in_gymnasiums_own_vector() -> None:
    spec = specify("CartPole-v1")
    env = spec.make(3)
    assert type(env).__name__ == "CartPoleVectorEnv"
    assert env.max_episode_steps == 500  # type: ignore[attr-defined]
    env.close()
    assert spec.observation_shape == (4,)
    assert spec.observation_dtype == "float32"
    assert spec.frame_stack == 1
    assert not spec.is_image
    assert spec.actions == DiscreteActions(2)
    assert spec.arguments == {}


def test_others_get_a_sync_vector_of_rebuilding_lanes() -> None:
    env = specify("Pendulum-v1", {"g": 9.81}).make(2)
    assert isinstance(env, SyncVectorEnv)
    assert all(isinstance(lane, RebuildingEnv) for lane in env.envs)
    assert [lane.unwrapped._env.unwrapped.g for lane in env.envs] == [9.81, 9.81]  # type: ignore[attr-defined]
    env.close()


def test_float64_observations_are_narrowed() -> None:
    spec = specify("SquallShort-v0")
    assert spec.observation_dtype == "float32"
    runner = VectorRunner(spec, 2, np.random.SeedSequence(0))
    assert runner.reset().dtype == np.float32
    policy = RandomPolicy(PolicySpec("random", spec))
    policy.begin(np.random.SeedSequence(0))
    assert runner.step(policy, step=0).observation.dtype == np.float32
    runner.close()


def test_discrete_observations() -> None:
    spec = specify("FrozenLake-v1")
    assert spec.observation_count == 16
    assert spec.observation_shape == ()
    assert spec.observation_dtype == "int64"
    assert spec.actions == DiscreteActions(4)
    layout = spec.layout(segment_length=8, n_steps=1)
    assert layout.observation_shape == ()
    runner = VectorRunner(spec, 3, np.random.SeedSequence(0))
    assert runner.reset().tolist() == [0, 0, 0]
    runner.close()


def test_discrete_actions_that_start_elsewhere() -> None:
    spec = specify("SquallShort-v0")
    assert spec.actions == DiscreteActions(3, start=1)
    assert spec.to_environment(np.array([0, 1, 2])).tolist() == [1, 2, 3]
    assert specify("CartPole-v1").to_environment(np.array([0, 1])).tolist() == [0, 1]


def test_continuous_actions_are_clipped_for_the_environment_alone() -> None:
    spec = specify("Pendulum-v1")
    assert spec.actions == ContinuousActions((1,), (-2.0,), (2.0,))
    action = np.array([[-3.0], [0.5], [9.0]], np.float32)
    sent = spec.to_environment(action)
    assert sent.tolist() == [[-2.0], [0.5], [2.0]]
    assert sent.dtype == np.float32
    assert action[0, 0] == -3.0
    layout = spec.layout(segment_length=8, n_steps=1)
    assert (layout.action_shape, layout.action_dtype) == ((1,), "float32")


def test_layouts() -> None:
    pong = specify(PONG).layout(segment_length=64, n_steps=3)
    assert (pong.frame_shape, pong.frame_dtype, pong.stack) == ((84, 84), "uint8", 4)
    assert pong.observation_shape == (4, 84, 84)
    assert (pong.action_shape, pong.action_dtype) == ((), "int64")
    assert (pong.segment_length, pong.n_steps) == (64, 3)
    assert specify("CartPole-v1").layout(segment_length=8, n_steps=1).frame_shape == (4,)
    assert specify(PONG, {"stack_num": 1}).layout(segment_length=8, n_steps=1).observation_shape == (1, 84, 84)


def test_a_specification_is_returned_as_it_is() -> None:
    spec = specify("CartPole-v1")
    assert specify(spec) is spec
    external = EnvironmentSpec(None, (3,), "float32", 1, DiscreteActions(2))
    with pytest.raises(ConfigurationError, match="external simulator"):
        external.make(1)


@pytest.mark.parametrize(
    ("name", "arguments", "complaint"),
    [
        ("PongNoFrameskip-v7", {}, r"unknown environment PongNoFrameskip-v7; did you mean PongNoFrameskip-v[04] or"),
        ("CartPoll-v1", {}, r"did you mean CartPole-v1"),
        ("Xyzzyqqq", {}, r"unknown environment Xyzzyqqq$"),
        ("nosuchmodule:Thing-v0", {}, r"cannot import the module of environment nosuchmodule:Thing-v0: .*nosuchmodule"),
        ("ale_py:NoSuch-v0", {}, r"unknown environment ale_py:NoSuch-v0"),
        ("Pong-v4", {}, r"Pong-v4 has a random frame skip, from \(2, 5\); use PongNoFrameskip-v4 or ALE/Pong-v5"),
        ("Pendulum-v1", {"gravity": 1.0}, r"cannot make environment Pendulum-v1: .*gravity"),
        ("CartPole-v1", {"gravity": 1.0}, r"cannot make environment CartPole-v1: .*gravity"),
        (PONG, {"colour": True}, r"cannot make environment PongNoFrameskip-v4: .*colour"),
        ("Blackjack-v1", {}, r"needs Box or Discrete observations; Blackjack-v1 has Tuple"),
        ("phys2d/CartPole-v1", {}, r"cannot make environment phys2d/CartPole-v1: "),
    ],
)
def test_what_cannot_be_used_is_refused(name: str, arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint) as raised:
        specify(name, arguments)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, SquallError)


class Strange(gym.Env[Any, Any]):
    def __init__(self, observations: spaces.Space[Any], actions: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observations, actions


PLAIN = spaces.Box(-1.0, 1.0, (2,))


@pytest.mark.parametrize(
    ("observations", "actions", "complaint"),
    [
        (spaces.Dict(a=PLAIN), spaces.Discrete(2), "needs Box or Discrete observations; SquallStrange-v0 has Dict"),
        (spaces.Tuple([PLAIN]), spaces.Discrete(2), "needs Box or Discrete observations; SquallStrange-v0 has Tuple"),
        (
            spaces.Discrete(3, start=2),
            spaces.Discrete(2),
            "Discrete observations must start at 0; those of SquallStrange-v0 start at 2",
        ),
        (PLAIN, spaces.MultiDiscrete([2, 3]), "needs Discrete or floating-point Box actions; .* has MultiDiscrete"),
        (PLAIN, spaces.Box(0, 3, (2,), np.int64), "needs Discrete or floating-point Box actions"),
        (spaces.Box(-1.0, 1.0, (0,)), spaces.Discrete(2), r"observations must not be empty, got shape \(0,\)"),
    ],
)
def test_spaces_that_nothing_here_can_use(
    observations: spaces.Space[Any], actions: spaces.Space[Any], complaint: str
) -> None:
    gym.register("SquallStrange-v0", entry_point=Strange, kwargs={"observations": observations, "actions": actions})
    try:
        with pytest.raises(ConfigurationError, match=complaint):
            specify("SquallStrange-v0")
    finally:
        del gym.registry["SquallStrange-v0"]


def test_a_vector_that_resets_in_the_same_step_is_refused() -> None:
    def same_step(num_envs: int) -> SyncVectorEnv:
        return SyncVectorEnv([lambda: gym.make("Acrobot-v1")] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)

    gym.register("SquallSameStep-v0", vector_entry_point=same_step)
    try:
        with pytest.raises(ConfigurationError, match="NEXT_STEP"):
            specify("SquallSameStep-v0")
    finally:
        del gym.registry["SquallSameStep-v0"]


@pytest.mark.parametrize("count", [0, -1])
def test_the_number_of_lanes_is_positive(count: int) -> None:
    with pytest.raises(ConfigurationError, match=f"must be positive, got {count}"):
        specify("CartPole-v1").make(count)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; modules imported from it and ids registered by them are removed afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    modules, ids = set(sys.modules), set(gym.registry)
    yield tmp_path
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    for name in set(gym.registry) - ids:
        del gym.registry[name]


USERS_MODULE = """
import gymnasium as gym
import numpy as np

class Corridor(gym.Env):
    observation_space = gym.spaces.Box(0.0, 9.0, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 0
        return np.array([0.0], np.float32), {}

    def step(self, action):
        self.at += 1
        return np.array([self.at], np.float32), 1.0, self.at == 9, False, {}

gym.register("Corridor-v0", entry_point=Corridor)
"""


def test_an_environment_from_a_module_in_the_current_folder(folder: Path) -> None:
    (folder / "corridor_of_a_user.py").write_text(USERS_MODULE)
    # A user's folder must be last in the path: this module must not replace Squall's package.
    (folder / "replay.py").write_text("raise RuntimeError('the wrong replay')")
    spec = specify("corridor_of_a_user:Corridor-v0")
    assert spec.search_path == (str(folder),)
    assert sys.path[-1] == str(folder)

    # A worker process has another working directory, so the specification alone must be sufficient.
    del sys.modules["corridor_of_a_user"], gym.registry["Corridor-v0"]
    sys.path.remove(str(folder))
    runner = VectorRunner(spec, 2, np.random.SeedSequence(0))
    assert runner.reset().tolist() == [[0.0], [0.0]]
    runner.close()


def test_a_module_that_fails_at_import_is_named(folder: Path) -> None:
    (folder / "broken_module_of_a_user.py").write_text("1 / 0")
    with pytest.raises(ConfigurationError, match="broken_module_of_a_user:X-v0: ZeroDivisionError") as raised:
        specify("broken_module_of_a_user:X-v0")
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_single_environment_is_one_lane_of_the_vector_environment() -> None:
    spec = specify("SquallShort-v0")
    single = SingleEnvironment(spec, seed=0)
    vector = spec.make(1)
    first, _ = single.reset()
    assert first.dtype == np.float32
    assert (first == spec.observe(vector.reset(seed=0)[0])[0]).all()
    for action in (0, 1, 2):
        observation, reward, terminated, truncated, _ = single.step(action)
        expected = vector.step(np.array([action + 1]))
        assert (observation == spec.observe(expected[0])[0]).all()
        assert (reward, terminated, truncated) == tuple(float(value[0]) for value in expected[1:4])
    single.close()
    vector.close()


class ExactBox(gym.Env[Any, Any]):
    """An environment that accepts only float64 actions inside its box."""

    observation_space = spaces.Discrete(2)
    action_space = spaces.Box(-0.1, 0.1, (1,), np.float64)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        return 0, {}

    def step(self, action: Any) -> tuple[int, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), (action, action.dtype)
        return 1, 0.0, False, False, {}


def test_clipped_actions_lie_in_a_box_of_another_precision() -> None:
    gym.register("SquallExactBox-v0", ExactBox)
    try:
        spec = specify("SquallExactBox-v0")
        assert spec.to_environment(np.array([[5.0]], np.float32)).dtype == np.float64
        env = spec.make(1)
        env.reset()
        for action in (-5.0, 5.0):
            *_, info = env.step(spec.to_environment(np.array([[action]], np.float32)))
            assert not info
        env.close()
    finally:
        del gym.registry["SquallExactBox-v0"]
