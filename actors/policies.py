"""Policies, and `PolicySpec`, the frozen description from which each process builds the same policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from actors.environments import ContinuousActions, DiscreteActions, EnvironmentSpec
from actors.gaussian import gaussian_entropy, gaussian_log_density, mean_and_log_std, squashed_log_density
from actors.networks import QNetwork, in_full_precision, make_torso
from replay.errors import ConfigurationError
from replay.types import Array


@dataclass(frozen=True)
class EpsilonSchedule:
    """A schedule of epsilon over the global count of environment steps: linear, then constant.

    Attributes:
        start: epsilon at step 0.
        end: epsilon from step `last_frame` on.
        last_frame: environment step at which epsilon reaches `end`.
        ladder: whether each worker has a constant epsilon instead, `0.4 ** (1 + 7 i / (N - 1))` for worker i of N
            (Horgan et al. 2018, Ape-X, section 4.1). A single worker follows the linear schedule.
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
        """Return epsilon of worker number `worker` of `workers`, at a global count of environment steps."""
        if self.ladder and workers > 1:
            # After other workers have exited, a worker's index may exceed the number of workers.
            return float(0.4 ** (1 + 7 * min(worker / (workers - 1), 1.0)))
        progress = min(step / self.last_frame, 1.0)
        return self.start + progress * (self.end - self.start)


class Action(NamedTuple):
    """The actions that a policy selected.

    Attributes:
        action: `[B, *action_shape]`.
        log_probability: `[B]`, log-probability (or log-density) of each action, or None if the policy has none.
    """

    action: Array
    log_probability: Array | None = None


@dataclass(frozen=True)
class PolicySpec:
    """The description from which a policy is built; it has plain values only, so any process can receive it.

    Attributes:
        kind: key of the policy's class in `POLICIES`.
        environment: environment that the policy acts in.
        hidden_sizes: widths of the torso's dense layers.
        exploration: epsilon schedule of an epsilon-greedy policy.
        dueling: whether action values are split into state value and advantages.
        noise: noise of the head's layers, "factorised" or "independent"; None for no noise.
        normalize: whether vector observations are normalized by running statistics.
        activation: activation of the dense layers, "relu" or "tanh".
        random_steps: environment steps, over all workers, during which a squashed Gaussian policy samples actions
            uniformly from their box.
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
        """Return epsilon at a global step count, or None if the policy is not epsilon-greedy."""
        return self.exploration.at(step) if self.kind == "epsilon_greedy" else None

    def build(self) -> Policy:
        """Build the policy with newly initialized weights."""
        return POLICIES[self.kind](self)


class Policy(nn.Module):
    """Base class of policies: a module that selects actions.

    The learner publishes the module's parameters and persistent buffers, and nothing else, to the rollout workers.

    Attributes:
        spec: the specification that the policy was built from.
        worker: rank of this worker among the workers.
        workers: number of workers.
        rng: random stream of the actions.
    """

    def __init__(self, spec: PolicySpec) -> None:
        """Start with a random stream that is not seeded; `begin` seeds it."""
        super().__init__()
        self.spec = spec
        self.worker, self.workers = 0, 1
        self.rng = np.random.default_rng()

    def begin(self, seed: np.random.SeedSequence, worker: int = 0, workers: int = 1) -> None:
        """Seed the random stream of the actions, and set this worker's rank among the workers."""
        self.rng = np.random.default_rng(seed)
        self.worker, self.workers = worker, workers

    def act(self, observation: Array, *, step: int, greedy: bool = False) -> Action:
        """Select an action for every lane.

        Args:
            observation: `[B, *observation_shape]`.
            step: global count of environment steps, which the exploration schedule depends on.
            greedy: whether to take the best action instead of exploring.
        """
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device


@contextmanager
def _evaluation_mode(policy: Policy, *, enabled: bool) -> Iterator[None]:
    """Put the policy into evaluation mode, in which noisy layers have no noise, for the duration of the block."""
    if not (enabled and policy.training):
        yield
        return
    policy.eval()
    try:
        yield
    finally:
        policy.train()


class EpsilonGreedyPolicy(Policy):
    """A policy that takes the action of the highest value, or a uniformly random action with probability epsilon."""

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
        """Select int64 actions `[B]`; there are no log-probabilities. See `Policy.act`."""
        lanes = len(observation)
        epsilon = 0.0 if greedy else self.spec.exploration.at(step, self.worker, self.workers)
        explore = self.rng.random(lanes) < epsilon if epsilon else np.zeros(lanes, np.bool_)
        exploring = np.count_nonzero(explore)
        if exploring == lanes:
            return Action(self.rng.integers(self.actions, size=lanes))
        with torch.inference_mode(), _evaluation_mode(self, enabled=greedy):
            action: Array = self(torch.from_numpy(observation).to(self.device)).argmax(1).cpu().numpy()
        if exploring:
            action = np.where(explore, self.rng.integers(self.actions, size=lanes), action)
        return Action(action)


class StochasticPolicy(Policy):
    """Base class of policies that are distributions over actions, with log-probabilities."""

    def __init__(self, spec: PolicySpec, outputs: int) -> None:
        """Build a torso, and a head with `outputs` outputs."""
        super().__init__(spec)
        self.torso = make_torso(
            spec.environment, spec.hidden_sizes, normalize=spec.normalize, activation=spec.activation
        )
        self.head = nn.Linear(self.torso.features, outputs)

    def forward(self, observation: Tensor) -> Tensor:
        """Return the head's output `[B, outputs]`, the parameters of the distribution."""
        return in_full_precision(self.head, self.torso(observation))

    def log_probability(self, output: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probability (or log-density) of actions, and the entropy, both `[B]`, in nats.

        Args:
            output: `[B, outputs]`, the result of `forward`.
            action: `[B, *action_shape]`.
        """
        raise NotImplementedError

    def normalized(self, output: Tensor) -> Tensor:
        """Return the normalized parameters `[B, outputs]` of the same distribution."""
        return output

    def _output(self, observation: Array) -> Tensor:
        with torch.inference_mode():
            output: Tensor = self(torch.from_numpy(observation).to(self.device))
            return output.float().cpu()


class CategoricalPolicy(StochasticPolicy):
    """A policy that samples a discrete action from the softmax of the head's logits.

    The greedy action is the most probable action.
    """

    def __init__(self, spec: PolicySpec) -> None:
        """Build the networks.

        Raises:
            ConfigurationError: the action space is not discrete.
        """
        if not isinstance(spec.environment.actions, DiscreteActions):
            raise ConfigurationError(f"categorical needs a Discrete action space, got {spec.environment.actions}")
        super().__init__(spec, spec.environment.actions.count)

    def normalized(self, output: Tensor) -> Tensor:
        """Return the log-probabilities of all actions, `[B, actions]`."""
        return output.log_softmax(1)

    def log_probability(self, output: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probability of actions and the entropy. See `StochasticPolicy.log_probability`."""
        log_probabilities = output.log_softmax(1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(1)
        return log_probabilities.gather(1, action[:, None])[:, 0], entropy

    def act(self, observation: Array, *, step: int, greedy: bool = False) -> Action:
        """Select int64 actions `[B]`. See `Policy.act`."""
        log_probabilities = self._output(observation).log_softmax(1).numpy()
        # The argmax of Gumbel-perturbed logits is a sample from the softmax (Maddison et al. 2014).
        noise = 0.0 if greedy else self.rng.gumbel(size=log_probabilities.shape)
        action = (log_probabilities + noise).argmax(1)
        return Action(action, np.take_along_axis(log_probabilities, action[:, None], 1)[:, 0])


class _BoxPolicy(StochasticPolicy):
    """Base class of policies over a box.

    A unit action has D numbers; -1 and 1 correspond to the bounds of the box. A dimension without two different finite
    bounds is not scaled.

    Attributes:
        size: D, the size of the flattened action.
    """

    def __init__(self, spec: PolicySpec, outputs_per_action: int) -> None:
        actions = spec.environment.actions
        if not isinstance(actions, ContinuousActions):
            raise ConfigurationError(f"{spec.kind} needs a Box action space, got {actions}")
        self.size = len(actions.low)
        super().__init__(spec, self.size * outputs_per_action)
        low, high = torch.tensor(actions.low), torch.tensor(actions.high)
        scaled = (high - low).isfinite() & (low < high)
        self.center: Tensor
        self.scale: Tensor
        # The buffers are not persistent, because the spec determines them.
        self.register_buffer("center", torch.where(scaled, (low + high) / 2, 0.0), persistent=False)
        self.register_buffer("scale", torch.where(scaled, (high - low) / 2, 1.0), persistent=False)

    def to_unit(self, action: Tensor) -> Tensor:
        """Return the unit actions `[B, D]` of the environment's actions `[B, *action_shape]`."""
        return (action.reshape(len(action), self.size) - self.center) / self.scale

    def from_unit(self, unit: Tensor) -> Array:
        """Return the environment's actions `[B, *action_shape]` float32 of unit actions `[B, D]`."""
        assert isinstance(self.spec.environment.actions, ContinuousActions)
        action = self.center.cpu() + self.scale.cpu() * unit
        return action.numpy().reshape(len(unit), *self.spec.environment.actions.shape)

    def _normal(self, lanes: int) -> Tensor:
        return torch.from_numpy(self.rng.standard_normal((lanes, self.size), np.float32))


class GaussianPolicy(_BoxPolicy):
    """A Gaussian policy whose standard deviation does not depend on the observation.

    The greedy action is the mean. The environment receives the action clipped to the box; the log-probability is that
    of the action before clipping. Densities are over unit actions.
    """

    def __init__(self, spec: PolicySpec) -> None:
        """Build the networks.

        Raises:
            ConfigurationError: the action space is not a box.
        """
        super().__init__(spec, 1)
        self.log_std = nn.Parameter(torch.zeros(self.size))

    def log_probability(self, output: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-density of actions and the entropy. See `StochasticPolicy.log_probability`."""
        log_std = self.log_std.expand_as(output)
        entropy = gaussian_entropy(log_std)
        return gaussian_log_density(self.to_unit(action), output, log_std).sum(1), entropy

    def act(self, observation: Array, *, step: int, greedy: bool = False) -> Action:
        """Select float32 actions `[B, *action_shape]`. See `Policy.act`."""
        mean, log_std = self._output(observation), self.log_std.detach().cpu()
        unit = mean if greedy else mean + log_std.exp() * self._normal(len(mean))
        log_density = gaussian_log_density(unit, mean, log_std).sum(1)
        return Action(self.from_unit(unit), log_density.numpy())


class SquashedGaussianPolicy(_BoxPolicy):
    """A Gaussian policy squashed into the box by tanh.

    Haarnoja et al. 2018 (https://arxiv.org/abs/1812.05905), appendix C. The greedy action is the squashed mean.
    Densities are over unit actions. During the first `random_steps` steps of the run, the policy samples uniformly from
    the box.
    """

    def __init__(self, spec: PolicySpec) -> None:
        """Build the networks.

        Raises:
            ConfigurationError: the action space is not a box, or its bounds are not finite.
        """
        super().__init__(spec, 2)
        actions = spec.environment.actions
        assert isinstance(actions, ContinuousActions)
        if not np.isfinite(np.subtract(actions.high, actions.low, dtype=np.float32)).all():
            raise ConfigurationError(
                f"{spec.kind} needs finite bounds of actions, got low {actions.low}, high {actions.high}"
            )

    def draw(self, output: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit actions `[B, D]` and their log-densities `[B]`, both differentiable with respect to `output`.

        Args:
            output: `[B, 2 D]`, the result of `forward`: means and raw log standard deviations.
            noise: `[B, D]`, standard normal; zeros select the squashed means.
        """
        mean, log_std = mean_and_log_std(output)
        raw = mean + log_std.exp() * noise
        return raw.tanh(), squashed_log_density(raw, mean, log_std)

    def log_probability(self, output: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-density of actions, and the entropy of the Gaussian before squashing.

        See `StochasticPolicy.log_probability`.
        """
        mean, log_std = mean_and_log_std(output)
        # The inverse of tanh is infinite at -1 and 1, and float32 cannot represent numbers between 1 - 6e-8 and 1.
        raw = self.to_unit(action).clamp(-1 + 1e-6, 1 - 1e-6).atanh()
        entropy = gaussian_entropy(log_std)
        return squashed_log_density(raw, mean, log_std), entropy

    def act(self, observation: Array, *, step: int, greedy: bool = False) -> Action:
        """Select float32 actions `[B, *action_shape]`; random actions have no log-probability. See `Policy.act`."""
        lanes = len(observation)
        if step < self.spec.random_steps and not greedy:
            uniform = self.rng.uniform(-1.0, 1.0, (lanes, self.size)).astype(np.float32)
            return Action(self.from_unit(torch.from_numpy(uniform)))
        noise = torch.zeros(lanes, self.size) if greedy else self._normal(lanes)
        unit, log_density = self.draw(self._output(observation), noise)
        return Action(self.from_unit(unit), log_density.numpy())


POLICIES: dict[str, type[Policy]] = {
    "epsilon_greedy": EpsilonGreedyPolicy,
    "categorical": CategoricalPolicy,
    "gaussian": GaussianPolicy,
    "squashed_gaussian": SquashedGaussianPolicy,
}
