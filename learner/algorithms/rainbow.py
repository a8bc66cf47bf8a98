"""Rainbow (Hessel et al. 2017, https://arxiv.org/abs/1710.02298) without its distributional head.

This is DQN with five of Rainbow's six ideas: double, dueling, noisy, prioritized, and n-step.
"""

from __future__ import annotations

from typing import ClassVar

from learner.algorithms.double_dqn import DoubleDQN
from learner.algorithms.dueling_dqn import DuelingDQN
from learner.algorithms.n_step_dqn import NStepDQN
from learner.algorithms.noisy_dqn import NoisyDQN
from learner.algorithms.per_dqn import PERDQN


class NonDistributionalRainbow(NStepDQN, PERDQN, NoisyDQN, DuelingDQN, DoubleDQN):
    """Double, dueling, noisy, prioritized DQN with n-step targets; see these classes for the arguments."""

    name: ClassVar[str] = "non-distributional-rainbow"
