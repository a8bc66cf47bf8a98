"""N-step DQN (Sutton 1988, https://doi.org/10.1007/BF00115009; with DQN as in Hessel et al. 2017, section 3).

This is DQN with:
- targets that sum n rewards before they bootstrap: `sum_k gamma**k r_{t+k} + gamma**n max_a Q(s_{t+n}, a)`.

The sums, their discounts and the states to bootstrap from are made where experience is made; so this class changes a
default and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from actors.environments import EnvironmentSpec
from learner.algorithms.dqn import DQN


class NStepDQN(DQN):
    """DQN with n-step targets: `DQN(n_steps=4)` under a name of its own."""

    name: ClassVar[str] = "n-step-dqn"

    def __init__(
        self, env: str | EnvironmentSpec | Mapping[str, Any], *args: Any, n_steps: int = 4, **kwargs: Any
    ) -> None:
        """Make the networks; see `DQN` for the arguments."""
        super().__init__(env, *args, **{**kwargs, "n_steps": n_steps})
