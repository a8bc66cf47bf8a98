"""What algorithms that learn from a replay of transitions share: how experience is made, kept and drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actors.environments import EnvironmentSpec
from actors.rollout import RolloutSpec
from learner.algorithms.algorithm import Algorithm
from learner.experience import LocalTransitions, RemoteTransitions
from replay.server import ReplayClient, ReplaySpec
from replay.table import TableSpec


class OffPolicyAlgorithm(Algorithm):
    """An algorithm fed by `TransitionBatch`es, of which it makes `updates_per_training_step` updates at a time."""

    def __init__(
        self,
        env: str | EnvironmentSpec | Mapping[str, Any],
        *,
        updates_per_step: float = 1.0,
        updates_per_training_step: int = 1,
        segment_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Set up what every such algorithm has.

        Args:
            env: environment id, or the specification of one.
            updates_per_step: updates for each environment step.
            updates_per_training_step: k, the updates made in one Lightning `training_step`.
            segment_length: rows a worker collects in each environment before it sends them; None gives 64 for
                images and 16 otherwise.
            kwargs: see `Algorithm`.
        """
        super().__init__(env, **kwargs)

    def rollout_spec(self) -> RolloutSpec:
        """See `Algorithm.rollout_spec`."""
        hparams = self.hparams
        return RolloutSpec(
            policy=self.policy_spec,
            num_envs=hparams["num_envs"],
            segment_length=hparams["segment_length"] or (64 if self.environment.is_image else 16),
            n_steps=hparams["n_steps"],
            gamma=hparams["gamma"],
            clip_rewards=self.clips_rewards,
            run_seed=self.seed,
            measure_returns=self.hparams["normalize_rewards"],
        )

    def experience_spec(self) -> ReplaySpec:
        """See `Algorithm.experience_spec`."""
        hparams, rollout = self.hparams, self.rollout_spec()
        return ReplaySpec(
            table=TableSpec(rollout.layout, hparams["replay_size"]),
            samples_per_insert=hparams["batch_size"] * hparams["updates_per_step"],
            minimum_size=hparams["warm_start_size"],
            largest_push=rollout.largest_push,
            batch_size=hparams["batch_size"],
            batches_per_sample=hparams["updates_per_training_step"],
        )

    def make_local_experience(self) -> LocalTransitions:
        """See `Algorithm.make_local_experience`."""
        length = self.hparams["batches_per_epoch"]
        return LocalTransitions(self.policy, self.rollout_spec(), self.experience_spec(), length=length)

    def make_remote_experience(self, client: ReplayClient) -> RemoteTransitions:
        """See `Algorithm.make_remote_experience`."""
        return RemoteTransitions(
            client,
            k=self.hparams["updates_per_training_step"],
            batch_size=self.hparams["batch_size"],
            length=self.hparams["batches_per_epoch"],
        )
