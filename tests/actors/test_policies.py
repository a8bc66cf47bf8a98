"""Policies of all kinds: seeds, weights, and specifications; categorical distributions of actions."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.environments import DiscreteActions, EnvironmentSpec, specify
from actors.policies import EpsilonSchedule, PolicySpec
from actors.weights import pack, unpack
from replay.errors import ConfigurationError
from replay.types import Array
from tests.actors.stochastic_policies import (
    CONTINUOUS,
    ENVIRONMENT,
    WIDE,
    box,
    different,
    in_the_learner,
    same,
    stochastic,
)
from tests.replay.statistics import FALSE_ALARM, chi_square_p

# Every kind of policy.

KINDS = [("epsilon_greedy", ENVIRONMENT), ("categorical", ENVIRONMENT), *((kind, WIDE) for kind in CONTINUOUS)]


def test_a_spec_travels() -> None:
    spec = PolicySpec("epsilon_greedy", specify("CartPole-v1"), (8,))
    again = pickle.loads(pickle.dumps(spec))
    assert again == spec
    assert again.build().state_dict().keys() == spec.build().state_dict().keys()


@pytest.mark.parametrize(("kind", "environment"), KINDS)
def test_one_seed_gives_the_same_actions(kind: str, environment: EnvironmentSpec) -> None:
    def sampled(seed: int) -> list[Array]:
        torch.manual_seed(0)
        acting = PolicySpec(kind, environment, (8,), EpsilonSchedule(1.0, 1.0)).build()
        acting.begin(np.random.SeedSequence(seed))
        torch.manual_seed(seed)
        return [acting.act(different(), step=step).action for step in range(3)]

    first, second, other = sampled(0), sampled(0), sampled(1)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[0], first[1])


@pytest.mark.parametrize(("kind", "environment"), KINDS)
def test_weights_make_another_instance_act_alike(kind: str, environment: EnvironmentSpec) -> None:
    there = PolicySpec(kind, environment, (8,), normalize=True, activation="tanh").build()
    there.get_submodule("q_network.torso" if kind == "epsilon_greedy" else "torso").observe(  # type: ignore[operator]
        torch.from_numpy(different(20) * 3)
    )
    here = pickle.loads(pickle.dumps(there.spec)).build()
    expected = there.act(different(), step=0, greedy=True)
    assert not np.array_equal(here.act(different(), step=0, greedy=True).action, expected.action)
    unpack(pack(there, 0), here)
    actual = here.act(different(), step=0, greedy=True)
    assert np.array_equal(actual.action, expected.action)
    assert np.array_equal(actual.log_probability, expected.log_probability)


@pytest.mark.parametrize("kind", ["categorical", *CONTINUOUS])
def test_the_other_kind_of_actions_is_refused(kind: str) -> None:
    wanted, environment = ("Discrete", box()) if kind == "categorical" else ("Box", ENVIRONMENT)
    with pytest.raises(ConfigurationError, match=f"{kind} needs a {wanted} action space, got"):
        PolicySpec(kind, environment).build()


@pytest.mark.parametrize("kind", ["categorical", *CONTINUOUS])
def test_only_epsilon_greedy_has_an_exploration_rate(kind: str) -> None:
    assert PolicySpec(kind, ENVIRONMENT).exploration_rate(0) is None
    assert PolicySpec("epsilon_greedy", ENVIRONMENT).exploration_rate(0) == 1.0


# Categorical policies.


def test_categorical_actions_follow_the_softmax() -> None:
    logits = [0.0, 1.0, -1.0, 2.0, 0.5]
    acting = stochastic("categorical", ENVIRONMENT, logits)
    actions = np.concatenate([acting.act(same(), step=0).action for _ in range(20)])
    assert chi_square_p(np.bincount(actions, minlength=5), np.exp(logits) / np.exp(logits).sum()) > FALSE_ALARM


def test_a_categorical_log_probability_is_the_learner_s() -> None:
    acting = stochastic("categorical", ENVIRONMENT)
    action, log_probability = acting.act(different(), step=0)
    assert (action.shape, action.dtype) == ((64,), np.int64)
    assert len(set(action.tolist())) == 5
    logits = acting(torch.from_numpy(different())).detach().numpy().astype(np.float64)
    by_hand = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert log_probability is not None
    np.testing.assert_allclose(log_probability, by_hand[np.arange(64), action], rtol=1e-5)
    np.testing.assert_allclose(in_the_learner(acting, different(), action)[0], log_probability, rtol=1e-5)
    normal = acting.normalized(torch.from_numpy(logits))
    np.testing.assert_allclose(normal, by_hand, rtol=1e-9)


def test_the_greedy_categorical_action_is_the_most_probable_and_uses_no_randomness() -> None:
    acting = stochastic("categorical", ENVIRONMENT)
    acting.rng = None  # type: ignore[assignment]
    action, log_probability = acting.act(different(), step=0, greedy=True)
    output = acting(torch.from_numpy(different()))
    assert action.tolist() == output.argmax(1).tolist()
    assert len(set(action.tolist())) > 1
    np.testing.assert_allclose(log_probability, output.log_softmax(1).amax(1).detach(), rtol=1e-5)


def test_the_entropy_of_a_categorical_by_hand() -> None:
    acting = stochastic("categorical", replace(ENVIRONMENT, actions=DiscreteActions(4)))
    output = torch.tensor([[0.5, 0.25, 0.125, 0.125], [1.0, 1.0, 1.0, 1.0], [1.0, 1e-30, 1e-30, 1e-30]]).log() + 7.0
    _, entropy = acting.log_probability(output, torch.tensor([0, 1, 2]))
    assert entropy.tolist() == pytest.approx([1.75 * math.log(2), 2 * math.log(2), 0.0])
    # Very small probabilities must not produce NaN.
    log_probability, entropy = acting.log_probability(torch.tensor([[1e4, 0.0, 0.0, -1e4]]), torch.tensor([0]))
    assert (log_probability.item(), entropy.item()) == (0.0, 0.0)
