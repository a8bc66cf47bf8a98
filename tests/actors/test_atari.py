"""Atari ids: preprocessing, rewards, time limits, and unsupported arguments."""

from __future__ import annotations

import importlib.util
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from ale_py.vector_env import AtariVectorEnv

import actors.environments as environments
from actors.environments import DiscreteActions, seeds_for, specify
from replay.errors import ConfigurationError

PONG = "PongNoFrameskip-v4"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every Atari vector environment that the test makes."""
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
    """Breakout does not start until FIRE is pressed; with the fire reset, an agent that never fires loses a life."""
    lives = {}
    for fire in (True, False):
        env = specify("BreakoutNoFrameskip-v4", {"use_fire_reset": fire}).make(1)
        env.reset(seed=np.array([1]))
        for _ in range(60):
            info = env.step(np.zeros(1, np.int64))[-1]
        lives[fire] = int(info["lives"][0])
        env.close()
    assert lives == {True: 4, False: 5}


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


def test_atari_memory_observations_are_vectors() -> None:
    for name in (PONG, "ALE/Pong-v5"):
        spec = specify(name, {"obs_type": "ram"})
        assert spec.observation_shape == (128,)
        assert not spec.is_image
        assert spec.frame_stack == 1


def test_color_observations_are_refused_because_a_stack_of_them_is_no_image() -> None:
    with pytest.raises(ConfigurationError, match="grayscale=False is not supported"):
        specify("PongNoFrameskip-v4", {"grayscale": False})
