"""Noisy DQN (Fortunato et al. 2017, https://arxiv.org/abs/1706.10295).

This is DQN with:
- noisy linear layers after the torso, factorised or independent; their noise is drawn anew for every update, for
  the online and the target network by itself, and for every action step of every worker;
- no epsilon: the noise explores, and greedy evaluation acts on the means.

Where it departs from the paper, and why:
- The dense layers of the torso have no noise, only the last ones do: on small problems that explores enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from actors.environments import EnvironmentSpec
from actors.policies import EpsilonSchedule
from learner.algorithms.algorithm import warn_unused
from learner.algorithms.dqn import DQN


class NoisyDQN(DQN):
    """DQN that explores by noise it learns to turn down."""

    name: ClassVar[str] = "noisy-dqn"

    def __init__(
        self, env: str | EnvironmentSpec | Mapping[str, Any], *args: Any, noise: str = "factorised", **kwargs: Any
    ) -> None:
        """Make the networks.

        Args:
            env: environment id, or the specification of one.
            args: see `DQN`; the `eps_*` are accepted and do nothing, because there is no epsilon.
            noise: "factorised" or "independent".
            kwargs: see `DQN`.

        Raises:
            ConfigurationError: see `DQN`, or another kind of noise.
        """
        super().__init__(env, *args, **kwargs)
        warn_unused(self, "its noise explores", "eps_start", "eps_end", "eps_last_frame", "eps_ladder")

    def policy_options(self, default_sizes: tuple[int, ...] = (256, 256)) -> dict[str, Any]:
        """See `Algorithm.policy_options`."""
        no_epsilon = EpsilonSchedule(start=0.0, end=0.0)
        return {**super().policy_options(default_sizes), "exploration": no_epsilon, "noise": self.hparams["noise"]}
