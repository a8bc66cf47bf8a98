"""The face all algorithms share: construction, presets, the k updates of a training step, testing, checkpoints.

A training step takes `[B, ...]` or `[k, B, ...]` and makes one counted update for each batch in it, but never
more than the Trainer's `max_steps` in all. An algorithm supplies `update` and says what experience it wants.
"""

from __future__ import annotations

import argparse
import inspect
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from actors.environments import ContinuousActions, DiscreteActions, EnvironmentSpec, SingleEnvironment, specify
from actors.evaluation import run_episodes
from actors.networks import VectorTorso
from actors.policies import Policy, PolicySpec
from actors.rollout import RolloutSpec
from learner.batches import TrajectoryBatch, TransitionBatch
from learner.experience import Experience, LocalExperience, RemoteExperience
from learner.hyperparameters import argparse_options, check_hyperparameters
from learner.optimization import (
    clip_gradient,
    make_optimizer,
    set_learning_rate,
    zero_grad,
)
from learner.presets import load_preset
from replay.errors import ConfigurationError
from replay.seeds import integer_seed, spawn_seed
from replay.server import ReplaySpec
from replay.trajectory_server import QueueSpec
from replay.types import Array

TEST_EPISODES = 10
_ENOUGH_RETURNS = 10_000
_LEAST_RELATIVE_STD = 1e-6


class Algorithm(pl.LightningModule):
    """A LightningModule that knows networks, batches and an experience iterable; it never steps an environment."""

    name: ClassVar[str]
    run_defaults: ClassVar[Mapping[str, Any]] = {}  # keys of the run configuration that differ for this algorithm
    policy: Policy

    def __init__(
        self,
        env: str | EnvironmentSpec | Mapping[str, Any],
        *,
        seed: int = 123,
        avg_reward_len: int = 100,
        min_episode_reward: float | None = None,
        num_envs: int = 1,
        hidden_sizes: Sequence[int] | None = None,
        activation: str = "relu",
        optimizer: str = "adam",
        optimizer_options: dict[str, Any] | None = None,
        max_grad_norm: float | None = None,
        learning_rate_schedule: str = "constant",
        learning_rate_last_frame: int | None = None,
        normalize_observations: bool = False,
        normalize_rewards: bool = False,
        clip_rewards: bool | None = None,
    ) -> None:
        """Set up what every algorithm has, and save all hyper-parameters; a subclass makes its networks.

        Args:
            env: environment id, or the specification of one.
            seed: of everything random.
            avg_reward_len: episodes in the reported mean return.
            min_episode_reward: return reported before the first episode has ended.
            num_envs: environments stepped side by side by each worker.
            hidden_sizes: widths of the dense layers; None gives (512,) for images and otherwise (256, 256), or
                (128,) for on-policy algorithms.
            activation: of the dense layers, "relu" or "tanh".
            optimizer: one of "adam", "adamw", "rmsprop", "sgd".
            optimizer_options: more arguments of it, such as `eps`.
            max_grad_norm: longest gradient, of each of the optimizer's groups; None does not clip.
            learning_rate_schedule: "constant", "linear" or "cosine", the last two down to 0.
            learning_rate_last_frame: environment step, over all workers, at which the schedule ends; `squall train`
                takes the run's steps for None.
            normalize_observations: shift and scale vector observations by running statistics of what the learner
                saw; they are part of the weights.
            normalize_rewards: divide rewards by the running deviation of the discounted return.
            clip_rewards: whether the learner sees rewards clipped to [-1, 1]; None does so on Atari.

        Raises:
            ConfigurationError: an environment that cannot be specified, or a value that cannot work.
        """
        super().__init__()
        self.environment = specify(env)
        self._save_all_hyperparameters()
        check_hyperparameters(self.hparams)
        self.automatic_optimization = False
        self.seed = seed
        self.experience: Experience[Any] | None = None
        self.env_steps = 0
        self.run_progress: dict[str, Any] = {}
        self.recent_returns: deque[float] = deque(maxlen=avg_reward_len)
        self.return_before_episodes = min_episode_reward
        self.latest_metrics: dict[str, Tensor] = {}
        self.return_std: Tensor
        self.register_buffer("return_std", torch.ones(()))
        self._returns_seen = 0

    @classmethod
    def from_preset(cls, env: str, **overrides: Any) -> Self:
        """Make the algorithm with the hyper-parameters tuned for `env`.

        Raises:
            ConfigurationError: there is no preset for this environment.
        """
        preset = load_preset(cls.name, env)
        if preset is None:
            raise ConfigurationError(f"{cls.name} has no preset for {env}; {cls.__name__}({env!r}) uses its defaults")
        values = {**preset.hyperparameters, **overrides}
        if values.get("learning_rate_schedule", "constant") != "constant":
            values.setdefault("learning_rate_last_frame", preset.run["steps"])
        return cls(env, **values)

    @classmethod
    def hyperparameter_types(cls) -> dict[str, inspect.Parameter]:
        """Return the constructor's parameters but for the environment, those of its base classes included."""
        parameters: dict[str, inspect.Parameter] = {}
        for base in reversed(cls.__mro__):
            if issubclass(base, Algorithm) and "__init__" in vars(base):
                parameters |= inspect.signature(base.__init__, eval_str=True).parameters
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return {name: p for name, p in parameters.items() if name not in ("self", "env") and p.kind in named}

    @classmethod
    def add_model_specific_args(cls, arg_parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add the constructor's parameters to `arg_parser`, named and defaulted as there."""
        group = arg_parser.add_argument_group(cls.__name__)
        group.add_argument("--env", required=True, help="environment id")
        for name, parameter in cls.hyperparameter_types().items():
            group.add_argument(f"--{name}", default=parameter.default, **argparse_options(parameter.annotation))
        return arg_parser

    @classmethod
    def from_args(cls, arguments: argparse.Namespace, **overrides: Any) -> Self:
        """Make the algorithm from what is its own in a namespace that may hold other things too."""
        own = {name: getattr(arguments, name) for name in cls.hyperparameter_types() if hasattr(arguments, name)}
        return cls(arguments.env, **{**own, **overrides})

    def _save_all_hyperparameters(self) -> None:
        """Save the constructors' arguments as plain values, so that a checkpoint loads with `weights_only=True`."""
        self.save_hyperparameters(ignore=["env"], frame=inspect.currentframe().f_back)  # type: ignore[union-attr]
        self.save_hyperparameters({"env": self.environment.plain()})

    @property
    def mean_return(self) -> float | None:
        """Mean return of the last `avg_reward_len` episodes; before the first has ended `min_episode_reward`."""
        return float(np.mean(self.recent_returns)) if self.recent_returns else self.return_before_episodes

    @property
    def policy_spec(self) -> PolicySpec:
        """The frozen description of the acting module."""
        return self.policy.spec

    def policy_options(self, default_sizes: tuple[int, ...] = (256, 256)) -> dict[str, Any]:
        """Return the options of `PolicySpec`; a subclass adds its own.

        Args:
            default_sizes: widths of the dense layers, unless said otherwise, where observations are no images.
        """
        sizes, default = self.hparams["hidden_sizes"], (512,) if self.environment.is_image else default_sizes
        return {
            "hidden_sizes": default if sizes is None else tuple(sizes),
            "normalize": self.hparams["normalize_observations"],
            "activation": self.hparams["activation"],
        }

    def require_action_space(self, kind: type[DiscreteActions | ContinuousActions], space: str) -> None:
        """Refuse an environment whose actions are not of a `kind`, which Gymnasium calls a `space`.

        Raises:
            ConfigurationError: naming the space that the environment has.
        """
        environment = self.environment
        if not isinstance(environment.actions, kind):
            has = environment.description.partition("actions ")[2] or environment.actions
            name = type(self).__name__
            raise ConfigurationError(f"{name} needs a {space} action space; {environment.id or 'env'} has {has}")

    def rollout_spec(self) -> RolloutSpec:
        """Return how experience for this algorithm is made."""
        raise NotImplementedError

    def experience_spec(self) -> ReplaySpec | QueueSpec:
        """Return how that experience is kept and handed out."""
        raise NotImplementedError

    def make_local_experience(self) -> LocalExperience[Any]:
        """Return experience made in this process."""
        raise NotImplementedError

    def make_remote_experience(self, client: Any) -> RemoteExperience[Any]:
        """Return experience from a server, of the kind that `experience_spec` describes."""
        raise NotImplementedError

    @property
    def clips_rewards(self) -> bool:
        """Whether the learner sees rewards clipped to [-1, 1]."""
        clip: bool | None = self.hparams["clip_rewards"]
        return self.environment.frame_stack > 1 if clip is None else clip

    def precompute_targets(self, batch: Any) -> Any:
        """Add to k batches what their updates need and do not change; called in another thread, beside updates."""
        return batch

    def update(self, batch: Any) -> dict[str, Tensor]:
        """Make exactly one counted optimizer step on one batch; return what to log."""
        raise NotImplementedError

    def minimize(self, loss: Tensor) -> None:
        """Make one counted optimizer step, with the learning rate and the longest gradient that are due."""
        optimizer: Any = self.optimizers()
        zero_grad(optimizer)
        self.manual_backward(loss)
        self.apply_gradients()

    def apply_gradients(self) -> None:
        """Make one counted optimizer step by the gradients that the parameters hold; see `minimize`."""
        optimizer: Any = self.optimizers()
        last_frame = self.hparams["learning_rate_last_frame"]
        if last_frame is not None:
            set_learning_rate(optimizer, self.hparams["learning_rate_schedule"], self.env_steps, last_frame)
        if self.hparams["max_grad_norm"] is not None:
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            if scaler is not None:
                scaler.unscale_(optimizer.optimizer)  # with float16 gradients come scaled
            for group in optimizer.param_groups:
                clip_gradient(group["params"], self.hparams["max_grad_norm"])
        optimizer.step()

    def make_optimizer(self, *groups: tuple[Iterable[nn.Parameter], float]) -> torch.optim.Optimizer:
        """Return the configured optimizer over groups of parameters, each with their learning rate."""
        return make_optimizer(self.hparams["optimizer"], *groups, options=self.hparams["optimizer_options"])

    def _scaled(self, reward: Tensor) -> Tensor:
        """Return rewards divided by the deviation of the discounted return, if they are to be."""
        return reward / self.return_std if self.hparams["normalize_rewards"] else reward

    def _observe(self, observation: Tensor) -> None:
        """Take observations `[B, ...]` into the running statistics of every network that has some."""
        if self.hparams["normalize_observations"] and len(observation):
            for module in self.modules():
                if isinstance(module, VectorTorso):
                    module.observe(observation)

    def _update_return_statistics(self) -> None:
        """Take over what experience says of the discounted return; a new server's few figures are not yet better."""
        assert self.experience is not None
        returns = self.experience.returns
        # Returns that are all alike have a deviation that is rounding alone.
        tells = returns.std > _LEAST_RELATIVE_STD * max(abs(returns.mean), 1e-30)
        if returns.count >= min(self._returns_seen, _ENOUGH_RETURNS) and tells:
            self.return_std.fill_(returns.std)
            self._returns_seen = returns.count

    def forward(self, x: Tensor) -> Tensor:
        """Return the acting module's output for observations `[B, ...]`."""
        output: Tensor = self.policy(x)
        return output

    def training_step(self, batch: TransitionBatch | TrajectoryBatch, _: int = 0) -> None:
        """Make one update for each of the k batches in `batch`, as far as `max_steps` allows.

        The last update's figures are logged as often as the Trainer's `log_every_n_steps` says, and at both ends of an
        epoch and at the fit's: Lightning's log takes half as long as a small network's update.
        """
        logged: dict[str, Tensor] = {}
        if isinstance(self.experience, LocalExperience):
            self.env_steps = self.experience.env_steps
        if self.hparams["normalize_rewards"]:
            self._update_return_statistics()
        for part in batch._replace(reward=self._scaled(batch.reward)).split():
            if self.trainer.max_steps != -1 and self.trainer.global_step >= self.trainer.max_steps:
                break
            logged = self.update(part)
            self._observe(part.visited)
            self.on_update_end()
        self._log(logged)

    def on_update_end(self) -> None:
        """Tell every callback that has a hook of this name; `trainer.global_step` counts the update already."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            hook = getattr(callback, "on_update_end", None)
            if hook is not None:
                hook(self.trainer, self)

    def _log(self, logged: dict[str, Tensor]) -> None:
        self.latest_metrics = {f"train/{name}": value for name, value in logged.items()}
        if isinstance(self.experience, LocalExperience):
            self.recent_returns.extend(episode.episode_return for episode in self.experience.episodes)
            self.experience.episodes.clear()
        if isinstance(self.experience, RemoteExperience):
            return  # the learner reports them, and nobody else listens
        if self._log_is_due:
            self.log_dict({**self.latest_metrics, **self._local_figures()}, batch_size=1)

    @property
    def _log_is_due(self) -> bool:
        """Whether the Trainer's logger takes this training step's figures, or somebody may look at them after it."""
        trainer, steps = self.trainer, self.trainer.fit_loop
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        taken = every > 0 and (steps.total_batch_idx + 1) % every == 0
        ends = trainer.is_last_batch or trainer.should_stop or trainer.global_step == trainer.max_steps
        return taken or ends or steps.batch_idx == 0

    def _local_figures(self) -> dict[str, Tensor]:
        """Log the return where a progress bar shows it; return what else there is to log of experience made here."""
        if not isinstance(self.experience, LocalExperience):
            return {}
        figures = {"step": torch.tensor(float(self.env_steps))}
        rate, mean_return = self.policy_spec.exploration_rate(self.env_steps), self.mean_return
        if mean_return is not None:
            figures["rollout/ep_rew_mean"] = torch.tensor(float(mean_return))
            self.log("return", mean_return, prog_bar=True, logger=False, batch_size=1)
        if rate is not None:
            figures["rollout/exploration_rate"] = torch.tensor(rate)
        return figures

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch; uint8 observations stay uint8 until the network reads them."""
        if not isinstance(batch, TransitionBatch | TrajectoryBatch):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        return batch.map(lambda tensor: tensor.to(device, non_blocking=True))

    def train_dataloader(self) -> LocalExperience[Any]:
        """Return experience made in this process."""
        if not isinstance(self.experience, LocalExperience):
            self.experience = self.make_local_experience()
            self.experience.env_steps = self.env_steps
        return self.experience

    def train_batch(self) -> Iterator[Any]:
        """Yield batches made in this process, without end."""
        experience = self.train_dataloader()
        while True:
            yield experience.next()

    def test_dataloader(self) -> list[int]:
        """Return one item: a test is a single step that plays whole episodes."""
        return [0]

    def test_step(self, *_: Any) -> dict[str, float]:
        """Play 10 greedy episodes; log `test/mean_reward` and return the figures."""
        results = run_episodes(self.policy, TEST_EPISODES, spawn_seed(self.seed, "test"))
        returns = [result.episode_return for result in results]
        self.log("test/mean_reward", float(np.mean(returns)), batch_size=1)
        return {"test/mean_reward": float(np.mean(returns)), "test/std_reward": float(np.std(returns))}

    @staticmethod
    def make_environment(env_name: str, seed: int | None = None) -> SingleEnvironment:
        """Return one lane of the vector environment that workers step, as a single environment."""
        return SingleEnvironment(specify(env_name), seed)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add Squall's own counters, as plain values."""
        checkpoint["squall"] = {
            "algorithm": self.name,
            "env_steps": self.env_steps,
            "recent_returns": list(self.recent_returns),
            "returns_seen": self._returns_seen,
            "run": self.run_progress,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the counters back."""
        saved = checkpoint.get("squall", {})
        self.env_steps = saved.get("env_steps", 0)
        self.recent_returns = deque(saved.get("recent_returns", ()), self.recent_returns.maxlen)
        self.run_progress = saved.get("run", {})
        self._returns_seen = saved.get("returns_seen", 0)

    def run_n_episodes(self, env: SingleEnvironment, n_epsiodes: int = 1, n_episodes: int | None = None) -> list[float]:
        """Play whole greedy episodes in `env`; return their returns.

        Args:
            env: made by `make_environment`.
            n_epsiodes: how many, as the reference page spells it.
            n_episodes: how many; goes before the other.
        """
        return play_episodes(env, n_epsiodes if n_episodes is None else n_episodes, self.greedy_action)

    def greedy_action(self, observation: Array) -> Array:
        """Return the best action for one observation."""
        action: Array = self.policy.act(observation[None], step=0, greedy=True).action[0]
        return action

    def seed_networks(self) -> None:
        """Seed PyTorch for the networks about to be made, from this algorithm's seed."""
        torch.manual_seed(integer_seed(spawn_seed(self.seed, "learner")))


def play_episodes(env: SingleEnvironment, episodes: int, choose: Callable[[Array], Array]) -> list[float]:
    """Play whole episodes in `env` with the actions that `choose` takes; return their returns."""
    returns = []
    for _ in range(episodes):
        observation, _ = env.reset()
        total, over = 0.0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(choose(observation))
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    return returns


def warn_unused(module: Algorithm, why: str, *names: str) -> None:
    """Warn of hyper-parameters that were changed though they do nothing, `why` says it."""
    parameters = module.hyperparameter_types()
    changed = [name for name in names if module.hparams[name] != parameters[name].default]
    if changed:
        warnings.warn(f"{', '.join(changed)} do nothing in {type(module).__name__}: {why}", stacklevel=3)
