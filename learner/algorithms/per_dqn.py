"""DQN with prioritized experience replay (Schaul et al. 2016, https://arxiv.org/abs/1511.05952).

This is DQN with:
- transitions sampled in proportion to `priority ** alpha`. A priority is `|TD error| + epsilon`; a new transition has
  the highest priority so far;
- updates weighted by the importance weights `(N P(i)) ** -beta`, normalized by the largest weight of the batch, with
  beta annealed to 1 (section 3.4).

Where it departs from the paper, and why:
- The largest weight of the batch, not of the table, normalizes the weights. This needs no search of the table, and no
  agreement between shards.
- The priority is the TD error before clipping, as in the paper's equations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from actors.environments import EnvironmentSpec
from learner.algorithms.dqn import DQN
from learner.batches import TransitionBatch
from learner.value_learning import importance_weights
from replay.errors import ConfigurationError
from replay.server import ReplaySpec

PRIORITY_EPSILON = 1e-6


class PERDQN(DQN):
    """DQN that replays the transitions with large TD errors more often."""

    name: ClassVar[str] = "per-dqn"

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
        priority_exponent: float = 0.6,
        beta_start: float = 0.4,
        beta_last_frame: int = 100_000,
        **kwargs: Any,
    ) -> None:
        """Create the networks.

        `priority_exponent` is alpha; 0 samples uniformly. Beta increases linearly from `beta_start` at environment step
        0 to 1 at step `beta_last_frame`. The other arguments are those of `DQN`.

        Raises:
            ConfigurationError: an invalid beta, or see `DQN`.
        """
        if not 0.0 <= beta_start <= 1.0:
            raise ConfigurationError(f"beta_start must lie in [0, 1], got {beta_start}")
        if beta_last_frame < 1:
            raise ConfigurationError(f"beta_last_frame must be positive, got {beta_last_frame}")
        super().__init__(
            env, eps_start, eps_end, eps_last_frame, sync_rate, gamma, learning_rate, batch_size, replay_size,
            warm_start_size, avg_reward_len, min_episode_reward, seed, batches_per_epoch, n_steps, **kwargs,
        )  # fmt: skip

    def experience_spec(self) -> ReplaySpec:
        """See `Algorithm.experience_spec`."""
        spec = super().experience_spec()
        return replace(spec, table=replace(spec.table, priority_exponent=self.hparams["priority_exponent"]))

    @property
    def beta(self) -> float:
        """Current exponent of the importance weights: 0 corrects none of the sampling bias, 1 corrects all of it."""
        start: float = self.hparams["beta_start"]
        fraction: float = min(self.env_steps / self.hparams["beta_last_frame"], 1.0)
        return start + fraction * (1.0 - start)

    def prepare_batch(self, batch: TransitionBatch) -> TransitionBatch:
        """Add the importance weights; see `OffPolicyAlgorithm.prepare_batch`."""
        return batch._replace(weight=importance_weights(batch.probability, batch.size, self.beta))

    def minimize_losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """Make one optimizer step and send the batch's new priorities; see `OffPolicyAlgorithm.minimize_losses`."""
        results = super().minimize_losses(batch)
        assert self.experience is not None
        priorities = results["td_error"].abs() + PRIORITY_EPSILON
        self.experience.update_priorities(batch.ids.cpu().numpy(), priorities.cpu().numpy())
        return results
