"""Tests of whole episodes: single environments, `run_n_episodes`, and a Trainer's tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from actors.environments import SingleEnvironment, specify
from learner import DQN, Reinforce
from tests.learner.toys import Chain, clone_parameters, quiet_trainer, same, small, small_dqn, toy


@pytest.mark.parametrize("name", ["CartPole-v1", "FrozenLake-v1", "PongNoFrameskip-v4", "SquallTally-v0"])
def test_make_environment_is_one_lane_of_what_workers_step(name: str) -> None:
    spec = specify(name)
    lane, vector = DQN.make_environment(name, seed=0), spec.make(1)
    observation, _ = lane.reset()
    expected = spec.observe(vector.reset(seed=0)[0])
    for step in range(12):
        np.testing.assert_array_equal(observation, expected[0])
        assert np.asarray(observation).dtype == spec.observation_dtype
        observation, reward, terminated, truncated, _ = lane.step(step % 2)
        raw, *others, _ = vector.step(np.array([step % 2]))
        expected = spec.observe(raw)
        assert [reward, terminated, truncated] == [other[0] for other in others]
    lane.close()
    vector.close()


def test_seed_zero_is_a_seed_for_the_first_episode_only() -> None:
    def starts(seed: int | None) -> list[list[float]]:
        lane = DQN.make_environment("CartPole-v1", seed)
        return [lane.reset()[0].tolist() for _ in range(2)]

    assert starts(0) == starts(0)
    assert starts(0) != starts(1)
    assert starts(None) != starts(None)
    assert starts(0)[0] != starts(0)[1]


def right_goer(env: str = "SquallChain-v0", **options: Any) -> DQN:
    """Return a DQN whose greedy action is always 1."""
    module = small_dqn(env, **options)
    with torch.no_grad():
        for parameter in module.q_network.parameters():
            parameter.zero_()
        list(module.q_network.parameters())[-1][1] = 1.0
    return module


def chain_actions(epsilon: float, episodes: int) -> tuple[list[float], list[int]]:
    module = right_goer()
    module.policy.rng = np.random.default_rng(0)
    lane: SingleEnvironment = module.make_environment("SquallChain-v0", seed=0)
    Chain.actions.clear()
    return module.run_n_episodes(lane, episodes, epsilon), list(Chain.actions)


def test_run_n_episodes_with_epsilon_0_is_greedy() -> None:
    returns, actions = chain_actions(0.0, 20)
    assert returns == [1.0] * 20
    assert set(actions) == {1}
    assert 20 < len(actions) <= 80


def test_run_n_episodes_with_epsilon_1_is_random() -> None:
    returns, actions = chain_actions(1.0, 20)
    assert returns == [1.0] * 20
    assert len(actions) > 100
    assert np.mean(actions) == pytest.approx(0.5, abs=0.12)


def test_run_n_episodes_defaults_to_one_random_episode() -> None:
    module = right_goer("CartPole-v1")
    returns = module.run_n_episodes(module.make_environment("CartPole-v1", seed=0))
    assert len(returns) == 1
    assert returns[0] > 11, "with constant actions the pole falls within 10 steps"


def test_run_n_episodes_is_seeded_by_the_algorithms_seed() -> None:
    def play(seed: int) -> list[float]:
        module = small_dqn("CartPole-v1", seed=seed)
        return module.run_n_episodes(module.make_environment("CartPole-v1", seed=0), 5)

    assert play(0) == play(0)
    assert play(0) != play(1)


def test_an_algorithm_plays_as_many_greedy_episodes_as_it_is_asked_to() -> None:
    module = small(Reinforce, toy(lengths=(3,), pays=2.0))
    lane = SingleEnvironment(module.environment, seed=0)
    assert module.run_n_episodes(lane) == [6.0]
    assert module.run_n_episodes(lane, 2) == [6.0] * 2
    assert module.run_n_episodes(lane, n_epsiodes=2, n_episodes=3) == [6.0] * 3
    lane.close()


def test_a_test_is_ten_greedy_episodes() -> None:
    results = quiet_trainer().test(right_goer("SquallTally-v0"), verbose=False)
    assert results == [{"test/mean_reward": 15.0}]
    Chain.actions.clear()
    assert quiet_trainer().test(right_goer(), verbose=False) == [{"test/mean_reward": 1.0}]
    assert set(Chain.actions) == {1}
    test_step = right_goer("CartPole-v1").test_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl.LightningModule, "log", lambda *_, **__: None)
        assert test_step() == test_step()
        assert set(test_step()) == {"test/mean_reward", "test/std_reward"}


def test_a_test_by_itself_leaves_training_as_it_was() -> None:
    module = right_goer("SquallTally-v0")
    before = clone_parameters(module)
    quiet_trainer().test(module, verbose=False)
    assert same(before, clone_parameters(module))
    assert module.training
    quiet_trainer(max_steps=3).fit(module)
