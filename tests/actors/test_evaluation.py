"""Evaluation: whole episodes, a fixed number of episodes for each lane, greedy actions, and seeds."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from actors import evaluation, policies
from actors.environments import specify
from actors.evaluation import Evaluation, Evaluator, run_episodes
from actors.policies import EpsilonSchedule, Policy, PolicySpec
from actors.weights import pack
from replay.errors import ConfigurationError, EnvironmentFailed, LayoutMismatch
from replay.types import EpisodeResult
from tests.actors.toys import TEST_POLICIES, ConstantPolicy, Script, scripted

SCRIPTED = specify("SquallScripted-v0")
CART_POLE = specify("CartPole-v1")


@pytest.fixture(autouse=True)
def test_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, policy in TEST_POLICIES.items():
        monkeypatch.setitem(policies.POLICIES, kind, policy)


def seed(number: int = 0) -> np.random.SeedSequence:
    return np.random.SeedSequence(number)


def constant_policy() -> Policy:
    return PolicySpec("constant", SCRIPTED).build()


def q_policy(**exploration: Any) -> Policy:
    torch.manual_seed(0)
    return PolicySpec("epsilon_greedy", CART_POLE, (16,), EpsilonSchedule(**exploration)).build()


def test_every_lane_has_its_quota_whatever_its_episodes_last() -> None:
    """Otherwise the first ten episodes to finish would all come from the lane with short episodes."""
    with scripted({0: Script(length=1, reward=1.0), 1: Script(length=40, reward=0.5)}):
        results = run_episodes(constant_policy(), 10, seed(), lanes=2)
    assert results == (EpisodeResult(1.0, 1),) * 5 + (EpisodeResult(20.0, 40),) * 5


@pytest.mark.parametrize(
    ("episodes", "lanes", "quotas"),
    [(7, 3, [3, 2, 2]), (2, 5, [1, 1]), (1, None, [1]), (20, None, [3] * 4 + [2] * 4)],
)
def test_the_number_of_episodes_is_exact(episodes: int, lanes: int | None, quotas: list[int]) -> None:
    scripts = {lane: Script(length=1 + lane) for lane in range(len(quotas))}
    with scripted(scripts) as scenario:
        results = run_episodes(constant_policy(), episodes, seed(), lanes=lanes)
    assert scenario.made == len(quotas)
    assert sorted(scenario.closed) == list(range(len(quotas)))
    assert [result.length for result in results] == [1 + lane for lane, many in enumerate(quotas) for _ in range(many)]


def test_an_episode_without_an_end_is_an_error_and_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "LONGEST_EPISODE", 50)
    with (
        scripted({0: Script(length=1_000)}),
        pytest.raises(EnvironmentFailed, match="did not end within 50 steps; set a time limit"),
    ):
        run_episodes(constant_policy(), 1, seed(), lanes=1)
    with scripted({0: Script(length=50)}):
        assert len(run_episodes(constant_policy(), 3, seed(), lanes=1)) == 3


def test_a_failed_episode_does_not_count() -> None:
    with scripted({0: Script(length=10, raises_at=frozenset({4}))}, default=Script(length=3, reward=2.0)):
        results = run_episodes(constant_policy(), 2, seed(), lanes=1)
    assert results == (EpisodeResult(6.0, 3),) * 2


def test_the_mean_of_episodes_of_random_length_is_unbiased() -> None:
    """CartPole with a constant action: the mean length does not depend on the number of lanes."""

    def lengths(lanes: int, number: int) -> list[int]:
        policy = PolicySpec("constant", CART_POLE).build()
        return [result.length for result in run_episodes(policy, 200, seed(number), lanes=lanes)]

    one, many = lengths(1, 1), lengths(8, 2)
    assert abs(np.mean(one) - np.mean(many)) < 4 * np.sqrt(np.var(one) / 200 + np.var(many) / 200)
    assert np.var(one) > 0


def test_one_seed_gives_the_same_episodes_and_another_gives_others() -> None:
    policy = q_policy()
    first, again, other = (run_episodes(policy, 6, seed(number)) for number in (0, 0, 1))
    assert first == again
    assert first != other
    assert all(result.episode_return == result.length for result in first)


def test_greedy_episodes_use_no_randomness(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = q_policy(start=1.0, end=1.0)
    expected = run_episodes(policy, 4, seed())

    def begin_without_randomness(*_: Any) -> None:
        policy.rng = None  # type: ignore[assignment]

    monkeypatch.setattr(policy, "begin", begin_without_randomness)
    assert run_episodes(policy, 4, seed()) == expected
    with pytest.raises(AttributeError):
        run_episodes(policy, 4, seed(), greedy=False)


def test_exploring_episodes_explore() -> None:
    policy = q_policy(start=1.0, end=1.0)
    assert run_episodes(policy, 4, seed(), greedy=False) != run_episodes(policy, 4, seed())


@pytest.mark.parametrize("episodes", [0, -3])
def test_the_number_of_episodes_is_positive(episodes: int) -> None:
    with pytest.raises(ConfigurationError, match=f"evaluation episodes must be positive, got {episodes}"):
        run_episodes(constant_policy(), episodes, seed())


def test_the_environment_is_closed_after_a_failure() -> None:
    policy = constant_policy()
    assert isinstance(policy, ConstantPolicy)

    def fail() -> None:
        raise RuntimeError("the policy broke")

    policy.after[3] = fail
    with scripted() as scenario, pytest.raises(RuntimeError, match="the policy broke"):
        run_episodes(policy, 2, seed())
    assert sorted(scenario.closed) == [0, 1]


def test_true_returns_of_atari() -> None:
    """A paddle that does not move loses a few points of Pong: at most one point every few steps."""
    environment = specify("PongNoFrameskip-v4", {"max_num_frames_per_episode": 400})
    policy = PolicySpec("constant", environment).build()
    results = run_episodes(policy, 2, seed(), lanes=2)
    assert [result.length for result in results] == [100, 100]
    assert all(-4.0 <= result.episode_return <= -1.0 for result in results)


def test_an_evaluator_acts_with_the_weights_it_is_given() -> None:
    spec = PolicySpec("epsilon_greedy", CART_POLE, (16,))
    evaluator = Evaluator(spec, run_seed=0)
    policy = spec.build()
    evaluation = evaluator.evaluate(pack(policy, 9), 5, "evaluation", 0)
    assert evaluation.version == 9
    assert len(evaluation.episodes) == 5
    assert evaluator.evaluate(pack(policy, 9), 5, "evaluation", 0) == evaluation
    assert evaluator.evaluate(pack(policy, 9), 5, "evaluation", 1) != evaluation
    assert evaluator.evaluate(pack(policy, 9), 5, "final", 0) != evaluation
    assert evaluator.report() == {"pid": os.getpid()}

    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()  # always action 0: the pole falls within about ten steps
    fallen = evaluator.evaluate(pack(policy, 10), 20, "evaluation", 0)
    assert fallen.mean < 11.0
    assert fallen.version == 10


def test_weights_of_another_network_are_refused() -> None:
    evaluator = Evaluator(PolicySpec("epsilon_greedy", CART_POLE, (16,)), run_seed=0)
    with pytest.raises(LayoutMismatch):
        evaluator.evaluate(pack(PolicySpec("epsilon_greedy", CART_POLE, (17,)).build(), 0), 1, "evaluation", 0)


def test_mean_and_deviation_are_over_episodes() -> None:
    evaluation = Evaluation(0, (EpisodeResult(1.0, 100), EpisodeResult(4.0, 1)))
    assert evaluation.mean == 2.5
    assert evaluation.std == 1.5
