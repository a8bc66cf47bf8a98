"""The face all algorithms share: construction, presets, the k updates of a training step, testing, checkpoints.

A training step takes `[B, ...]` or `[k, B, ...]` and makes one counted update for each batch in it, but never
more than the Trainer's `max_steps` in all. An algorithm supplies `update` and says what experience it wants.
"""

from __future__ import annotations

import argparse
import inspect
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, ClassVar, Self, get_args, get_origin

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from actors.environments import EnvironmentSpec, OneLane, specify
from actors.evaluation import run_episodes
from actors.policies import Policy, PolicySpec
from actors.rollout import RolloutSpec
from learner.experience import LocalExperience, RemoteExperience, TransitionBatch
from learner.presets import load_preset
from replay.seeds import integer_seed, spawn_seed
from replay.server import ReplaySpec
from replay.types import ConfigurationError

TEST_EPISODES = 10


class Algorithm(pl.LightningModule):
    """A LightningModule that knows networks, batches and an experience iterable; it never steps an environment."""

    name: ClassVar[str]
    policy: Policy

    def __init__(
        self,
        env: str | EnvironmentSpec | Mapping[str, Any],
        *,
        seed: int,
        avg_reward_len: int,
        min_episode_reward: float | None = None,
    ) -> None:
        """Set up what every algorithm has; a subclass saves its hyper-parameters and makes its networks.

        Raises:
            ConfigurationError: an environment that cannot be specified, a negative seed, no episodes to average over.
        """
        super().__init__()
        if seed < 0:
            raise ConfigurationError(f"seed must not be negative, got {seed}")
        if avg_reward_len < 1:
            raise ConfigurationError(f"avg_reward_len must be positive, got {avg_reward_len}")
        self.automatic_optimization = False
        self.environment = specify(env)
        self.seed = seed
        self.experience: LocalExperience | RemoteExperience | None = None
        self.env_steps = 0
        self.run_progress: dict[str, Any] = {}
        self.recent_returns: deque[float] = deque(maxlen=avg_reward_len)
        self.return_before_episodes = min_episode_reward
        self.latest_metrics: dict[str, Tensor] = {}

    @classmethod
    def from_preset(cls, env: str, **overrides: Any) -> Self:
        """Make the algorithm with the hyper-parameters tuned for `env`.

        Raises:
            ConfigurationError: there is no preset for this environment.
        """
        preset = load_preset(cls.name, env)
        if preset is None:
            raise ConfigurationError(f"{cls.name} has no preset for {env}; {cls.__name__}({env!r}) uses its defaults")
        return cls(env, **{**preset.hyperparameters, **overrides})

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
            group.add_argument(f"--{name}", default=parameter.default, **_reading(parameter.annotation))
        return arg_parser

    @classmethod
    def from_args(cls, arguments: argparse.Namespace, **overrides: Any) -> Self:
        """Make the algorithm from what is its own in a namespace that may hold other things too."""
        own = {name: getattr(arguments, name) for name in cls.hyperparameter_types() if hasattr(arguments, name)}
        return cls(arguments.env, **{**own, **overrides})

    def save_all_hyperparameters(self) -> None:
        """Save the constructor's arguments as plain values, so that a checkpoint loads with `weights_only=True`."""
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

    def rollout_spec(self, *, num_envs: int | None = None) -> RolloutSpec:
        """Return how experience for this algorithm is made, in `num_envs` lanes."""
        raise NotImplementedError

    def replay_spec(self, *, largest_push: int) -> ReplaySpec:
        """Return how that experience is kept and drawn."""
        raise NotImplementedError

    def update(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """Make exactly one counted optimizer step on `[B, ...]`; return what to log."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return the acting module's output for observations `[B, ...]`."""
        output: Tensor = self.policy(x)
        return output

    def training_step(self, batch: TransitionBatch, _: int = 0) -> None:
        """Make one update for each of the k batches in `batch`, as far as `max_steps` allows."""
        logged: dict[str, Tensor] = {}
        for part in batch.split():
            if self.trainer.max_steps != -1 and self.trainer.global_step >= self.trainer.max_steps:
                break
            logged = self.update(part)
            self.on_update_end()
        self._log(logged)

    def on_update_end(self) -> None:
        """Tell every callback that has a hook of this name; `trainer.global_step` counts the update already."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            hook = getattr(callback, "on_update_end", None)
            if hook is not None:
                hook(self.trainer, self)

    def _log(self, logged: dict[str, Tensor]) -> None:
        rates = {f"train/{name}": value for name, value in logged.items()}
        if isinstance(self.experience, LocalExperience):
            self.env_steps = self.experience.env_steps
            self.recent_returns.extend(episode.episode_return for episode in self.experience.episodes)
            self.experience.episodes.clear()
            rate = self.policy.exploration_rate(self.env_steps)
            rates["step"] = torch.tensor(float(self.env_steps))
            if self.mean_return is not None:
                rates["rollout/ep_rew_mean"] = torch.tensor(float(self.mean_return))
                self.log("return", self.mean_return, prog_bar=True, logger=False, batch_size=1)
            if rate is not None:
                rates["rollout/exploration_rate"] = torch.tensor(rate)
        self.latest_metrics = rates
        self.log_dict(rates, batch_size=1)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch; uint8 observations stay uint8 until the network reads them."""
        if not isinstance(batch, TransitionBatch):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        return batch.map(lambda tensor: tensor.to(device, non_blocking=True))

    def train_dataloader(self) -> LocalExperience:
        """Return experience made in this process."""
        if not isinstance(self.experience, LocalExperience):
            rollout = self.rollout_spec()
            replay = self.replay_spec(largest_push=rollout.largest_push)
            self.experience = LocalExperience(self.policy, rollout, replay, length=self.hparams["batches_per_epoch"])
            self.experience.env_steps = self.env_steps
        return self.experience

    def train_batch(self) -> Iterator[TransitionBatch]:
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
    def make_environment(env_name: str, seed: int | None = None) -> OneLane:
        """Return one lane of the vector environment that workers step, as a single environment."""
        return OneLane(specify(env_name), seed)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add Squall's own counters, as plain values."""
        checkpoint["squall"] = {
            "algorithm": self.name,
            "env_steps": self.env_steps,
            "recent_returns": list(self.recent_returns),
            "run": self.run_progress,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the counters back."""
        saved = checkpoint.get("squall", {})
        self.env_steps = saved.get("env_steps", 0)
        self.recent_returns = deque(saved.get("recent_returns", ()), self.recent_returns.maxlen)
        self.run_progress = saved.get("run", {})

    def seed_networks(self) -> None:
        """Seed PyTorch for the networks about to be made, from this algorithm's seed."""
        torch.manual_seed(integer_seed(spawn_seed(self.seed, "learner")))


def _reading(annotation: Any) -> dict[str, Any]:
    """Return how argparse reads an argument annotated as `int`, `bool | None` or `Sequence[int] | None`."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    kind = next(kind for kind in kinds if kind is not NoneType)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": get_args(kind)[0], "nargs": "+"} if get_origin(kind) is Sequence else {"type": kind}
