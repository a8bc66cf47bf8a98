"""Acting modules, and `PolicySpec`, the frozen description from which every process builds the same one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from actors.environments import ContinuousActions, DiscreteActions, EnvironmentSpec
from actors.networks import QNetwork, in_full_precision, make_torso
from replay.errors import ConfigurationError
from replay.types import Array


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
            # A worker that outlived others may have an index beyond their number.
            return float(0.4 ** (1 + 7 * min(worker / (workers - 1), 1.0)))
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
        normalize: whether vector observations are normalised by running statistics.
        activation: of the dense layers, "relu" or "tanh".
        random_steps: steps, over all workers, before which actions are drawn uniformly from their box.
    """

    kind: str
    environment: EnvironmentSpec
    hidden_sizes: tuple[int, ...] = (256, 256)
    exploration: EpsilonSchedule = EpsilonSchedule()
    dueling: bool = False
    noise: str | None = None
    normalize: bool = False
    activation: str = "relu"
    random_steps: int = 0

    def exploration_rate(self, step: int) -> float | None:
        """Return the probability of a random action at a step, or None where there is no such thing."""
        return self.exploration.at(step) if self.kind == "epsilon_greedy" else None

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

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device


@contextmanager
def acting_on_means(policy: Policy, greedy: bool) -> Iterator[None]:
    """Put the policy into evaluation mode, where noisy layers have no noise, for the time of a greedy action."""
    if not (greedy and policy.training):
        yield
        return
    policy.eval()
    try:
        yield
    finally:
        policy.train()


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
            spec.environment,
            self.actions,
            spec.hidden_sizes,
            dueling=spec.dueling,
            noise=spec.noise,
            normalize=spec.normalize,
            activation=spec.activation,
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
        explorers = np.count_nonzero(explore)
        if explorers == lanes:
            return Action(self.rng.integers(self.actions, size=lanes))
        with torch.inference_mode(), acting_on_means(self, greedy):
            action: Array = self(torch.from_numpy(observation).to(self.device)).argmax(1).cpu().numpy()
        if explorers:
            action = np.where(explore, self.rng.integers(self.actions, size=lanes), action)
        return Action(action)


class StochasticPolicy(Policy):
    """A policy that is a distribution: it can say how probable an action is. The base of those that follow."""

    def __init__(self, spec: PolicySpec, outputs: int) -> None:
        """Build a torso and a head of `outputs` numbers."""
        super().__init__(spec)
        self.torso = make_torso(
            spec.environment, spec.hidden_sizes, normalize=spec.normalize, activation=spec.activation
        )
        self.head = nn.Linear(self.torso.features, outputs)

    def forward(self, observation: Tensor) -> Tensor:
        """Return the head's output `[B, outputs]`: what the distribution is made from."""
        return in_full_precision(self.head, self.torso(observation))

    def log_probability(self, output: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probability (or density) of actions and the entropy, both `[B]`, in nats.

        Args:
            output: `[B, outputs]` of `forward`.
            action: `[B, *action_shape]`.
        """
        raise NotImplementedError

    def normalized(self, output: Tensor) -> Tensor:
        """Return the head's output `[B, outputs]` in its normal form, which stands for the same distribution."""
        return output

    def _output(self, observation: Array) -> Tensor:
        with torch.inference_mode():
            output: Tensor = self(torch.from_numpy(observation).to(self.device))
            return output.float().cpu()


class CategoricalPolicy(StochasticPolicy):
    """Draws a discrete action from a softmax over the head's logits; greedily, takes the most probable."""

    def __init__(self, spec: PolicySpec) -> None:
        """Build the networks.

        Raises:
            ConfigurationError: the action space is not discrete.
        """
        if not isinstance(spec.environment.actions, DiscreteActions):
            raise ConfigurationError(f"categorical needs a Discrete action space, got {spec.environment.actions}")
        super().__init__(spec, spec.environment.actions.count)

    def normalized(self, output: Tensor) -> Tensor:
        """Return log-probabilities."""
        return output.log_softmax(1)

    def log_probability(self, output: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """See `StochasticPolicy.log_probability`."""
        log_probabilities = output.log_softmax(1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(1)
        return log_probabilities.gather(1, action[:, None])[:, 0], entropy

    def act(self, observation: Array, *, step: int, greedy: bool = False) -> Action:
        """See `Policy.act`; int64 actions `[B]`."""
        log_probabilities = self._output(observation).log_softmax(1).numpy()
        # The largest of Gumbel-perturbed logits is a draw from the softmax (Maddison et al. 2014).
        noise = 0.0 if greedy else self.rng.gumbel(size=log_probabilities.shape)
        action = (log_probabilities + noise).argmax(1)
        return Action(action, np.take_along_axis(log_probabilities, action[:, None], 1)[:, 0])


class _BoxPolicy(StochasticPolicy):
    """Base of the policies over a box: `unit` actions lie in [-1, 1] and are stretched to the box.

    Where a bound is not finite, or both are equal, nothing is stretched: there a unit is the environment's own.
    """

    def __init__(self, spec: PolicySpec, outputs_per_action: int) -> None:
        actions = spec.environment.actions
        if not isinstance(actions, ContinuousActions):
            raise ConfigurationError(f"{spec.kind} needs a Box action space, got {actions}")
        self.size = len(actions.low)
        super().__init__(spec, self.size * outputs_per_action)
        low, high = torch.tensor(actions.low), torch.tensor(actions.high)
        stretched = (high - low).isfinite() & (low < high)
        self.center: Tensor
        self.scale: Tensor
        # Not persistent: they follow from the spec.
        self.register_buffer("center", torch.where(stretched, (low + high) / 2, 0.0), persistent=False)
        self.register_buffer("scale", torch.where(stretched, (high - low) / 2, 1.0), persistent=False)

    def to_unit(self, action: Tensor) -> Tensor:
        """Return actions `[B, *action_shape]` as flat ones in [-1, 1], `[B, D]`."""
        return (action.reshape(len(action), self.size) - self.center) / self.scale

    def from_unit(self, unit: Tensor) -> Array:
        """Return flat actions in [-1, 1] as the environment's, `[B, *action_shape]` float32."""
        assert isinstance(self.spec.environment.actions, ContinuousActions)
        action = self.center.cpu() + self.scale.cpu() * unit
        return action.numpy().reshape(len(unit), *self.spec.environment.actions.shape)

    def _normal(self, lanes: int) -> Tensor:
        return torch.from_numpy(self.rng.standard_normal((lanes, self.size), np.float32))


class GaussianPolicy(_BoxPolicy):
    """Draws from a Gaussian whose deviation does not depend on the observation; greedily, takes its mean.

    The environment is given the action clipped to the box; its probability is that of the unclipped one. Densities
    are over unit actions.
    """

    def __init__(self, spec: PolicySpec) -> None:
        """Build the networks.

        Raises:
            ConfigurationError: the action space is no box.
        """
        super().__init__(spec, 1)
        self.log_std = nn.Parameter(torch.zeros(self.size))

    def log_probability(self, output: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """See `StochasticPolicy.log_probability`."""
        log_std = self.log_std.expand_as(output)
        entropy = (log_std + 0.5 * (1.0 + _LOG_TWO_PI)).sum(1)
        return _gaussian_log_density(self.to_unit(action), output, log_std).sum(1), entropy

    def act(self, observation: Array, *, step: int, greedy: bool = False) -> Action:
        """See `Policy.act`; float32 actions."""
        mean, log_std = self._output(observation), self.log_std.detach().cpu()
        unit = mean if greedy else mean + log_std.exp() * self._normal(len(mean))
        density = _gaussian_log_density(unit, mean, log_std).sum(1)
        return Action(self.from_unit(unit), density.numpy())


class SquashedGaussianPolicy(_BoxPolicy):
    """Draws from a Gaussian squashed into the box by tanh; greedily, takes the squashed mean.

    Haarnoja et al. 2018 (https://arxiv.org/abs/1812.05905), appendix C. Densities are over unit actions. Before
    `random_steps` of the run it draws uniformly from the box.
    """

    def __init__(self, spec: PolicySpec) -> None:
        """Build the networks.

        Raises:
            ConfigurationError: the action space is no box, or one without finite bounds.
        """
        super().__init__(spec, 2)
        actions = spec.environment.actions
        assert isinstance(actions, ContinuousActions)
        if not np.isfinite(np.subtract(actions.high, actions.low, dtype=np.float32)).all():
            raise ConfigurationError(f"squashing needs finite bounds of actions, got low {actions.low}, {actions.high}")

    def draw(self, output: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit actions `[B, D]` and their log-densities `[B]`; both carry gradients to `output`.

        Args:
            output: `[B, 2 D]` of `forward`: means and raw log-deviations.
            noise: `[B, D]`, standard normal; zeros give the squashed means.
        """
        mean, log_std = _split(output)
        raw = mean + log_std.exp() * noise
        return raw.tanh(), _squashed_log_density(raw, mean, log_std)

    def log_probability(self, output: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """See `StochasticPolicy.log_probability`; the entropy is that of the Gaussian, before it is squashed."""
        mean, log_std = _split(output)
        # Inverting tanh at its ends gives infinity; float32 cannot tell 1 - 6e-8 from 1.
        raw = self.to_unit(action).clamp(-1 + 1e-6, 1 - 1e-6).atanh()
        entropy = (log_std + 0.5 * (1.0 + _LOG_TWO_PI)).sum(1)
        return _squashed_log_density(raw, mean, log_std), entropy

    def act(self, observation: Array, *, step: int, greedy: bool = False) -> Action:
        """See `Policy.act`; float32 actions."""
        lanes = len(observation)
        if step < self.spec.random_steps and not greedy:
            uniform = self.rng.uniform(-1.0, 1.0, (lanes, self.size)).astype(np.float32)
            return Action(self.from_unit(torch.from_numpy(uniform)))
        noise = torch.zeros(lanes, self.size) if greedy else self._normal(lanes)
        unit, density = self.draw(self._output(observation), noise)
        return Action(self.from_unit(unit), density.numpy())


_LOG_TWO_PI = math.log(2 * math.pi)
_LOG_STD_RANGE = (-5.0, 2.0)


def _split(output: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and log-deviations; the latter are squashed into a range where their exponential is tame."""
    mean, raw = output.chunk(2, 1)
    low, high = _LOG_STD_RANGE
    return mean, low + 0.5 * (high - low) * (raw.tanh() + 1.0)


def _gaussian_log_density(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    return -0.5 * (((x - mean) / log_std.exp()).square() + _LOG_TWO_PI) - log_std


def _squashed_log_density(raw: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return the log-density of `tanh(raw)`, `[B]`: log N(raw) - sum log(1 - tanh(raw)**2), equation 26.

    The second term is written `2 (log 2 - raw - softplus(-2 raw))`, which does not underflow.
    """
    jacobian = 2.0 * (math.log(2.0) - raw - nn.functional.softplus(-2.0 * raw))
    return (_gaussian_log_density(raw, mean, log_std) - jacobian).sum(1)


POLICIES: dict[str, type[Policy]] = {
    "epsilon_greedy": EpsilonGreedyPolicy,
    "categorical": CategoricalPolicy,
    "gaussian": GaussianPolicy,
    "squashed_gaussian": SquashedGaussianPolicy,
}
