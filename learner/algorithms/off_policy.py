"""The base class of algorithms that learn from a replay of transitions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from actors.environments import EnvironmentSpec
from actors.rollout import RolloutSpec
from learner.algorithms.algorithm import Algorithm
from learner.batches import TransitionBatch
from learner.compilation import NOT_SCALED, LossFunction, compile_backward
from learner.experience import LocalTransitions, RemoteTransitions
from replay.client import ReplayClient
from replay.errors import ConfigurationError
from replay.server import ReplaySpec
from replay.table import TableSpec


class OffPolicyAlgorithm(Algorithm):
    """An algorithm that makes `updates_per_training_step` updates per training step, each on one `TransitionBatch`."""

    def __init__(
        self,
        env: str | EnvironmentSpec | Mapping[str, Any],
        *,
        updates_per_step: float = 1.0,
        updates_per_training_step: int = 1,
        segment_length: int | None = None,
        compile_updates: bool = False,
        **kwargs: Any,
    ) -> None:
        """Initialize the state that all off-policy algorithms share.

        Args:
            env: environment id or specification.
            updates_per_step: updates per environment step.
            updates_per_training_step: k, the number of updates per Lightning `training_step`.
            segment_length: rows in a segment, the steps of one environment in one push of a worker; None selects 64 for
                images and otherwise 16.
            compile_updates: whether to compile the loss and its gradients, on a GPU as a CUDA graph; see
                `compile_backward`.
            kwargs: arguments of `Algorithm`.
        """
        super().__init__(env, **kwargs)
        self._compiled: LossFunction | None = None

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """Return the scalar `loss` that an update minimizes, and other results by name. Has no side effects."""
        raise NotImplementedError

    def prepare_batch(self, batch: TransitionBatch) -> TransitionBatch:
        """Return `batch` with additional tensors for `losses` that depend on numbers which change between updates.

        `losses` must not read such a number itself, because each change would recompile a compiled program.
        """
        return batch

    def loss(self, batch: TransitionBatch) -> Tensor:
        """Return the scalar loss of a batch. Subclasses override `losses`, which updates call, not this method."""
        return self.losses(self.prepare_batch(batch))["loss"]

    def on_fit_start(self) -> None:
        """Discard the program that was compiled for a previous fit.

        Raises:
            ConfigurationError: `compile_updates` is set and does not support this Trainer.
        """
        self._compiled = None
        if self.hparams["compile_updates"]:
            if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
                raise ConfigurationError(NOT_SCALED)
            if self.trainer.world_size > 1:
                raise ConfigurationError(f"compile_updates works on one device, not on {self.trainer.world_size}")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the compiled program, which writes the gradients of this module's own parameters."""
        return {**super().__getstate__(), "_compiled": None}

    def minimize_losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """Make one counted optimizer step on the loss of a batch; return the results of `losses`, detached."""
        batch = self.prepare_batch(batch)
        if not self.hparams["compile_updates"]:
            results = self.losses(batch)
            self.minimize(results["loss"])
            return {name: tensor.detach() for name, tensor in results.items()}
        if self._compiled is None:
            optimizer: Any = self.optimizers()
            trainable = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
            self._compiled = compile_backward(self.losses, trainable)
        results = self._compiled(batch)
        self.apply_gradients()
        return results

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
            track_return_statistics=hparams["normalize_rewards"],
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
