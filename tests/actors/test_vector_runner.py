"""The vector runner: vector steps, and the moments of discounted returns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from actors import policies
from actors.environments import EnvironmentSpec, specify
from actors.policies import Policy, PolicySpec, StochasticPolicy
from actors.vector_runner import VectorRunner
from replay.types import EpisodeResult, Moments
from tests.actors.naive import NaiveExperience, assert_are_moments_of, discounted_returns
from tests.actors.toys import TEST_POLICIES, Script, Scripted, scripted

SHORT = specify("SquallShort-v0")
SCRIPTED = specify("SquallScripted-v0")
LONG = Script(length=10_000)


@pytest.fixture(autouse=True)
def test_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, policy in TEST_POLICIES.items():
        monkeypatch.setitem(policies.POLICIES, kind, policy)


def make_policy(environment: EnvironmentSpec, kind: str = "random") -> Policy:
    policy = PolicySpec(kind, environment).build()
    policy.begin(np.random.SeedSequence(0))
    return policy


@pytest.mark.parametrize("name", ["CartPole-v1", "Acrobot-v1"])
def test_lanes_reset_with_new_seeds_each_time(name: str) -> None:
    spec = specify(name)
    shown = []
    for seed in (0, 0, 1):
        runner = VectorRunner(spec, 2, np.random.SeedSequence(seed))
        shown.append([runner.reset(), runner.reset()])
        runner.close()
    for reset in range(2):
        assert (shown[0][reset] == shown[1][reset]).all()
    assert (shown[0][0] != shown[0][1]).any()
    assert (shown[0][0] != shown[2][0]).any()
    assert (shown[0][0][0] != shown[0][0][1]).any()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_discounted_returns_are_the_twin_s(gamma: float, clip: bool) -> None:
    """Over random rewards, terminations, truncations, and the resets after them, which are no environment steps."""
    runner = VectorRunner(
        SHORT, 4, np.random.SeedSequence(3), track_return_statistics=True, gamma=gamma, clip_rewards=clip
    )
    naive = NaiveExperience(runner, segment_length=1, n_steps=1, gamma=gamma)
    policy = make_policy(SHORT)
    runner.reset()
    for _ in range(150):
        runner.step(policy, step=0)
    expected = discounted_returns(naive, clip)
    last_steps = [episode[-1] for lane in naive.lanes for episode in lane.episodes if episode and episode[-1].ended]
    assert {step.terminated for step in last_steps} == {True, False}
    assert 300 < len(expected) < 550
    assert_are_moments_of(runner.returns, expected)


def test_a_failed_step_and_its_rebuilt_episode_restart_discounted_returns() -> None:
    scripts = {0: Script(length=4, reward=2.0, raises_at=frozenset({3})), 2: Script(length=3, reward=-0.5)}
    with scripted(scripts, default=Script(length=3, reward=0.25, truncates=True)):
        runner = VectorRunner(SCRIPTED, 2, np.random.SeedSequence(0), track_return_statistics=True, gamma=0.5)
        naive = NaiveExperience(runner, segment_length=1, n_steps=1, gamma=0.5)
        policy = make_policy(SCRIPTED)
        runner.reset()
        steps = [runner.step(policy, step=0) for _ in range(10)]
        runner.close()
    assert [step.failed.tolist() for step in steps].count([True, False]) == 1
    # Lane 0: two steps of instance 0, then the failure and a reset, then the steps of instance 2.
    first = [2.0, 3.0, -0.5, -0.75, -0.875, -0.5, -0.75]
    second = [0.25, 0.375, 0.4375] * 2 + [0.25, 0.375]
    assert discounted_returns(naive, clip=False) == first + second
    assert_are_moments_of(runner.returns, first + second)


def test_a_reset_restarts_discounted_returns_and_keeps_their_moments() -> None:
    with scripted(default=LONG):
        runner = VectorRunner(SCRIPTED, 1, np.random.SeedSequence(0), track_return_statistics=True, gamma=0.5)
        policy = make_policy(SCRIPTED)
        for _ in range(2):
            runner.reset()
            for _ in range(3):
                runner.step(policy, step=0)
        runner.close()
    assert_are_moments_of(runner.returns, [1.0, 1.5, 1.75] * 2)


def test_discounted_returns_are_tracked_only_on_request() -> None:
    with scripted():
        runner = VectorRunner(SCRIPTED, 2, np.random.SeedSequence(0), gamma=0.5)
        runner.reset()
        for _ in range(5):
            runner.step(make_policy(SCRIPTED, "constant"), step=0)
        runner.close()
    assert runner.returns == Moments()


def test_a_vector_step_has_the_rewards_that_the_learner_sees() -> None:
    with scripted({0: Script(reward=7.0), 1: Script(reward=-0.5)}):
        for clip in (False, True):
            runner = VectorRunner(SCRIPTED, 2, np.random.SeedSequence(0), clip_rewards=clip)
            policy = make_policy(SCRIPTED, "constant")
            runner.reset()
            steps = [runner.step(policy, step=0) for _ in range(5)]
            runner.close()
            if not clip:
                assert steps[0].reward.tolist() == [7.0, -0.5]
                assert dict(steps[4].episodes) == {0: EpisodeResult(35.0, 5), 1: EpisodeResult(-2.5, 5)}
                Scripted.scenario.made = 0
    assert steps[0].reward.tolist() == [1.0, -0.5]
    assert dict(steps[4].episodes) == {0: EpisodeResult(35.0, 5), 1: EpisodeResult(-2.5, 5)}
    # A constant policy has no log-probabilities.
    assert (steps[0].log_probability.dtype, steps[0].log_probability.tolist()) == (np.float32, [0.0, 0.0])


def test_a_vector_step_has_the_policy_s_log_probabilities_and_unclipped_actions() -> None:
    stacks = specify("SquallStacks-v0")  # actions outside its box [-2, 2] fail an assertion
    runner = VectorRunner(stacks, 50, np.random.SeedSequence(0))
    policy = PolicySpec("gaussian", replace(stacks, observation_shape=(24,)), (4,)).build()
    policy.begin(np.random.SeedSequence(1))
    observation = runner.reset()
    step = runner.step(policy, step=0)
    assert isinstance(policy, StochasticPolicy)
    assert np.abs(step.action).max() > 2.0
    log_probability, _ = policy.log_probability(policy(torch.from_numpy(observation)), torch.from_numpy(step.action))
    assert step.log_probability.dtype == np.float32
    np.testing.assert_allclose(step.log_probability, log_probability.detach(), rtol=1e-4, atol=1e-4)
