"""Batches."""

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
    """A `Batch` as tensors, `[k, B, ...]` or `[B, ...]`; see there for the fields, which may share memory.

    `target_values_ahead` `[k, B, A]` is None, or the target network's values of the next observations as
    `Algorithm.precompute_targets` computed them after `target_syncs` copies of that network. `weight` `[B]` weights the
    losses; None weights all alike.
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
        """Turn a batch into tensors, and copy what is a view that pins the object store."""
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
        """Return the k batches in here, each `[B, ...]`."""
        if self.reward.ndim == 1:
            return [self]
        k = len(self.reward)
        columns = (value.unbind() if isinstance(value, Tensor) else (value,) * k for value in self)
        return [TransitionBatch._make(part) for part in zip(*columns, strict=True)]

    def map(self, function: Callable[[Tensor], Tensor]) -> TransitionBatch:
        """Return a batch with `function` applied to every tensor in it."""
        return TransitionBatch._make(function(value) if isinstance(value, Tensor) else value for value in self)


def _tensor(array: Array) -> Tensor:
    """Return a tensor of an array's values; what lies in the object store is not to be written on."""
    return torch.from_numpy(array) if array.flags.writeable else torch.tensor(array)


def pin(tensor: Tensor) -> Tensor:
    """Return a tensor where a GPU can fetch it by itself, in one piece."""
    return tensor.contiguous().pin_memory()


class TrajectoryBatch(NamedTuple):
    """U trajectories as tensors, `[U, T, ...]`; shorter ones are filled up with rows that are not valid.

    Attributes:
        observation: `[U, T + 1, *observation_shape]`.
        action: `[U, T, *action_shape]`.
        reward: `[U, T]`.
        discount: `[U, T]`, gamma, or 0 where a step terminated.
        valid: `[U, T]` bool, see `Trajectory`.
        log_probability: `[U, T]` of the actions under the policy that took them.
        version: of the oldest weights that took them.
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
        """Copy trajectories into tensors of their own."""
        rows = max(len(trajectory.action) for trajectory in trajectories)

        def stacked(name: str, length: int) -> Tensor:
            arrays = [getattr(trajectory, name) for trajectory in trajectories]
            whole = np.zeros((len(arrays), length, *arrays[0].shape[1:]), arrays[0].dtype)
            for into, array in zip(whole, arrays, strict=True):
                into[: len(array)] = array
                # The row after an episode's last is where it bootstraps; what follows it is filled up like it.
                into[len(array) :] = array[-1] if name == "observation" else 0
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
        """Return this batch: it is one update's."""
        return [self]

    def map(self, function: Callable[[Tensor], Tensor]) -> TrajectoryBatch:
        """Return a batch with `function` applied to every tensor in it."""
        changed: dict[str, Any] = {k: v if k == "version" else function(v) for k, v in self._asdict().items()}
        return TrajectoryBatch(**changed)
