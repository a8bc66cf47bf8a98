"""Tests of VPG, which is REINFORCE with a baseline and an entropy bonus."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner import Reinforce, VanillaPolicyGradient
from learner.batches import TrajectoryBatch
from tests.learner.algorithms.policy_gradient_updates import EPISODES, assert_stepped, batch_of, policy_gradient_twin
from tests.learner.toys import CARTPOLE, Batches, clone_parameters, make_trajectory, quiet_trainer, same, small


def test_without_entropy_and_with_returns_of_mean_0_it_is_reinforce() -> None:
    """With gamma 0 the returns are the rewards."""
    rewards = np.array([1.0, -3.0, 0.5, 1.5], np.float32)
    centred = batch_of(
        [replace(make_trajectory(4), reward=rewards), replace(make_trajectory(4, seed=1), reward=-rewards)]
    )
    shifted = centred._replace(reward=centred.reward + 2.0)

    def updated(cls: type[Reinforce], batch: TrajectoryBatch, **options: Any) -> list[Tensor]:
        module = small(cls, CARTPOLE, optimizer="sgd", lr=0.1, gamma=0.0, seed=0, **options)
        quiet_trainer(max_steps=1).fit(module, Batches([batch]))
        return clone_parameters(module)

    plain = updated(Reinforce, centred)
    assert same(plain, updated(VanillaPolicyGradient, centred, entropy_beta=0.0))
    assert not same(plain, updated(VanillaPolicyGradient, centred, entropy_beta=0.01))
    assert not same(plain, updated(Reinforce, shifted))
    for theta, other in zip(plain, updated(VanillaPolicyGradient, shifted, entropy_beta=0.0), strict=True):
        torch.testing.assert_close(theta, other, rtol=1e-5, atol=1e-6)


def test_the_baseline_by_hand() -> None:
    """The returns of the two episodes are 3, 4, 4, and 1, with a mean of 3."""
    episodes = [
        replace(make_trajectory(3), reward=np.array([1, 2, 4], np.float32)),
        replace(make_trajectory(1), reward=np.array([1], np.float32)),
    ]
    batch = batch_of(episodes)
    assert small(Reinforce, CARTPOLE, gamma=0.5).returns_of(batch).tolist() == [3.0, 4.0, 4.0, 1.0]
    assert small(VanillaPolicyGradient, CARTPOLE, gamma=0.5).returns_of(batch).tolist() == [0.0, 1.0, 1.0, -2.0]


def test_the_entropy_bonus_is_subtracted_with_its_weight() -> None:
    batch = batch_of(EPISODES)
    returns = torch.linspace(-1, 2, 17)

    def loss(cls: type[Reinforce], beta: float) -> tuple[Tensor, Reinforce]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = small(cls, CARTPOLE, seed=0, entropy_beta=beta)
        return module.loss(batch.visited, batch.action[batch.valid], returns), module

    plain, module = loss(Reinforce, 0.7)
    entropy = torch.distributions.Categorical(logits=module.policy(batch.visited)).entropy().mean()
    for beta in (0.0, 0.7):
        torch.testing.assert_close(loss(VanillaPolicyGradient, beta)[0], plain - beta * entropy)


def test_an_update_knows_nothing_of_the_batch_before() -> None:
    """The baseline is the mean of the second batch only."""
    first, second = batch_of(EPISODES[:2]), batch_of(EPISODES[2:])
    module = small(VanillaPolicyGradient, CARTPOLE, optimizer="sgd", lr=0.1, gamma=0.9, seed=0)
    quiet_trainer(max_steps=1).fit(module, Batches([first]))
    gradient = policy_gradient_twin(copy.deepcopy(module), EPISODES[2:], baseline=True, entropy_beta=0.01)
    before = clone_parameters(module)
    quiet_trainer(max_steps=1).fit(module, Batches([second]))
    assert_stepped(before, gradient, clone_parameters(module))
