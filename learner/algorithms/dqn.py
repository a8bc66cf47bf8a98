"""DQN (Mnih et al. 2013, https://arxiv.org/abs/1312.5602; 2015, https://doi.org/10.1038/nature14236).

This is Q-learning with:
- a neural network for the action values, convolutional for images;
- replay: updates on transitions drawn uniformly from the last `replay_size` steps;
- a target network, copied from the online network every `sync_rate` updates;
- the TD error clipped to [-1, 1], by way of the Huber loss.

Where it departs from the papers, and why:
- Adam (Kingma & Ba 2015) instead of RMSProp, as all of today's implementations and the reference page do.
- Rewards are clipped to [-1, 1] on Atari only: elsewhere it would change the task.
- `n_steps` > 1 gives n-step targets (Sutton 1988), with gamma**n and truncation right.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from actors.environments import DiscreteActions, EnvironmentSpec, OneLane
from actors.policies import EpsilonGreedyPolicy, EpsilonSchedule, PolicySpec
from actors.rollout import RolloutSpec
from learner.algorithms.algorithm import Algorithm
from learner.experience import TransitionBatch
from learner.optimization import OPTIMIZERS, make_optimizer
from learner.value_learning import huber, q_learning
from replay.seeds import spawn_seed
from replay.server import ReplaySpec
from replay.table import TableSpec
from replay.types import ConfigurationError


class DQN(Algorithm):
    """Deep Q-network.

    Example:
        trainer = Trainer(max_steps=30_000)
        trainer.fit(DQN.from_preset("CartPole-v1"))
    """

    name: ClassVar[str] = "dqn"
    policy: EpsilonGreedyPolicy

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
        updates_per_step: float = 1.0,
        updates_per_training_step: int = 1,
        num_envs: int = 1,
        segment_length: int | None = None,
        hidden_sizes: Sequence[int] | None = None,
        optimizer: str = "adam",
        max_grad_norm: float | None = None,
        clip_rewards: bool | None = None,
        eps_ladder: bool = False,
    ) -> None:
        """Make the networks. The defaults are the reference page's, which are tuned for Pong.

        Args:
            env: environment id, or the specification of one.
            eps_start: epsilon at the first step.
            eps_end: epsilon from `eps_last_frame` on.
            eps_last_frame: environment step, over all workers, at which epsilon stops falling.
            sync_rate: updates between copies of the online network to the target network.
            gamma: discount of one step.
            learning_rate: of the optimizer.
            batch_size: transitions in an update.
            replay_size: transitions the replay holds.
            warm_start_size: steps before the first update.
            avg_reward_len: episodes in the reported mean return.
            min_episode_reward: return reported before the first episode has ended.
            seed: of everything random.
            batches_per_epoch: updates in a Lightning epoch.
            n_steps: steps summed into a target before it bootstraps.
            updates_per_step: updates for each environment step.
            updates_per_training_step: k, the updates made in one Lightning `training_step`.
            num_envs: environments stepped side by side by each worker.
            segment_length: rows a worker collects in each environment before it sends them; None gives 64 for
                images and 16 otherwise.
            hidden_sizes: widths of the dense layers; None gives (512,) for images and (256, 256) otherwise.
            optimizer: one of "adam", "adamw", "rmsprop", "sgd".
            max_grad_norm: longest gradient; None does not clip.
            clip_rewards: whether the learner sees rewards clipped to [-1, 1]; None does so on Atari.
            eps_ladder: constant epsilons spread over the workers instead of the schedule.

        Raises:
            ConfigurationError: a value that cannot work, or an action space that is not Discrete.
        """
        super().__init__(env, seed=seed, avg_reward_len=avg_reward_len, min_episode_reward=min_episode_reward)
        self.save_all_hyperparameters()
        _check(self.environment, self.hparams)
        self.seed_networks()
        self.policy = EpsilonGreedyPolicy(PolicySpec("epsilon_greedy", self.environment, **self.policy_options()))
        self.policy.begin(spawn_seed(seed, "policy"))
        self.target_network = copy.deepcopy(self.policy.q_network).requires_grad_(False)
        # Sizes that do not fit each other are refused here, not at the first batch.
        self.replay_spec(largest_push=self.rollout_spec().largest_push)

    def policy_options(self) -> dict[str, Any]:
        """Return the options of `PolicySpec`; a variant adds its own."""
        hparams = self.hparams
        default = (512,) if self.environment.is_image else (256, 256)
        return {
            "hidden_sizes": default if hparams["hidden_sizes"] is None else tuple(hparams["hidden_sizes"]),
            "exploration": EpsilonSchedule(
                hparams["eps_start"], hparams["eps_end"], hparams["eps_last_frame"], hparams["eps_ladder"]
            ),
        }

    @property
    def q_network(self) -> nn.Module:
        """The online network, which also acts."""
        return self.policy.q_network

    def rollout_spec(self, *, num_envs: int | None = None) -> RolloutSpec:
        """See `Algorithm.rollout_spec`."""
        hparams, image = self.hparams, self.environment.is_image
        clip = hparams["clip_rewards"]
        return RolloutSpec(
            policy=self.policy_spec,
            num_envs=num_envs or hparams["num_envs"],
            segment_length=hparams["segment_length"] or (64 if image else 16),
            n_steps=hparams["n_steps"],
            gamma=hparams["gamma"],
            clip_rewards=self.environment.frame_stack > 1 if clip is None else clip,
            run_seed=self.seed,
        )

    def replay_spec(self, *, largest_push: int) -> ReplaySpec:
        """See `Algorithm.replay_spec`."""
        hparams = self.hparams
        return ReplaySpec(
            table=TableSpec(self.rollout_spec().layout, hparams["replay_size"]),
            samples_per_insert=hparams["batch_size"] * hparams["updates_per_step"],
            minimum_size=hparams["warm_start_size"],
            largest_push=largest_push,
            batch_size=hparams["batch_size"],
            batches_per_sample=hparams["updates_per_training_step"],
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the online network."""
        return make_optimizer(self.hparams["optimizer"], self.q_network.parameters(), self.hparams["learning_rate"])

    def td_error(self, batch: TransitionBatch) -> Tensor:
        """Return the TD errors `[B]` of a batch; the idea that a variant of DQN changes."""
        q_tm1 = self.q_network(batch.observation)
        with torch.no_grad():
            q_t = self.target_network(batch.next_observation)
        return q_learning(q_tm1, batch.action, batch.reward, batch.discount, q_t)

    def loss(self, batch: TransitionBatch) -> Tensor:
        """Return the scalar loss of a batch."""
        return huber(self.td_error(batch)).mean()

    def update(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """See `Algorithm.update`."""
        optimizer = self.optimizers()
        loss = self.loss(batch)
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss)
        if self.hparams["max_grad_norm"] is not None:
            nn.utils.clip_grad_norm_(self.q_network.parameters(), self.hparams["max_grad_norm"])
        optimizer.step()  # type: ignore[union-attr]
        if self.trainer.global_step % self.hparams["sync_rate"] == 0:
            self.target_network.load_state_dict(self.q_network.state_dict())
        return {"loss": loss.detach()}

    def run_n_episodes(self, env: OneLane, n_epsiodes: int = 1, epsilon: float = 1.0) -> list[float]:
        """Play whole episodes in `env` with a constant epsilon; return their returns."""
        returns = []
        for _ in range(n_epsiodes):
            observation, _ = env.reset()
            total, over = 0.0, False
            while not over:
                explore = self.policy.rng.random() < epsilon
                action = self.policy.act(observation[None], step=0, greedy=True).action[0]
                if explore:
                    action = self.policy.rng.integers(self.policy.actions)
                observation, reward, terminated, truncated, _ = env.step(action)
                total, over = total + float(reward), terminated or truncated
            returns.append(total)
        return returns


def _check(environment: EnvironmentSpec, hparams: Mapping[str, Any]) -> None:
    if not isinstance(environment.actions, DiscreteActions):
        space = environment.description.partition("actions ")[2] or environment.actions
        raise ConfigurationError(f"DQN needs a Discrete action space; {environment.id or 'env'} has {space}")
    for name in (
        "sync_rate", "learning_rate", "batch_size", "replay_size", "warm_start_size", "batches_per_epoch",
        "n_steps", "updates_per_step", "updates_per_training_step", "num_envs", "segment_length", "max_grad_norm",
    ):  # fmt: skip
        value = hparams[name]
        if value is not None and not (value > 0 and np.isfinite(value)):
            raise ConfigurationError(f"{name} must be positive, got {value}")
    if not 0.0 <= hparams["gamma"] <= 1.0:
        raise ConfigurationError(f"gamma must lie in [0, 1], got {hparams['gamma']}")
    if hparams["optimizer"] not in OPTIMIZERS:
        raise ConfigurationError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {hparams['optimizer']!r}")
