"""The base class of algorithms that learn from trajectories of their newest weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from actors.environments import DiscreteActions, EnvironmentSpec
from actors.policies import POLICIES, PolicySpec, StochasticPolicy
from actors.rollout import RolloutSpec
from learner.algorithms.algorithm import Algorithm
from learner.experience import LocalTrajectories, RemoteTrajectories
from replay.client import TrajectoryClient
from replay.seeds import spawn_seed
from replay.trajectory_server import QueueSpec


class OnPolicyAlgorithm(Algorithm):
    """An algorithm that makes one update on each `TrajectoryBatch` and then discards the batch.

    The size of a batch is fixed before its rollout. Discrete actions are sampled from a softmax distribution, actions
    in a box from a Gaussian.
    """

    run_defaults: ClassVar[Mapping[str, Any]] = {"publish_every": 1}
    policy: StochasticPolicy

    def __init__(
        self, env: str | EnvironmentSpec | Mapping[str, Any], *, max_policy_lag: int = 0, **kwargs: Any
    ) -> None:
        """Create the policy.

        Args:
            env: environment id or specification.
            max_policy_lag: maximum number of versions between the weights that produced a trajectory and the weights
                that train on it. 0 is strictly on-policy; with a positive lag, workers also act during updates.
            kwargs: arguments of `Algorithm`.
        """
        super().__init__(env, **kwargs)
        self.seed_networks()
        kind = "categorical" if isinstance(self.environment.actions, DiscreteActions) else "gaussian"
        policy = POLICIES[kind](PolicySpec(kind, self.environment, **self.policy_options((128,))))
        assert isinstance(policy, StochasticPolicy)
        self.policy = policy
        self.policy.begin(spawn_seed(self.seed, "policy"))

    @property
    def trajectory_rows(self) -> int | None:
        """Rows in a trajectory; None for whole episodes."""
        return None

    @property
    def trajectories_per_batch(self) -> int:
        """Trajectories in a batch, over all workers."""
        raise NotImplementedError

    def rollout_spec(self) -> RolloutSpec:
        """See `Algorithm.rollout_spec`."""
        return RolloutSpec(
            policy=self.policy_spec,
            num_envs=self.hparams["num_envs"],
            segment_length=1,
            n_steps=1,
            gamma=self.hparams["gamma"],
            clip_rewards=self.clips_rewards,
            run_seed=self.seed,
            track_return_statistics=self.hparams["normalize_rewards"],
            trajectory_rows=self.trajectory_rows,
        )

    def experience_spec(self) -> QueueSpec:
        """See `Algorithm.experience_spec`."""
        return QueueSpec(self.rollout_spec().layout, self.trajectories_per_batch, self.hparams["max_policy_lag"])

    def make_local_experience(self) -> LocalTrajectories:
        """See `Algorithm.make_local_experience`."""
        length = self.hparams["epoch_len"]
        return LocalTrajectories(self.policy, self.rollout_spec(), self.experience_spec(), length=length)

    def make_remote_experience(self, client: TrajectoryClient) -> RemoteTrajectories:
        """See `Algorithm.make_remote_experience`."""
        lag = self.hparams["max_policy_lag"]
        return RemoteTrajectories(client, max_policy_lag=lag, length=self.hparams["epoch_len"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of all parameters."""
        return self.make_optimizer((self.parameters(), self.hparams["lr"]))
