"""DQN with prioritized experience replay (Schaul et al. 2016, https://arxiv.org/abs/1511.05952).

This is DQN with:
- transitions drawn in proportion to `priority ** alpha`, where the priority is `|TD error| + epsilon`, and that of
  a new transition the highest seen so far;
- updates weighted by importance, `(N P(i)) ** -beta`, normalised by the largest weight of the batch, with beta
  annealed to 1 (section 3.4).

Where it departs from the paper, and why:
- The largest weight of the batch, not of the table, normalises: it needs no search, and shards need not agree on it.
- The priority is the TD error before it is clipped, as the paper writes it.
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
    """DQN that repeats what it was wrong about."""

    name: ClassVar[str] = "per-dqn"

    def __init__(
        self,
        env: str | EnvironmentSpec | Mapping[str, Any],
        *args: Any,
        priority_exponent: float = 0.6,
        beta_start: float = 0.4,
        beta_last_frame: int = 100_000,
        **kwargs: Any,
    ) -> None:
        """Make the networks.

        Args:
            env: environment id, or the specification of one.
            args: see `DQN`.
            priority_exponent: alpha; 0 draws uniformly.
            beta_start: beta at the first step.
            beta_last_frame: environment step at which beta reaches 1.
            kwargs: see `DQN`.

        Raises:
            ConfigurationError: see `DQN`, or a beta that cannot work.
        """
        if not 0.0 <= beta_start <= 1.0:
            raise ConfigurationError(f"beta_start must lie in [0, 1], got {beta_start}")
        if beta_last_frame < 1:
            raise ConfigurationError(f"beta_last_frame must be positive, got {beta_last_frame}")
        super().__init__(env, *args, **kwargs)

    def experience_spec(self) -> ReplaySpec:
        """See `Algorithm.experience_spec`."""
        spec = super().experience_spec()
        return replace(spec, table=replace(spec.table, priority_exponent=self.hparams["priority_exponent"]))

    @property
    def beta(self) -> float:
        """How much of the bias of prioritized draws is undone now."""
        start: float = self.hparams["beta_start"]
        done: float = min(self.env_steps / self.hparams["beta_last_frame"], 1.0)
        return start + done * (1.0 - start)

    def prepare_batch(self, batch: TransitionBatch) -> TransitionBatch:
        """See `OffPolicyAlgorithm.prepare_batch`; adds what each transition counts."""
        return batch._replace(weight=importance_weights(batch.probability, batch.size, self.beta))

    def minimize_losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """See `OffPolicyAlgorithm.minimize_losses`; sends the batch's new priorities to the replay."""
        results = super().minimize_losses(batch)
        assert self.experience is not None
        priorities = results["td_error"].abs() + PRIORITY_EPSILON
        self.experience.update_priorities(batch.ids.cpu().numpy(), priorities.cpu().numpy())
        return results
