"""Advantage actor-critic (Mnih et al. 2016, https://arxiv.org/abs/1602.01783), synchronous.

This is a policy gradient with:
- a critic, a second head on the actor's torso, that estimates the value of an observation;
- trajectories of `unroll_length` rows that bootstrap from the critic, so that a batch need not wait for the end of an
  episode (algorithm S3: every step's return sums the rewards up to the trajectory's end);
- the advantage, the return minus the critic's value, as the weight of the log-probability;
- an entropy bonus, weighted by `entropy_beta`, and the critic's squared error, weighted by `critic_beta`.

Where it departs from the paper and the reference page, and why:
- One synchronous batch per version of the weights instead of asynchronous gradients: the same results without races.
- Adam instead of a shared RMSProp, like the reference page; `optimizer="rmsprop"` selects RMSProp.
- A truncated episode bootstraps from its real final observation.
- The critic's values and the returns are both `(B,)`; the reference implementation subtracts `(B,)` from `(B, 1)`,
  which yields the `(B, B)` matrix of all pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from actors.environments import EnvironmentSpec
from actors.networks import in_full_precision
from learner.algorithms.on_policy import OnPolicyAlgorithm
from learner.batches import TrajectoryBatch
from learner.policy_gradients import n_step_returns, policy_gradient_loss
from replay.errors import ConfigurationError


class AdvantageActorCritic(OnPolicyAlgorithm):
    """Synchronous advantage actor-critic (A2C).

    Example:
        trainer = Trainer(max_steps=3_000)
        trainer.fit(AdvantageActorCritic.from_preset("CartPole-v1"))
    """

    name: ClassVar[str] = "a2c"

    def __init__(
        self,
        env: str | EnvironmentSpec | Mapping[str, Any],
        gamma: float = 0.99,
        lr: float = 0.001,
        batch_size: int = 32,
        avg_reward_len: int = 100,
        entropy_beta: float = 0.01,
        critic_beta: float = 0.5,
        epoch_len: int = 1000,
        *,
        unroll_length: int = 8,
        **kwargs: Any,
    ) -> None:
        """Create the networks. The defaults are those of the reference page.

        Args:
            env: environment id or specification.
            gamma: discount of one step.
            lr: learning rate.
            batch_size: rows in an update, over all workers: `batch_size / unroll_length` trajectories.
            avg_reward_len: number of episodes in the reported mean return.
            entropy_beta: weight of the entropy bonus.
            critic_beta: weight of the critic's squared error.
            epoch_len: updates in a Lightning epoch.
            unroll_length: rows in a trajectory, which bootstraps after the last row.
            kwargs: arguments of `OnPolicyAlgorithm` and `Algorithm`.

        Raises:
            ConfigurationError: an invalid value.
        """
        super().__init__(env, avg_reward_len=avg_reward_len, **kwargs)
        if batch_size % unroll_length:
            raise ConfigurationError(
                f"batch_size must be a multiple of unroll_length, got {batch_size} and {unroll_length}"
            )
        self.critic = nn.Linear(self.policy.torso.features, 1)

    @property
    def trajectory_rows(self) -> int:
        """See `OnPolicyAlgorithm.trajectory_rows`."""
        rows: int = self.hparams["unroll_length"]
        return rows

    @property
    def trajectories_per_batch(self) -> int:
        """See `OnPolicyAlgorithm.trajectories_per_batch`."""
        trajectories: int = self.hparams["batch_size"] // self.hparams["unroll_length"]
        return trajectories

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the parameters of the action distribution, `[B, ...]`, and the values, `[B]`, of observations.

        The parameters are log-probabilities for discrete actions, and means for actions in a box.
        """
        features = self.policy.torso(x)
        output = in_full_precision(self.policy.head, features)
        return self.policy.normalized(output), in_full_precision(self.critic, features)[:, 0]

    def compute_returns(self, rewards: Tensor, dones: Tensor, last_value: Tensor) -> Tensor:
        """Return the n-step returns of one trajectory.

        Args:
            rewards: `[T]` rewards.
            dones: `[T]`, whether a step terminated the episode; later rewards do not count for such a step.
            last_value: value of the observation after the last step.
        """
        reward = torch.as_tensor(rewards, dtype=torch.float32)
        terminated = torch.as_tensor(dones).bool()
        value = reward.new_zeros(1, len(reward) + 1)
        value[0, -1] = torch.as_tensor(last_value)
        discount = self.hparams["gamma"] * (~terminated).float()
        return n_step_returns(reward[None], discount[None], torch.ones_like(terminated)[None], value)[0]

    def loss(self, states: Tensor, actions: Tensor, returns: Tensor) -> Tensor:
        """Return the scalar loss: the weighted sum of the actor's loss, the critic's loss, and the entropy bonus.

        Args:
            states: `[N, ...]` observations.
            actions: `[N, ...]` actions.
            returns: `[N]` returns.

        Raises:
            ValueError: the critic's values and the returns have different shapes.
        """
        output, value = self(states)
        if value.shape != returns.shape:
            raise ValueError(f"values and returns must both be [N], got {tuple(value.shape)}, {tuple(returns.shape)}")
        log_probability, entropy = self.policy.log_probability(output, actions)
        error = returns.detach() - value
        actor_loss = policy_gradient_loss(log_probability, error)
        critic_beta: float = self.hparams["critic_beta"]
        entropy_beta: float = self.hparams["entropy_beta"]
        loss: Tensor = actor_loss + critic_beta * error.square().mean() - entropy_beta * entropy.mean()
        return loss

    def update(self, batch: TrajectoryBatch) -> dict[str, Tensor]:
        """See `Algorithm.update`."""
        if not batch.valid.any():
            # Every row follows an episode's end. The update is made with gradients of 0, since the next batch waits for
            # a new version of the weights.
            zero_loss = torch.stack([parameter.sum() for parameter in self.parameters()]).sum() * 0.0
            self.minimize(zero_loss)
            return {"loss": zero_loss.detach()}
        with torch.no_grad():
            flat = batch.observation.flatten(0, 1)
            value = self(flat)[1].view(batch.observation.shape[:2])
        returns = n_step_returns(batch.reward, batch.discount, batch.valid, value)
        loss = self.loss(batch.visited, batch.action[batch.valid], returns[batch.valid])
        self.minimize(loss)
        return {"loss": loss.detach(), "value": value.mean()}
