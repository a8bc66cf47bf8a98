"""Batches of transitions and of trajectories as tensors, the input of an update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from replay.messages import Batch
from replay.types import Array, Trajectory

Item = TypeVar("Item", "TransitionBatch", "TrajectoryBatch")


class TransitionBatch(NamedTuple):
    """One batch of transitions, `[B, ...]`, or k batches, `[k, B, ...]`; the first eight fields are those of `Batch`.

    Attributes:
        target_values_ahead: `[k, B, A]` target network's values of the next observations, computed in advance by
            `Algorithm.precompute_targets`, or None.
        target_syncs: number of copies of the target network at that time.
        weight: `[B]` weights of the losses, or None for equal weights.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    discount: Tensor
    next_observation: Tensor
    ids: Tensor
    probability: Tensor
    size: int
    target_values_ahead: Tensor | None = None
    target_syncs: int = 0
    weight: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch) -> TransitionBatch:
        """Return a batch's arrays as tensors; read-only arrays are copied, others share their memory."""
        return cls(
            observation=_tensor(batch.observation),
            action=_tensor(batch.action),
            reward=_tensor(batch.reward),
            discount=_tensor(batch.discount),
            next_observation=_tensor(batch.next_observation),
            ids=_tensor(batch.ids),
            probability=torch.tensor(batch.probability, dtype=torch.float32),
            size=batch.size,
        )

    @property
    def visited(self) -> Tensor:
        """Observations in which an action was taken, `[B, ...]`."""
        return self.observation

    def split(self) -> list[TransitionBatch]:
        """Return the k batches, each `[B, ...]`."""
        if self.reward.ndim == 1:
            return [self]
        k = len(self.reward)
        columns = (value.unbind() if isinstance(value, Tensor) else (value,) * k for value in self)
        return [TransitionBatch._make(part) for part in zip(*columns, strict=True)]

    def map(self, function: Callable[[Tensor], Tensor]) -> TransitionBatch:
        """Return a batch with `function` applied to every tensor."""
        return TransitionBatch._make(function(value) if isinstance(value, Tensor) else value for value in self)


def _tensor(array: Array) -> Tensor:
    # Read-only arrays are views of Ray's object store: a tensor that shares their memory would pin and could change it.
    return torch.from_numpy(array) if array.flags.writeable else torch.tensor(array)


def pin(tensor: Tensor) -> Tensor:
    """Return a contiguous copy of a tensor in page-locked memory, from which a GPU copies asynchronously."""
    return tensor.contiguous().pin_memory()


class TrajectoryBatch(NamedTuple):
    """U trajectories as tensors, `[U, T, ...]`; shorter trajectories are padded with invalid rows.

    Attributes:
        observation: `[U, T + 1, *observation_shape]` observations.
        action: `[U, T, *action_shape]` actions.
        reward: `[U, T]` rewards.
        discount: `[U, T]` discounts: gamma, or 0 where a step terminated.
        valid: `[U, T]` bool, see `Trajectory`.
        log_probability: `[U, T]` log-probabilities of the actions under the behavior policy.
        version: version of the oldest weights that selected these actions.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    discount: Tensor
    valid: Tensor
    log_probability: Tensor
    version: int

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> TrajectoryBatch:
        """Return copies of trajectories, padded to the length of the longest one."""
        rows = max(len(trajectory.action) for trajectory in trajectories)

        def stacked(name: str, length: int) -> Tensor:
            arrays = [getattr(trajectory, name) for trajectory in trajectories]
            whole = np.zeros((len(arrays), length, *arrays[0].shape[1:]), arrays[0].dtype)
            for target, array in zip(whole, arrays, strict=True):
                target[: len(array)] = array
                # The observation after the last step is the one to bootstrap from; the padding repeats it.
                target[len(array) :] = array[-1] if name == "observation" else 0
            return torch.from_numpy(whole)

        return cls(
            observation=stacked("observation", rows + 1),
            action=stacked("action", rows),
            reward=stacked("reward", rows),
            discount=stacked("discount", rows),
            valid=stacked("valid", rows),
            log_probability=stacked("log_probability", rows),
            version=min(trajectory.version for trajectory in trajectories),
        )

    @property
    def visited(self) -> Tensor:
        """Observations in which an action was taken, `[N, ...]`, in the order of `valid`."""
        return self.observation[:, :-1][self.valid]

    def split(self) -> list[TrajectoryBatch]:
        """Return this batch alone, because one update uses the whole batch."""
        return [self]

    def map(self, function: Callable[[Tensor], Tensor]) -> TrajectoryBatch:
        """Return a batch with `function` applied to every tensor."""
        changed: dict[str, Any] = {k: v if k == "version" else function(v) for k, v in self._asdict().items()}
        return TrajectoryBatch(**changed)
