"""Batches of whole episodes, one update by a Trainer, and a slow twin of the policy gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.batches import TrajectoryBatch
from replay.types import Trajectory
from tests.learner.toys import Batches, clone_parameters, make_trajectory, quiet_trainer, same


def batch_of(trajectories: Sequence[Trajectory]) -> TrajectoryBatch:
    """Return a batch with garbage in the rows that are not steps."""
    batch = TrajectoryBatch.of(trajectories)
    observation = batch.observation.clone()
    if all(trajectory.episodic for trajectory in trajectories):
        for u, trajectory in enumerate(trajectories):
            observation[u, len(trajectory.action) :] = 1e6
    invalid = ~batch.valid
    garbage = {"action": 1, "reward": -1e6, "discount": 7.0, "log_probability": float("nan")}
    filled = {}
    for name, value in garbage.items():
        filled[name] = getattr(batch, name).clone()
        filled[name][invalid] = value
    return batch._replace(observation=observation, **filled)


EPISODES = [
    make_trajectory(5, seed=0),
    make_trajectory(1, seed=1),
    make_trajectory(3, seed=2, ends="truncated"),
    make_trajectory(8, seed=3),
]


def policy_gradient_twin(
    module: Any, episodes: Sequence[Trajectory], *, baseline: bool, entropy_beta: float
) -> list[Tensor]:
    """Return the gradient of -E[log pi(a|s) (G - b)] - beta H, computed one step at a time."""
    gamma = 0.9
    terms, returns, entropies = [], [], []
    for episode in episodes:
        for t in range(len(episode.reward)):
            future = episode.reward[t:].astype(np.float64)
            returns.append(sum(gamma**k * r for k, r in enumerate(future)))
            logits = module.policy(torch.from_numpy(episode.observation[t : t + 1]))
            distribution = torch.distributions.Categorical(logits=logits[0])
            terms.append(distribution.log_prob(torch.tensor(episode.action[t])))
            entropies.append(distribution.entropy())
    b = np.mean(returns) if baseline else 0.0
    weighted = [term * float(g - b) for term, g in zip(terms, returns, strict=True)]
    loss = -sum(weighted) / len(weighted) - entropy_beta * sum(entropies) / len(entropies)
    return list(torch.autograd.grad(loss, list(module.parameters())))


def sgd_update(module: Any, batch: TrajectoryBatch) -> tuple[list[Tensor], list[Tensor]]:
    """Return parameters before and after one update by a Trainer."""
    before = clone_parameters(module)
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, Batches([batch]))
    assert trainer.global_step == 1
    return before, clone_parameters(module)


def assert_stepped(before: list[Tensor], gradient: list[Tensor], after: list[Tensor]) -> None:
    assert not same(before, after)
    for theta, grad, moved in zip(before, gradient, after, strict=True):
        torch.testing.assert_close(moved, theta - 0.1 * grad, rtol=1e-4, atol=1e-6)
