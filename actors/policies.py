"""Acting modules, and `PolicySpec`, the frozen description from which every process builds the same one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from actors.environments import DiscreteActions, EnvironmentSpec
from actors.networks import QNetwork
from replay.types import Array, ConfigurationError


@dataclass(frozen=True)
class EpsilonSchedule:
    """Epsilon over the global count of environment steps: linear from `start` to `end` at `last_frame`.

    With `ladder` the workers hold constants instead, `0.4 ** (1 + 7 i / (N - 1))` for worker i of N
    (Horgan et al. 2018, Ape-X, section 4.1).
    """

    start: float = 1.0
    end: float = 0.02
    last_frame: int = 150_000
    ladder: bool = False

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigurationError(f"eps_{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.last_frame < 1:
            raise ConfigurationError(f"eps_last_frame must be positive, got {self.last_frame}")

    def at(self, step: int, worker: int = 0, workers: int = 1) -> float:
        """Return epsilon at a global step count."""
        if self.ladder and workers > 1:
            return float(0.4 ** (1 + 7 * worker / (workers - 1)))
        done = min(step / self.last_frame, 1.0)
        return self.start + done * (self.end - self.start)


class Action(NamedTuple):
    """What a policy chose: `action` `[B, *action_shape]`, and its `log_probability` `[B]` where it has one."""

    action: Array
    log_probability: Array | None = None


@dataclass(frozen=True)
class PolicySpec:
    """Everything needed to build an acting module; plain values, safe to send anywhere.

    Attributes:
        kind: which of `POLICIES`.
        environment: whose observations it takes and whose actions it gives.
        hidden_sizes: widths of the torso's dense layers.
        exploration: the epsilon schedule of an epsilon-greedy policy.
        dueling: whether action values are split into state value and advantages.
        noise: of the last layers, "factorised" or "independent"; None for none.
    """

    kind: str
    environment: EnvironmentSpec
    hidden_sizes: tuple[int, ...] = (256, 256)
    exploration: EpsilonSchedule = EpsilonSchedule()
    dueling: bool = False
    noise: str | None = None

    def build(self) -> Policy:
        """Build the module, with fresh weights."""
        return POLICIES[self.kind](self)


class Policy(nn.Module):
    """A module that acts. Its parameters and persistent buffers are all that travels to workers."""

    def __init__(self, spec: PolicySpec) -> None:
        """Remember the spec and start with an arbitrary random stream."""
        super().__init__()
        self.spec = spec
        self.worker, self.workers = 0, 1
        self.rng = np.random.default_rng()

    def begin(self, seed: np.random.SeedSequence, worker: int = 0, workers: int = 1) -> None:
        """Set the random stream that actions are drawn from, and this worker's place among the workers."""
        self.rng = np.random.default_rng(seed)
        self.worker, self.workers = worker, workers

    def act(self, observation: Array, *, step: int, greedy: bool = False) -> Action:
        """Choose an action for every lane.

        Args:
            observation: `[B, *observation_shape]`.
            step: global count of environment steps, which exploration follows.
            greedy: the best action instead of an exploring one.
        """
        raise NotImplementedError

    def exploration_rate(self, step: int) -> float | None:
        """Return the probability of a random action at `step`, or None where there is no such thing."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device


@contextmanager
def acting_on_means(policy: Policy, greedy: bool) -> Iterator[None]:
    """Put the policy into evaluation mode, where noisy layers have no noise, for the time of a greedy action."""
    was_training = policy.training
    policy.train(was_training and not greedy)
    try:
        yield
    finally:
        policy.train(was_training)


class EpsilonGreedyPolicy(Policy):
    """Takes the action of the highest value; with probability epsilon a uniformly random one."""

    def __init__(self, spec: PolicySpec) -> None:
        """Build the Q-network.

        Raises:
            ConfigurationError: the action space is not discrete.
        """
        super().__init__(spec)
        if not isinstance(spec.environment.actions, DiscreteActions):
            raise ConfigurationError(f"epsilon-greedy needs a Discrete action space, got {spec.environment.actions}")
        self.actions = spec.environment.actions.count
        self.q_network: QNetwork = QNetwork(
            spec.environment, self.actions, spec.hidden_sizes, dueling=spec.dueling, noise=spec.noise
        )

    def forward(self, observation: Tensor) -> Tensor:
        """Return action values `[B, actions]`."""
        values: Tensor = self.q_network(observation)
        return values

    def act(self, observation: Array, *, step: int, greedy: bool = False) -> Action:
        """See `Policy.act`; int64 actions `[B]`."""
        lanes = len(observation)
        epsilon = 0.0 if greedy else self.spec.exploration.at(step, self.worker, self.workers)
        explore = self.rng.random(lanes) < epsilon if epsilon else np.zeros(lanes, np.bool_)
        if explore.all():
            return Action(self.rng.integers(self.actions, size=lanes))
        with torch.inference_mode(), acting_on_means(self, greedy):
            action: Array = self(torch.from_numpy(observation).to(self.device)).argmax(1).cpu().numpy()
        if explore.any():
            action = np.where(explore, self.rng.integers(self.actions, size=lanes), action)
        return Action(action)

    def exploration_rate(self, step: int) -> float:
        """Return epsilon."""
        return self.spec.exploration.at(step, self.worker, self.workers)


POLICIES: dict[str, type[Policy]] = {"epsilon_greedy": EpsilonGreedyPolicy}
