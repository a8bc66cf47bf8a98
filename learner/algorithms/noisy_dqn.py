"""Noisy DQN (Fortunato et al. 2017, https://arxiv.org/abs/1706.10295).

This is DQN with:
- noisy linear layers after the torso, with factorized or independent noise. Each update samples new noise, separately
  for the online and the target network, and so does each step of each worker;
- no epsilon: the noise explores. Greedy evaluation uses the mean weights.

Where it departs from the paper, and why:
- Only the last layers have noise, not the dense layers of the torso: on small problems, this explores enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from actors.environments import EnvironmentSpec
from actors.policies import EpsilonSchedule
from learner.algorithms.dqn import DQN
from learner.hyperparameters import warn_unused


class NoisyDQN(DQN):
    """DQN that explores by parameter noise, whose scale is learned."""

    name: ClassVar[str] = "noisy-dqn"

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
        n_steps: int = 1,
        *,
        noise: str = "factorised",
        **kwargs: Any,
    ) -> None:
        """Create the networks.

        `noise` is "factorised" or "independent". The other arguments are those of `DQN`; `eps_*` have no effect.

        Raises:
            ConfigurationError: another kind of noise, or see `DQN`.
        """
        super().__init__(
            env, eps_start, eps_end, eps_last_frame, sync_rate, gamma, learning_rate, batch_size, replay_size,
            warm_start_size, avg_reward_len, min_episode_reward, seed, batches_per_epoch, n_steps, **kwargs,
        )  # fmt: skip
        warn_unused(self, "its noise explores", "eps_start", "eps_end", "eps_last_frame", "eps_ladder")

    def policy_options(self, default_sizes: tuple[int, ...] = (256, 256)) -> dict[str, Any]:
        """See `Algorithm.policy_options`."""
        no_epsilon = EpsilonSchedule(start=0.0, end=0.0)
        return {**super().policy_options(default_sizes), "exploration": no_epsilon, "noise": self.hparams["noise"]}
