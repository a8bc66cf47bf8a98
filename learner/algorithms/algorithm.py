"""The base class of all algorithms: construction, the k updates of a training step, logging, testing, checkpoints.

A training step receives one batch, `[B, ...]`, or k batches, `[k, B, ...]`, and makes one counted update per batch, up
to the Trainer's `max_steps`. A subclass implements `update` and describes the experience that it learns from.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from actors.environments import ContinuousActions, DiscreteActions, EnvironmentSpec, SingleEnvironment, specify
from actors.evaluation import run_episodes
from actors.networks import VectorTorso
from actors.policies import Policy, PolicySpec
from actors.rollout import RolloutSpec
from learner.batches import TrajectoryBatch, TransitionBatch
from learner.experience import Experience, LocalExperience, RemoteExperience
from learner.hyperparameters import ConfigurableModule, check_hyperparameters
from learner.optimization import clip_gradient, make_optimizer, set_learning_rate, zero_grad
from replay.errors import ConfigurationError
from replay.seeds import integer_seed, spawn_seed
from replay.server import ReplaySpec
from replay.trajectory_server import QueueSpec
from replay.types import Array

TEST_EPISODES = 10
_SUFFICIENT_RETURNS = 10_000  # number of returns whose standard deviation is accurate enough
_MIN_RELATIVE_STD = 1e-6


class Algorithm(ConfigurableModule):
    """A LightningModule over networks, batches, and an iterable of experience. Training steps never step environments.

    Attributes:
        run_defaults: run configuration keys whose defaults differ for this algorithm.
        policy: the acting module.
    """

    run_defaults: ClassVar[Mapping[str, Any]] = {}
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
        """Save all hyper-parameters and initialize the state that all algorithms share; subclasses create the networks.

        Args:
            env: environment id or specification.
            seed: seed of all random numbers.
            avg_reward_len: number of episodes in the reported mean return.
            min_episode_reward: mean return reported before the first episode ends.
            num_envs: environments that each worker steps as one vector.
            hidden_sizes: widths of the dense layers; None selects (512,) for images and otherwise (256, 256), or
                (128,) for on-policy algorithms.
            activation: activation of the dense layers, "relu" or "tanh".
            optimizer: "adam", "adamw", "rmsprop", or "sgd".
            optimizer_options: further arguments of the optimizer, such as `eps`.
            max_grad_norm: maximum gradient norm of each of the optimizer's groups; None disables clipping.
            learning_rate_schedule: "constant", "linear", or "cosine"; the last two decrease to 0.
            learning_rate_last_frame: environment step, over all workers, at which the schedule ends; `squall train`
                replaces None by the run's number of steps.
            normalize_observations: whether to standardize vector observations by running statistics of the learner's
                batches; the statistics are part of the weights.
            normalize_rewards: whether to divide rewards by the running standard deviation of the discounted return.
            clip_rewards: whether the learner's rewards are clipped to [-1, 1]; None clips rewards on Atari only.

        Raises:
            ConfigurationError: an environment that cannot be specified, or an invalid value.
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

    def _save_all_hyperparameters(self) -> None:
        """Save the arguments of all constructors as plain values, so that `weights_only=True` loads a checkpoint."""
        self.save_hyperparameters(ignore=["env"], frame=inspect.currentframe().f_back)  # type: ignore[union-attr]
        self.save_hyperparameters({"env": self.environment.plain()})

    @property
    def mean_return(self) -> float | None:
        """Mean return of the last `avg_reward_len` episodes; `min_episode_reward` before the first episode ends."""
        return float(np.mean(self.recent_returns)) if self.recent_returns else self.return_before_episodes

    @property
    def policy_spec(self) -> PolicySpec:
        """Frozen description of the acting module."""
        return self.policy.spec

    def policy_options(self, default_sizes: tuple[int, ...] = (256, 256)) -> dict[str, Any]:
        """Return the options of `PolicySpec`; subclasses add their own.

        Args:
            default_sizes: widths of the dense layers for vector observations if `hidden_sizes` is None.
        """
        sizes, default = self.hparams["hidden_sizes"], (512,) if self.environment.is_image else default_sizes
        return {
            "hidden_sizes": default if sizes is None else tuple(sizes),
            "normalize": self.hparams["normalize_observations"],
            "activation": self.hparams["activation"],
        }

    def require_action_space(self, kind: type[DiscreteActions | ContinuousActions], space: str) -> None:
        """Check that the environment's actions are of type `kind`, whose name in Gymnasium is `space`.

        Raises:
            ConfigurationError: the environment has another action space; the message contains that space.
        """
        environment = self.environment
        if not isinstance(environment.actions, kind):
            actual = environment.description.partition("actions ")[2] or environment.actions
            name = type(self).__name__
            raise ConfigurationError(f"{name} needs a {space} action space; {environment.id or 'env'} has {actual}")

    def rollout_spec(self) -> RolloutSpec:
        """Return the specification of the rollout, by which workers generate experience for this algorithm."""
        raise NotImplementedError

    def experience_spec(self) -> ReplaySpec | QueueSpec:
        """Return the specification of the replay table or trajectory queue that stores the experience."""
        raise NotImplementedError

    def make_local_experience(self) -> LocalExperience[Any]:
        """Return experience generated in this process."""
        raise NotImplementedError

    def make_remote_experience(self, client: Any) -> RemoteExperience[Any]:
        """Return experience from a server that was started from `experience_spec`."""
        raise NotImplementedError

    @property
    def clips_rewards(self) -> bool:
        """Whether the learner's rewards are clipped to [-1, 1]."""
        clip: bool | None = self.hparams["clip_rewards"]
        return self.environment.frame_stack > 1 if clip is None else clip

    def precompute_targets(self, batch: Any) -> Any:
        """Return k batches with additional tensors, which updates read and do not change.

        The prefetch thread calls this method while another thread makes updates.
        """
        return batch

    def update(self, batch: Any) -> dict[str, Tensor]:
        """Make exactly one counted optimizer step on one batch; return the metrics to log."""
        raise NotImplementedError

    def minimize(self, loss: Tensor) -> None:
        """Make one counted optimizer step on `loss`, with the scheduled learning rate and clipped gradients."""
        optimizer: Any = self.optimizers()
        zero_grad(optimizer)
        self.manual_backward(loss)
        self.apply_gradients()

    def apply_gradients(self) -> None:
        """Make one counted optimizer step with the current gradients of the parameters; see `minimize`."""
        optimizer: Any = self.optimizers()
        last_frame = self.hparams["learning_rate_last_frame"]
        if last_frame is not None:
            set_learning_rate(optimizer, self.hparams["learning_rate_schedule"], self.env_steps, last_frame)
        if self.hparams["max_grad_norm"] is not None:
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            if scaler is not None:
                scaler.unscale_(optimizer.optimizer)  # in float16, gradients of the scaled loss
            for group in optimizer.param_groups:
                clip_gradient(group["params"], self.hparams["max_grad_norm"])
        optimizer.step()

    def make_optimizer(self, *groups: tuple[Iterable[nn.Parameter], float]) -> torch.optim.Optimizer:
        """Return the configured optimizer over groups of parameters, each with its learning rate."""
        return make_optimizer(self.hparams["optimizer"], *groups, options=self.hparams["optimizer_options"])

    def _scaled(self, reward: Tensor) -> Tensor:
        """Return rewards divided by the standard deviation of the discounted return if `normalize_rewards` is set."""
        return reward / self.return_std if self.hparams["normalize_rewards"] else reward

    def _update_observation_statistics(self, observation: Tensor) -> None:
        """Update the running statistics of all networks with observations `[B, ...]`."""
        if self.hparams["normalize_observations"] and len(observation):
            for module in self.modules():
                if isinstance(module, VectorTorso):
                    module.observe(observation)

    def _update_return_statistics(self) -> None:
        """Copy the standard deviation of the discounted return from the experience.

        A recreated server has received few returns. The old deviation is more accurate until the server has received as
        many returns as the previous server, or `_SUFFICIENT_RETURNS`.
        """
        assert self.experience is not None
        returns = self.experience.returns
        # The deviation of returns that are all equal is rounding error.
        varies = returns.std > _MIN_RELATIVE_STD * max(abs(returns.mean), 1e-30)
        if returns.count >= min(self._returns_seen, _SUFFICIENT_RETURNS) and varies:
            self.return_std.fill_(returns.std)
            self._returns_seen = returns.count

    def forward(self, x: Tensor) -> Tensor:
        """Return the acting module's output for observations `[B, ...]`."""
        output: Tensor = self.policy(x)
        return output

    def training_step(self, batch: TransitionBatch | TrajectoryBatch, _: int = 0) -> None:
        """Make one update per batch in `batch`, up to the Trainer's `max_steps`.

        The last update's metrics are logged every `log_every_n_steps` training steps, and on the first and last
        training step of an epoch and of the fit. They are not logged more often, because a call of Lightning's `log`
        takes half as long as an update of a small network.
        """
        metrics: dict[str, Tensor] = {}
        if isinstance(self.experience, LocalExperience):
            self.env_steps = self.experience.env_steps
        if self.hparams["normalize_rewards"]:
            self._update_return_statistics()
        for part in batch._replace(reward=self._scaled(batch.reward)).split():
            if self.trainer.max_steps != -1 and self.trainer.global_step >= self.trainer.max_steps:
                break
            metrics = self.update(part)
            self._update_observation_statistics(part.visited)
            self.on_update_end()
        self._log(metrics)

    def on_update_end(self) -> None:
        """Call the hook `on_update_end` of every callback that has one; `trainer.global_step` includes the update."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            hook = getattr(callback, "on_update_end", None)
            if hook is not None:
                hook(self.trainer, self)

    def _log(self, metrics: dict[str, Tensor]) -> None:
        self.latest_metrics = {f"train/{name}": value for name, value in metrics.items()}
        if isinstance(self.experience, LocalExperience):
            self.recent_returns.extend(episode.episode_return for episode in self.experience.episodes)
            self.experience.episodes.clear()
        if isinstance(self.experience, RemoteExperience):
            return  # the learner process reports `latest_metrics` and has no logger
        if self._log_is_due:
            self.log_dict({**self.latest_metrics, **self._local_metrics()}, batch_size=1)

    @property
    def _log_is_due(self) -> bool:
        """Whether the logger records this training step, or a callback may read the metrics after it."""
        trainer, loop = self.trainer, self.trainer.fit_loop
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        recorded = every > 0 and (loop.total_batch_idx + 1) % every == 0
        ends = trainer.is_last_batch or trainer.should_stop or trainer.global_step == trainer.max_steps
        return recorded or ends or loop.batch_idx == 0

    def _local_metrics(self) -> dict[str, Tensor]:
        """Log the return to the progress bar; return the other metrics of experience generated in this process."""
        if not isinstance(self.experience, LocalExperience):
            return {}
        metrics = {"step": torch.tensor(float(self.env_steps))}
        rate, mean_return = self.policy_spec.exploration_rate(self.env_steps), self.mean_return
        if mean_return is not None:
            metrics["rollout/ep_rew_mean"] = torch.tensor(float(mean_return))
            self.log("return", mean_return, prog_bar=True, logger=False, batch_size=1)
        if rate is not None:
            metrics["rollout/exploration_rate"] = torch.tensor(rate)
        return metrics

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch; uint8 observations remain uint8 until the network reads them."""
        if not isinstance(batch, TransitionBatch | TrajectoryBatch):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        return batch.map(lambda tensor: tensor.to(device, non_blocking=True))

    def train_dataloader(self) -> LocalExperience[Any]:
        """Return experience generated in this process."""
        if not isinstance(self.experience, LocalExperience):
            self.experience = self.make_local_experience()
            self.experience.env_steps = self.env_steps
        return self.experience

    def train_batch(self) -> Iterator[Any]:
        """Yield an endless series of batches generated in this process."""
        experience = self.train_dataloader()
        while True:
            yield experience.next()

    def test_dataloader(self) -> list[int]:
        """Return one item, because a test consists of one step, which plays whole episodes."""
        return [0]

    def test_step(self, *_: Any) -> dict[str, float]:
        """Play `TEST_EPISODES` greedy episodes; log `test/mean_reward` and return the mean and deviation."""
        results = run_episodes(self.policy, TEST_EPISODES, spawn_seed(self.seed, "test"))
        returns = [result.episode_return for result in results]
        self.log("test/mean_reward", float(np.mean(returns)), batch_size=1)
        return {"test/mean_reward": float(np.mean(returns)), "test/std_reward": float(np.std(returns))}

    @staticmethod
    def make_environment(env_name: str, seed: int | None = None) -> SingleEnvironment:
        """Return a single environment with the same preprocessing as one lane of the workers' vector environments."""
        return SingleEnvironment(specify(env_name), seed)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add Squall's counters to a checkpoint, as plain values."""
        checkpoint["squall"] = {
            "algorithm": self.name,
            "env_steps": self.env_steps,
            "recent_returns": list(self.recent_returns),
            "returns_seen": self._returns_seen,
            "run": self.run_progress,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore Squall's counters from a checkpoint."""
        saved = checkpoint.get("squall", {})
        self.env_steps = saved.get("env_steps", 0)
        self.recent_returns = deque(saved.get("recent_returns", ()), self.recent_returns.maxlen)
        self.run_progress = saved.get("run", {})
        self._returns_seen = saved.get("returns_seen", 0)

    def run_n_episodes(self, env: SingleEnvironment, n_epsiodes: int = 1, n_episodes: int | None = None) -> list[float]:
        """Play whole greedy episodes in `env`; return their returns.

        Args:
            env: environment from `make_environment`.
            n_epsiodes: number of episodes, in the reference page's spelling.
            n_episodes: number of episodes; takes precedence over `n_epsiodes`.
        """
        return play_episodes(env, n_epsiodes if n_episodes is None else n_episodes, self.greedy_action)

    def greedy_action(self, observation: Array) -> Array:
        """Return the greedy action for one observation."""
        action: Array = self.policy.act(observation[None], step=0, greedy=True).action[0]
        return action

    def seed_networks(self) -> None:
        """Seed PyTorch from this algorithm's seed, before the networks are created."""
        torch.manual_seed(integer_seed(spawn_seed(self.seed, "learner")))


def play_episodes(env: SingleEnvironment, episodes: int, act: Callable[[Array], Array]) -> list[float]:
    """Play whole episodes in `env` with the actions that `act` returns for observations; return their returns."""
    returns = []
    for _ in range(episodes):
        observation, _ = env.reset()
        total, over = 0.0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(act(observation))
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    return returns
