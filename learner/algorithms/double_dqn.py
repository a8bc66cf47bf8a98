"""Double DQN (van Hasselt et al. 2015, https://arxiv.org/abs/1509.06461).

This is DQN with:
- a target whose action the online network selects and whose value the target network estimates.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from learner.algorithms.dqn import DQN
from learner.batches import TransitionBatch
from learner.value_learning import double_q_learning


class DoubleDQN(DQN):
    """DQN without the overestimation that comes from maximizing over noisy value estimates."""

    name: ClassVar[str] = "double-dqn"

    def td_error(self, batch: TransitionBatch) -> Tensor:
        """See `DQN.td_error`."""
        q_tm1 = self.q_network(batch.observation)
        with torch.no_grad():
            q_t_selector = self.q_network(batch.next_observation)
        q_t_value = self.target_values(batch)
        return double_q_learning(q_tm1, batch.action, batch.reward, batch.discount, q_t_value, q_t_selector)
