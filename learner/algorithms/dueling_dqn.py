"""Dueling DQN (Wang et al. 2015, https://arxiv.org/abs/1511.06581).

This is DQN with:
- two heads, for the value of the state and for the advantages of the actions: `Q = V + A - mean A` (equation 9).

Where it departs from the paper, and why:
- The two streams share all dense layers except the last: equally good on small problems, at half the size.
- Gradients into the torso are not scaled by 1/sqrt(2): with Adam the factor has little effect.
"""

from __future__ import annotations

from typing import Any, ClassVar

from learner.algorithms.dqn import DQN


class DuelingDQN(DQN):
    """DQN that learns a state's value from every action taken in that state."""

    name: ClassVar[str] = "dueling-dqn"

    def policy_options(self, default_sizes: tuple[int, ...] = (256, 256)) -> dict[str, Any]:
        """See `Algorithm.policy_options`."""
        return {**super().policy_options(default_sizes), "dueling": True}
