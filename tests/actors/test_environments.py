"""Environment ids, their meaning, what is refused and with which words, and lanes that fail."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from ale_py.vector_env import AtariVectorEnv
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import actors.environments as environments
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
from replay.errors import ConfigurationError, EnvironmentFailed, SquallError
from replay.types import Array
from tests.actors.toys import RandomPolicy, Script, theatre

PONG = "PongNoFrameskip-v4"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every Atari vector made meanwhile."""
    calls: list[dict[str, Any]] = []

    class Recorded(AtariVectorEnv):
        def __init__(self, **arguments: Any) -> None:
            calls.append(arguments)
            super().__init__(**arguments)

    monkeypatch.setattr(environments, "AtariVectorEnv", Recorded)
    return calls


@pytest.mark.parametrize(
    ("name", "sticky"), [(PONG, 0.0), ("PongNoFrameskip-v0", 0.25), ("ALE/Pong-v5", 0.25), ("ale_py:ALE/Pong-v5", 0.25)]
)
def test_an_atari_id_keeps_its_meaning(made: list[dict[str, Any]], name: str, sticky: float) -> None:
    spec = specify(name)
    [arguments] = made
    assert arguments["repeat_action_probability"] == sticky
    assert arguments["frameskip"] == 4
    assert arguments["reward_clipping"] is False
    assert arguments["max_num_frames_per_episode"] == 108_000
    assert spec.observation_shape == (4, 84, 84)
    assert spec.observation_dtype == "uint8"
    assert spec.frame_stack == 4
    assert spec.is_image
    assert spec.actions == DiscreteActions(6)


@pytest.mark.parametrize(("name", "sticky"), [(PONG, False), ("PongNoFrameskip-v0", True), ("ALE/Pong-v5", True)])
def test_sticky_actions_are_seen_on_the_screen(name: str, sticky: bool) -> None:
    env = specify(name, {"noop_max": 0}).make(2)
    env.reset(seed=np.array([1, 2]))
    rng = np.random.default_rng(0)
    same = True
    for _ in range(30):
        observation = env.step(np.full(2, rng.integers(6)))[0]
        same &= bool((observation[0] == observation[1]).all())
    env.close()
    assert same == (not sticky)


@pytest.mark.parametrize("name", [PONG, "ALE/Pong-v5"])
def test_a_step_is_four_frames_and_episodes_begin_with_no_ops(name: str) -> None:
    env = specify(name).make(4)
    _, info = env.reset(seed=seeds_for(env, np.random.SeedSequence(0)))
    begun = info["episode_frame_number"].copy()
    assert len(set(begun.tolist())) > 1
    assert begun.max() <= 32
    for _ in range(3):
        info = env.step(np.zeros(4, np.int64))[-1]
    assert (info["episode_frame_number"] - begun).tolist() == [12] * 4
    env.close()


def test_fire_is_pressed_at_a_reset() -> None:
    """Breakout stands still until FIRE is pressed; an agent that never does so loses lives none the less."""
    lives = {}
    for fire in (True, False):
        env = specify("BreakoutNoFrameskip-v4", {"use_fire_reset": fire}).make(1)
        env.reset(seed=np.array([1]))
        for _ in range(60):
            info = env.step(np.zeros(1, np.int64))[-1]
        lives[fire] = int(info["lives"][0])
        env.close()
    assert lives == {True: 4, False: 5}


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


def test_atari_rewards_are_not_clipped() -> None:
    env = specify("MsPacmanNoFrameskip-v4").make(1)
    env.reset(seed=np.array([0]))
    rewards = {float(env.step(np.array([2]))[1][0]) for _ in range(110)}
    env.close()
    assert max(rewards) >= 10.0


def test_an_atari_limit_counts_frames() -> None:
    env = specify(PONG, {"max_num_frames_per_episode": 80}).make(1)
    env.reset(seed=np.array([0]))
    truncated = [bool(env.step(np.zeros(1, np.int64))[3][0]) for _ in range(25)]
    env.close()
    assert [row for row, end in enumerate(truncated) if end] == [19]


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
    words = [int(word) for number in range(50) for word in seeds_for(env, np.random.SeedSequence(number))]
    env.close()
    assert len(set(words)) == 100
    assert min(words) >= 0
    # Consecutive seeds would run into the next worker's.
    assert min(np.diff(sorted(words))) > 1


@pytest.mark.parametrize("name", ["CartPole-v1", "Acrobot-v1"])
def test_lanes_reset_anew_each_time(name: str) -> None:
    spec = specify(name)
    shown = []
    for seed in (0, 0, 1):
        lanes = VectorRunner(spec, 2, np.random.SeedSequence(seed))
        shown.append([lanes.reset(), lanes.reset()])
        lanes.close()
    for again in range(2):
        assert (shown[0][again] == shown[1][again]).all()
    assert (shown[0][0] != shown[0][1]).any()
    assert (shown[0][0] != shown[2][0]).any()
    assert (shown[0][0][0] != shown[0][0][1]).any()


@pytest.mark.skipif(importlib.util.find_spec("cv2") is None, reason="OpenCV is no dependency")
def test_atari_preprocessing_is_gymnasiums() -> None:
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

    ours = specify(PONG, {"noop_max": 0, "use_fire_reset": False}).make(1)
    theirs = FrameStackObservation(AtariPreprocessing(gym.make(PONG), noop_max=0), 4, padding_type="zero")
    pairs = [(ours.reset(seed=np.array([0]))[0][0], theirs.reset(seed=0)[0])]
    rng = np.random.default_rng(0)
    for action in rng.integers(6, size=60):
        pairs.append((ours.step(np.array([action]))[0][0], theirs.step(action)[0]))
    # Both shrink 210x160 to 84x84, with different rounding.
    for mine, other in pairs:
        assert np.abs(mine.astype(int) - other.astype(int)).max() <= 2


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


def test_atari_memory_observations_are_vectors() -> None:
    for name in (PONG, "ALE/Pong-v5"):
        spec = specify(name, {"obs_type": "ram"})
        assert spec.observation_shape == (128,)
        assert not spec.is_image
        assert spec.frame_stack == 1


def test_float64_observations_are_narrowed() -> None:
    spec = specify("SquallShort-v0")
    assert spec.observation_dtype == "float32"
    lanes = VectorRunner(spec, 2, np.random.SeedSequence(0))
    assert lanes.reset().dtype == np.float32
    policy = RandomPolicy(PolicySpec("random", spec))
    policy.begin(np.random.SeedSequence(0))
    assert lanes.step(policy, step=0).observation.dtype == np.float32
    lanes.close()


def test_discrete_observations() -> None:
    spec = specify("FrozenLake-v1")
    assert spec.observation_count == 16
    assert spec.observation_shape == ()
    assert spec.observation_dtype == "int64"
    assert spec.actions == DiscreteActions(4)
    layout = spec.layout(segment_length=8, n_steps=1)
    assert layout.observation_shape == ()
    lanes = VectorRunner(spec, 3, np.random.SeedSequence(0))
    assert lanes.reset().tolist() == [0, 0, 0]
    lanes.close()


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
    outside = EnvironmentSpec(None, (3,), "float32", 1, DiscreteActions(2))
    with pytest.raises(ConfigurationError, match="outside simulator"):
        outside.make(1)


@pytest.mark.parametrize(
    ("name", "arguments", "complaint"),
    [
        ("PongNoFrameskip-v7", {}, r"unknown environment PongNoFrameskip-v7; did you mean PongNoFrameskip-v[04] or"),
        ("CartPoll-v1", {}, r"did you mean CartPole-v1"),
        ("Xyzzyqqq", {}, r"unknown environment Xyzzyqqq$"),
        ("nosuchmodule:Thing-v0", {}, r"cannot import the module of environment nosuchmodule:Thing-v0: .*nosuchmodule"),
        ("ale_py:NoSuch-v0", {}, r"unknown environment ale_py:NoSuch-v0"),
        ("Pong-v4", {}, r"Pong-v4 draws its frame skip at random from \(2, 5\); use PongNoFrameskip-v4 or ALE/Pong-v5"),
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
        (spaces.Discrete(3, start=2), spaces.Discrete(2), "Discrete observations that start at 2, not at 0"),
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
    """An empty folder to be in; what is imported from it is forgotten afterwards."""
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
    # A user's folder comes last, or this file would replace our package.
    (folder / "replay.py").write_text("raise RuntimeError('the wrong replay')")
    spec = specify("corridor_of_a_user:Corridor-v0")
    assert spec.search_path == (str(folder),)
    assert sys.path[-1] == str(folder)

    # A worker is another process with another folder: the specification alone must do.
    del sys.modules["corridor_of_a_user"], gym.registry["Corridor-v0"]
    sys.path.remove(str(folder))
    lanes = VectorRunner(spec, 2, np.random.SeedSequence(0))
    assert lanes.reset().tolist() == [[0.0], [0.0]]
    lanes.close()


def test_a_module_that_fails_at_import_is_named(folder: Path) -> None:
    (folder / "broken_module_of_a_user.py").write_text("1 / 0")
    with pytest.raises(ConfigurationError, match="broken_module_of_a_user:X-v0: ZeroDivisionError") as raised:
        specify("broken_module_of_a_user:X-v0")
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def scripted_lanes(seed: int = 0, lanes: int = 1) -> tuple[VectorRunner, RandomPolicy]:
    spec = SCRIPTED
    policy = RandomPolicy(PolicySpec("random", spec))
    policy.begin(np.random.SeedSequence(seed))
    return VectorRunner(spec, lanes, np.random.SeedSequence(seed)), policy


SCRIPTED = specify("SquallScripted-v0")


def test_a_failing_step_is_reported_and_no_step() -> None:
    with theatre({0: Script(raises_at=frozenset({2}))}) as happened:
        lanes, policy = scripted_lanes(lanes=2)
        lanes.reset()
        rows = [lanes.step(policy, step=0) for _ in range(4)]
        lanes.close()
    assert [row.failed.tolist() for row in rows] == [[False] * 2, [True, False], [False] * 2, [False] * 2]
    assert rows[1].failures == ("RuntimeError: instance 0 broke at step 2",)
    assert [row.steps for row in rows] == [2, 1, 1, 2]
    assert rows[1].truncated.tolist() == [True, False]
    assert rows[1].observation[0].tolist() == [2.0, 0.0, 0.0]
    assert rows[3].observation[0].tolist() == [2.0, 1.0, 1.0]
    assert all(row.episodes == () for row in rows)
    assert happened.closed == [0, 2, 1]


def test_the_return_of_an_episode_that_failed_is_not_reported() -> None:
    with theatre({0: Script(length=9, raises_at=frozenset({3}))}, default=Script(length=2, reward=5.0)):
        lanes, policy = scripted_lanes()
        lanes.reset()
        results = [result for _ in range(7) for _, result in lanes.step(policy, step=0).episodes]
        lanes.close()
    assert [(result.episode_return, result.length) for result in results] == [(10.0, 2)]


def test_a_failing_reset_is_tried_again_and_reported() -> None:
    with theatre({0: Script(length=2, resets_that_raise=frozenset({2}))}) as happened:
        lanes, policy = scripted_lanes()
        lanes.reset()
        rows = [lanes.step(policy, step=0) for _ in range(4)]
        lanes.close()
    assert [row.failures for row in rows] == [(), (), ("RuntimeError: instance 0 cannot reset",), ()]
    assert [row.steps for row in rows] == [1, 1, 0, 1]
    assert not any(row.failed.any() for row in rows)
    assert rows[3].observation[0].tolist() == [1.0, 0.0, 1.0]
    assert happened.made == 2


def test_repeated_failures_are_no_longer_caught() -> None:
    with theatre(default=Script(raises_at=frozenset({1}))) as happened:
        lanes, policy = scripted_lanes()
        lanes.reset()
        for _ in range(5):
            assert lanes.step(policy, step=0).failed.all()
            assert not lanes.step(policy, step=0).failed.any()
        with pytest.raises(EnvironmentFailed) as raised:
            lanes.step(policy, step=0)
        lanes.close()
    cause = "instance 5 broke at step 1"
    assert str(raised.value) == (f"the environment failed 6 times within 1000 steps, last with RuntimeError: {cause}")
    assert str(raised.value.__cause__) == cause
    assert happened.made == 6


def test_a_reset_that_always_fails_ends() -> None:
    with theatre(default=Script(resets_that_raise=frozenset({1}))):
        lanes, _ = scripted_lanes()
        with pytest.raises(EnvironmentFailed, match="last with RuntimeError: instance 5 cannot reset"):
            lanes.reset()
        lanes.close()


def test_rare_failures_go_on_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RebuildingEnv, "within_steps", 40)
    with theatre(default=Script(raises_at=frozenset({8}))) as happened:
        lanes, policy = scripted_lanes()
        lanes.reset()
        failures = [row.failures for row in (lanes.step(policy, step=0) for _ in range(300)) if row.failures]
        lanes.close()
    assert len(failures) == happened.made - 1 > 20


def test_an_environment_that_cannot_be_made_anew() -> None:
    made = []

    def factory() -> gym.Env[Any, Any]:
        if made:
            raise OSError("the port is taken")
        made.append(True)
        with theatre(default=Script(raises_at=frozenset({1}))):
            return gym.make("SquallScripted-v0", disable_env_checker=True)

    env = RebuildingEnv(factory)
    env.reset(seed=0)
    with pytest.raises(EnvironmentFailed, match="broke at step 1, and cannot be made anew: OSError: the port"):
        env.step(0)


def test_rebuilt_lanes_draw_their_seeds_from_the_run_s() -> None:
    drawn = []
    for seed in (0, 0, 1):
        scripts = {0: Script(length=3, raises_at=frozenset({4})), 1: Script(length=3, resets_that_raise=frozenset({2}))}
        with theatre(scripts) as happened:
            lanes, policy = scripted_lanes(seed, lanes=2)
            lanes.reset()
            for _ in range(10):
                lanes.step(policy, step=0)
            lanes.close()
        drawn.append([seed for seed in happened.seeds if seed is not None])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == len(drawn[0]) == 4
    assert not set(drawn[0]) & set(drawn[2])


def test_one_lane_is_a_view_of_the_same_vector() -> None:
    spec = specify("SquallShort-v0")
    one = SingleEnvironment(spec, seed=0)
    vector = spec.make(1)
    first, _ = one.reset()
    assert first.dtype == np.float32
    assert (first == spec.observe(vector.reset(seed=0)[0])[0]).all()
    for action in (0, 1, 2):
        observation, reward, terminated, truncated, _ = one.step(action)
        expected = vector.step(np.array([action + 1]))
        assert (observation == spec.observe(expected[0])[0]).all()
        assert (reward, terminated, truncated) == tuple(float(value[0]) for value in expected[1:4])
    one.close()
    vector.close()


def test_atari_in_colour_is_refused_because_a_stack_of_it_is_no_image() -> None:
    with pytest.raises(ConfigurationError, match="grayscale=False is not supported"):
        specify("PongNoFrameskip-v4", {"grayscale": False})


class ExactBox(gym.Env[Any, Any]):
    """Takes float64 actions, and only what lies in its box."""

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
