"""DQN (Mnih et al. 2013, https://arxiv.org/abs/1312.5602; 2015, https://doi.org/10.1038/nature14236).

This is Q-learning with:
- a neural network for the action values, convolutional for images;
- replay: updates on transitions sampled uniformly from the last `replay_size` steps;
- a target network, copied from the online network every `sync_rate` updates;
- the TD error clipped to [-1, 1] by the Huber loss.

Where it departs from the papers, and why:
- Adam (Kingma & Ba 2015) instead of RMSProp, like all current implementations and the reference page.
- Rewards are clipped to [-1, 1] on Atari only: elsewhere clipping would change the task.
- `n_steps` > 1 gives n-step targets (Sutton 1988), with gamma**n and correct bootstrapping at truncation.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from actors.environments import DiscreteActions, EnvironmentSpec, SingleEnvironment
from actors.policies import EpsilonGreedyPolicy, EpsilonSchedule, PolicySpec
from learner.algorithms.algorithm import play_episodes
from learner.algorithms.off_policy import OffPolicyAlgorithm
from learner.batches import TransitionBatch
from learner.value_learning import huber, q_learning
from replay.seeds import spawn_seed
from replay.types import Array

_MIN_CALLS_PER_TARGET_SYNC = 4  # with fewer sample calls between syncs, most precomputed values would be stale


class DQN(OffPolicyAlgorithm):
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
        eps_ladder: bool = False,
        **kwargs: Any,
    ) -> None:
        """Create the networks. The defaults are those of the reference page, which are tuned for Pong.

        Args:
            env: environment id or specification.
            eps_start: epsilon at the first step.
            eps_end: epsilon from `eps_last_frame` on.
            eps_last_frame: environment step, over all workers, at which epsilon reaches `eps_end`.
            sync_rate: updates between copies of the online network to the target network.
            gamma: discount of one step.
            learning_rate: learning rate of the optimizer.
            batch_size: transitions in an update.
            replay_size: capacity of the replay table, in transitions.
            warm_start_size: environment steps before the first update.
            avg_reward_len: number of episodes in the reported mean return.
            min_episode_reward: mean return reported before the first episode ends.
            seed: seed of all random numbers.
            batches_per_epoch: updates in a Lightning epoch.
            n_steps: rewards summed in a target before it bootstraps.
            eps_ladder: whether each worker has a constant epsilon of its own (Ape-X) instead of the schedule.
            kwargs: arguments of `OffPolicyAlgorithm` and `Algorithm`.

        Raises:
            ConfigurationError: an invalid value, or an action space that is not Discrete.
        """
        super().__init__(env, seed=seed, avg_reward_len=avg_reward_len, min_episode_reward=min_episode_reward, **kwargs)
        self.require_action_space(DiscreteActions, "Discrete")
        self.seed_networks()
        self.policy = EpsilonGreedyPolicy(PolicySpec("epsilon_greedy", self.environment, **self.policy_options()))
        self.policy.begin(spawn_seed(seed, "policy"))
        self.target_network = copy.deepcopy(self.policy.q_network).requires_grad_(False)
        self._target_syncs = 0  # completed copies of the online network to the target network
        self.experience_spec()  # raises ConfigurationError if the sizes contradict each other

    def policy_options(self, default_sizes: tuple[int, ...] = (256, 256)) -> dict[str, Any]:
        """See `Algorithm.policy_options`."""
        hparams = self.hparams
        exploration = EpsilonSchedule(
            hparams["eps_start"], hparams["eps_end"], hparams["eps_last_frame"], hparams["eps_ladder"]
        )
        return {**super().policy_options(default_sizes), "exploration": exploration}

    @property
    def q_network(self) -> nn.Module:
        """The online network, which is also the acting network."""
        return self.policy.q_network

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the online network."""
        return self.make_optimizer((self.q_network.parameters(), self.hparams["learning_rate"]))

    def td_error(self, batch: TransitionBatch) -> Tensor:
        """Return the TD errors `[B]` of a batch. Variants of DQN override this method to change the target."""
        q_tm1 = self.q_network(batch.observation)
        return q_learning(q_tm1, batch.action, batch.reward, batch.discount, self.target_values(batch))

    def target_values(self, batch: TransitionBatch) -> Tensor:
        """Return the target network's values `[B, A]` of the next observations, precomputed values if still valid."""
        if batch.target_values_ahead is not None and batch.target_syncs == self._target_syncs:
            return batch.target_values_ahead
        with torch.no_grad():
            values: Tensor = self.target_network(batch.next_observation)
        return values

    def precompute_targets(self, batch: TransitionBatch) -> TransitionBatch:
        """Add the target network's values, so that a second core computes them; see `Algorithm.precompute_targets`.

        The batch is returned unchanged:

        - if each update samples its own noise, or changes the statistics that normalize observations;
        - if the target network is copied so often that most values would be stale;
        - if updates are compiled, because batches with and without values would need two programs.

        Other code that changes the target network must then increment `_target_syncs`.
        """
        hparams, spec = self.hparams, self.policy_spec
        syncs_often = hparams["sync_rate"] < _MIN_CALLS_PER_TARGET_SYNC * hparams["updates_per_training_step"]
        if spec.noise is not None or spec.normalize or syncs_often or hparams["compile_updates"]:
            return batch
        # Read the counter before the network. It is incremented after a copy, so values of a half-copied network count
        # as stale.
        target_syncs = self._target_syncs
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            # One batch at a time, as updates do: the results are then bitwise equal to an update's own.
            values = torch.stack([self.target_network(observation) for observation in batch.next_observation])
        return batch._replace(target_values_ahead=values, target_syncs=target_syncs)

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """Return the Huber loss, weighted if the batch has weights, and `td_error` `[B]`."""
        error = self.td_error(batch)
        item_losses = huber(error) if batch.weight is None else batch.weight * huber(error)
        return {"loss": item_losses.mean(), "td_error": error}

    def update(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """See `Algorithm.update`."""
        loss = self.minimize_losses(batch)["loss"]
        if self.trainer.global_step % self.hparams["sync_rate"] == 0:
            self.target_network.load_state_dict(self.q_network.state_dict())
            self._target_syncs += 1
        return {"loss": loss}

    def run_n_episodes(  # type: ignore[override]  # as on the reference page
        self, env: SingleEnvironment, n_epsiodes: int = 1, epsilon: float = 1.0, n_episodes: int | None = None
    ) -> list[float]:
        """Play whole episodes in `env` with a constant epsilon; return their returns.

        Args:
            env: environment from `make_environment`.
            n_epsiodes: number of episodes, in the reference page's spelling.
            epsilon: probability of a random action.
            n_episodes: number of episodes; takes precedence over `n_epsiodes`.
        """

        def act(observation: Array) -> Array:
            explore = self.policy.rng.random() < epsilon
            action = self.greedy_action(observation)
            return np.asarray(self.policy.rng.integers(self.policy.actions)) if explore else action

        return play_episodes(env, n_epsiodes if n_episodes is None else n_episodes, act)
