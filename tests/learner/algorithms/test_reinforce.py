"""Tests of REINFORCE: updates against a slow twin, rewards to go, and whole episodes. VPG shares most of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

import actors.segments
from learner import Reinforce, VanillaPolicyGradient
from learner.batches import TrajectoryBatch
from replay.errors import EnvironmentFailed
from tests.learner.algorithms.policy_gradient_updates import (
    EPISODES,
    assert_stepped,
    batch_of,
    policy_gradient_twin,
    sgd_update,
)
from tests.learner.toys import CARTPOLE, Batches, clone_parameters, make_trajectory, quiet_trainer, same, small, toy

# One update.


@pytest.mark.parametrize("cls", [Reinforce, VanillaPolicyGradient])
def test_an_update_is_theta_minus_lr_times_grad(cls: type[Reinforce]) -> None:
    options: dict[str, Any] = {"entropy_beta": 0.5} if cls is VanillaPolicyGradient else {}
    module = small(cls, CARTPOLE, optimizer="sgd", lr=0.1, gamma=0.9, **options)
    twin = copy.deepcopy(module)
    gradient = policy_gradient_twin(
        twin, EPISODES, baseline=cls is VanillaPolicyGradient, entropy_beta=options.get("entropy_beta", 0.0)
    )
    before, after = sgd_update(module, batch_of(EPISODES))
    assert_stepped(before, gradient, after)


def test_what_stands_in_padding_never_matters() -> None:
    ends = []
    for batch in (TrajectoryBatch.of(EPISODES), batch_of(EPISODES)):
        module = small(Reinforce, CARTPOLE, lr=0.1, seed=0)
        quiet_trainer(max_steps=1).fit(module, Batches([batch]))
        ends.append(clone_parameters(module))
    assert same(*ends)


def test_a_truncated_episode_is_not_bootstrapped() -> None:
    """The kind of an episode's end and the final observation have no effect."""
    ends = []
    for end in ("terminated", "truncated"):
        episode = make_trajectory(3, ends=end)
        last = np.concatenate([episode.observation[:-1], np.full((1, 4), 3.0 if end == "truncated" else 0.0)])
        module = small(Reinforce, CARTPOLE, lr=0.1, seed=0)
        quiet_trainer(max_steps=1).fit(
            module, Batches([TrajectoryBatch.of([replace(episode, observation=last.astype(np.float32))])])
        )
        ends.append(clone_parameters(module))
    assert same(*ends)


def test_the_gradient_is_a_mean_over_steps_in_a_box_too() -> None:
    module = small(Reinforce, toy(box=2), optimizer="sgd", lr=0.1, gamma=0.9)
    episodes = [make_trajectory(4, seed=0, box=2), make_trajectory(2, seed=1, box=2)]
    losses = []
    for episode in episodes:
        for t in range(len(episode.reward)):
            g = sum(0.9**k * r for k, r in enumerate(episode.reward[t:].astype(np.float64)))
            mean = module.policy(torch.from_numpy(episode.observation[t : t + 1]))[0]
            normal = torch.distributions.Normal(mean, module.policy.log_std.exp())  # type: ignore[operator, union-attr]
            # The box is [-2, 2]; the policy's own actions are in [-1, 1].
            losses.append(-float(g) * normal.log_prob(torch.from_numpy(episode.action[t]) / 2).sum())
    gradient = list(torch.autograd.grad(torch.stack(losses).mean(), list(module.parameters())))
    before, after = sgd_update(module, TrajectoryBatch.of(episodes))
    assert_stepped(before, gradient, after)


# Rewards to go, by hand.


@pytest.mark.parametrize("rewards", [[1.0, 2.0, 4.0], torch.tensor([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 4.0])])
def test_calc_qvals_by_hand(rewards: Any) -> None:
    assert small(Reinforce, CARTPOLE, gamma=0.5).calc_qvals(rewards).tolist() == [3.0, 4.0, 4.0]
    assert small(VanillaPolicyGradient, CARTPOLE, gamma=0.5).compute_returns(rewards).tolist() == [3.0, 4.0, 4.0]


@dataclass
class Experienced:
    """One experience, with the reference page's attribute."""

    reward: float


def test_discount_rewards_by_hand() -> None:
    module = small(Reinforce, CARTPOLE, gamma=0.5)
    assert module.discount_rewards([Experienced(1.0), Experienced(2.0), Experienced(4.0)]) == 3.0
    assert module.discount_rewards(iter([Experienced(7.0)])) == 7.0
    assert module.discount_rewards([]) == 0.0


# Whole episodes.


@pytest.mark.parametrize("num_envs", [1, 3, 8])
@pytest.mark.parametrize("cls", [Reinforce, VanillaPolicyGradient])
def test_a_batch_is_so_many_whole_episodes(cls: type[Reinforce], num_envs: int) -> None:
    module = small(cls, toy(lengths=(1, 2, 5)), num_envs=num_envs, num_batch_episodes=4)
    batches = module.train_batch()
    lengths = set()
    for _ in range(5):
        batch: TrajectoryBatch = next(batches)
        assert len(batch.reward) == 4
        for observation, valid, discount in zip(batch.observation, batch.valid, batch.discount, strict=True):
            length = int(observation[0, 1])
            lengths.add(length)
            assert valid.tolist() == [t < length for t in range(len(valid))]
            assert observation[:length, 0].tolist() == list(range(length)), "from the reset"
            assert observation[length, 0] == length, "to the final observation"
            assert discount[:length].tolist() == pytest.approx([0.99] * (length - 1) + [0.0])
    assert lengths == {1, 2, 5}


@pytest.mark.parametrize(("num_envs", "batches"), [(1, 50), (3, 50), (8, 50)])
def test_short_episodes_are_not_favoured(num_envs: int, batches: int) -> None:
    """200 episodes of 1 or 50 steps, equally likely: the mean length is 25.5 with a standard deviation of 1.7."""
    module = small(Reinforce, toy(lengths=(1, 50)), num_envs=num_envs, num_batch_episodes=4, seed=1)
    generator = module.train_batch()
    lengths = torch.cat([next(generator).valid.sum(1) for _ in range(batches)]).float()
    assert len(lengths) == 4 * batches
    assert lengths.mean().item() == pytest.approx(25.5, abs=6.0)


def test_an_episode_that_does_not_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.segments, "LONGEST_EPISODE", 50)
    module = small(Reinforce, toy(lengths=(60,)))
    with pytest.raises(EnvironmentFailed, match="an episode did not end within 50 steps; set a time limit"):
        quiet_trainer(max_steps=1).fit(module)
