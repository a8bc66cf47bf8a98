"""Vanilla policy gradient (Sutton et al. 1999; the baseline is Williams 1992's, section 6).

This is REINFORCE with:
- the mean of the batch's rewards to go as a baseline, which leaves the gradient's expectation all but unchanged and
  takes away most of its variance;
- an entropy bonus, weighted by `entropy_beta`, against policies that are sure too early (Williams & Peng 1991).

Where it departs from the papers and the reference page, and why:
- A baseline that contains the step's own return shrinks the gradient by 1 / N, N steps in a batch; nobody minds.
- The reference page subtracts a running mean over the whole of training, in which returns of far worse policies
  weigh on; here it is the batch's.
- What is said of REINFORCE holds here too.
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
    inert: ClassVar[tuple[str, ...]] = ("batch_size", "n_steps")

    def compute_returns(self, rewards: Tensor) -> Tensor:
        """Return the rewards to go of one whole episode, `[T]`, without the baseline."""
        return self.calc_qvals(rewards)

    def returns_of(self, batch: TrajectoryBatch) -> Tensor:
        """See `Reinforce.returns_of`; less the baseline."""
        returns = super().returns_of(batch)
        return returns - returns.mean()

    def loss(self, states: Tensor, actions: Tensor, scaled_rewards: Tensor) -> Tensor:
        """See `Reinforce.loss`; less the entropy bonus."""
        log_probability, entropy = self.policy.log_probability(self.policy(states), actions)
        beta: float = self.hparams["entropy_beta"]
        return policy_gradient_loss(log_probability, scaled_rewards) - beta * entropy.mean()
