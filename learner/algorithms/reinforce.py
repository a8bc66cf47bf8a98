"""REINFORCE (Williams 1992, https://doi.org/10.1007/BF00992696; Sutton et al. 1999, policy gradient theorem).

This is:
- a policy that is a distribution over actions, followed as it is: it explores by itself;
- batches of `num_batch_episodes` whole episodes, fixed in advance and all under the newest weights;
- the gradient of the log-probability of each action times the discounted reward from there to the episode's end.

Where it departs from the papers and the reference page, and why:
- No factor gamma**t in front of step t's gradient, as everywhere today: it would all but ignore later steps.
- An episode that was truncated is not bootstrapped, the one exception in this library: there is no value function
  to do it with.
- The reference page trains on a fixed number of steps, episodes cut where it happens to end; here a batch waits for
  its episodes, so `batch_size` and `n_steps` have no meaning. They are accepted, do nothing, and warn when changed;
  so does `entropy_beta`, for the entropy bonus is the Vanilla Policy Gradient's.
- The gradient is the mean over steps, not over episodes: its size does not depend on how long episodes are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from actors.environments import EnvironmentSpec
from learner.algorithms.algorithm import warn_unused
from learner.algorithms.on_policy import OnPolicyAlgorithm
from learner.batches import TrajectoryBatch
from learner.policy_gradients import policy_gradient_loss, rewards_to_go


class Reinforce(OnPolicyAlgorithm):
    """Monte-Carlo policy gradient.

    Example:
        trainer = Trainer(max_steps=500)
        trainer.fit(Reinforce.from_preset("CartPole-v1"))
    """

    name: ClassVar[str] = "reinforce"
    inert: ClassVar[tuple[str, ...]] = ("batch_size", "n_steps", "entropy_beta")

    def __init__(
        self,
        env: str | EnvironmentSpec | Mapping[str, Any],
        gamma: float = 0.99,
        lr: float = 0.01,
        batch_size: int = 8,
        n_steps: int = 10,
        avg_reward_len: int = 100,
        entropy_beta: float = 0.01,
        epoch_len: int = 1000,
        num_batch_episodes: int = 4,
        **kwargs: Any,
    ) -> None:
        """Make the network. The defaults are the reference page's.

        Args:
            env: environment id, or the specification of one.
            gamma: discount of one step.
            lr: learning rate.
            batch_size: does nothing, see above.
            n_steps: does nothing, see above.
            avg_reward_len: episodes in the reported mean return.
            entropy_beta: does nothing here; in `VanillaPolicyGradient` the weight of the entropy bonus.
            epoch_len: updates in a Lightning epoch.
            num_batch_episodes: whole episodes in an update.
            kwargs: see `OnPolicyAlgorithm`.

        Raises:
            ConfigurationError: a value that cannot work.
        """
        super().__init__(env, avg_reward_len=avg_reward_len, **kwargs)
        warn_unused(self, "a batch is whole episodes", *self.inert)

    @property
    def trajectories_per_batch(self) -> int:
        """See `OnPolicyAlgorithm.trajectories_per_batch`."""
        episodes: int = self.hparams["num_batch_episodes"]
        return episodes

    def calc_qvals(self, rewards: Sequence[float] | Tensor) -> Tensor:
        """Return for every step of one whole episode the discounted rewards from there on, `[T]`."""
        return rewards_to_go(torch.as_tensor(rewards, dtype=torch.float32), self.hparams["gamma"])

    def discount_rewards(self, experiences: Iterable[Any]) -> float:
        """Return the discounted sum of the rewards of consecutive experiences, each with a `reward`."""
        rewards = [float(experience.reward) for experience in experiences]
        return float(self.calc_qvals(rewards)[0]) if rewards else 0.0

    def returns_of(self, batch: TrajectoryBatch) -> Tensor:
        """Return the rewards to go of all N steps of a batch, `[N]`, in the order of `TrajectoryBatch.visited`."""
        episodes = zip(batch.reward, batch.valid, strict=True)
        return torch.cat([self.calc_qvals(reward[valid]) for reward, valid in episodes])

    def loss(self, states: Tensor, actions: Tensor, scaled_rewards: Tensor) -> Tensor:
        """Return the scalar loss of N steps.

        Args:
            states: `[N, ...]` observations.
            actions: `[N, ...]`.
            scaled_rewards: `[N]`, by which log-probabilities are weighted.
        """
        log_probability, _ = self.policy.log_probability(self.policy(states), actions)
        return policy_gradient_loss(log_probability, scaled_rewards)

    def update(self, batch: TrajectoryBatch) -> dict[str, Tensor]:
        """See `Algorithm.update`."""
        loss = self.loss(batch.visited, batch.action[batch.valid], self.returns_of(batch))
        self.minimize(loss)
        return {"loss": loss.detach()}
