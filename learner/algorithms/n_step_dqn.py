"""N-step DQN (Sutton 1988, https://doi.org/10.1007/BF00115009; with DQN as in Hessel et al. 2017, section 3).

This is DQN with:
- targets that sum n rewards before they bootstrap: `sum_k gamma**k r_{t+k} + gamma**n max_a Q(s_{t+n}, a)`.

Workers compute the sums, their discounts, and the states to bootstrap from. This class therefore only changes the
default of `n_steps`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from actors.environments import EnvironmentSpec
from learner.algorithms.dqn import DQN


class NStepDQN(DQN):
    """DQN with n-step targets: `DQN(env, n_steps=4)` as a class."""

    name: ClassVar[str] = "n-step-dqn"

    def __init__(
        self,
        env: str | EnvironmentSpec | Mapping[str, Any],
        eps_start: float = 1.0,
        eps_end: float = 0.02,
        eps_last_frame: int = 150_000,
        sync_rate: int = 1000,
        gamma: float = 0.99,
        learning_rate: float = 1e-4,
        batch_size: int = 32,
        replay_size: int = 100_000,
        warm_start_size: int = 10_000,
        avg_reward_len: int = 100,
        min_episode_reward: float = -21,
        seed: int = 123,
        batches_per_epoch: int = 1000,
        n_steps: int = 4,
        **kwargs: Any,
    ) -> None:
        """Create the networks. The arguments are those of `DQN`; only the default of `n_steps` differs."""
        super().__init__(
            env, eps_start, eps_end, eps_last_frame, sync_rate, gamma, learning_rate, batch_size, replay_size,
            warm_start_size, avg_reward_len, min_episode_reward, seed, batches_per_epoch, n_steps, **kwargs,
        )  # fmt: skip
