"""Vanilla policy gradient (Sutton et al. 1999; the baseline is that of Williams 1992, section 6).

This is REINFORCE with:
- a baseline, the mean of the batch's rewards to go, which removes most of the gradient's variance and hardly changes
  its expectation;
- an entropy bonus, weighted by `entropy_beta`, against premature convergence (Williams & Peng 1991).

Where it departs from the papers and the reference page, and why:
- The baseline contains the step's own return, which scales the gradient by 1 - 1/N for N steps in a batch: negligible.
- The reference page subtracts a running mean over the whole of training, which includes the returns of much worse
  policies; here the baseline is the batch's mean.
- The departures of REINFORCE apply here too.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from learner.algorithms.reinforce import Reinforce
from learner.batches import TrajectoryBatch
from learner.policy_gradients import policy_gradient_loss


class VanillaPolicyGradient(Reinforce):
    """REINFORCE with a baseline and an entropy bonus."""

    name: ClassVar[str] = "vpg"
    unused_hyperparameters: ClassVar[tuple[str, ...]] = ("batch_size", "n_steps")

    def compute_returns(self, rewards: Tensor) -> Tensor:
        """Return the rewards to go of one whole episode, `[T]`, without the baseline."""
        return self.calc_qvals(rewards)

    def returns_of(self, batch: TrajectoryBatch) -> Tensor:
        """Return the rewards to go minus the baseline, `[N]`; see `Reinforce.returns_of`."""
        returns = super().returns_of(batch)
        return returns - returns.mean()

    def loss(self, states: Tensor, actions: Tensor, scaled_rewards: Tensor) -> Tensor:
        """Return the loss of N steps minus the entropy bonus; see `Reinforce.loss`."""
        log_probability, entropy = self.policy.log_probability(self.policy(states), actions)
        beta: float = self.hparams["entropy_beta"]
        return policy_gradient_loss(log_probability, scaled_rewards) - beta * entropy.mean()
