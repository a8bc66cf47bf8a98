"""Tests of batches: copies as tensors, splits, padding, and visited observations."""

from __future__ import annotations

import numpy as np
import torch

from learner.batches import TrajectoryBatch, TransitionBatch
from replay.messages import Batch
from tests.learner.toys import make_trajectory


def a_batch() -> Batch:
    rng = np.random.default_rng(0)
    return Batch(
        observation=rng.integers(0, 255, (3, 5, 4), np.uint8),
        action=rng.integers(2, size=(3, 5)),
        reward=rng.normal(size=(3, 5)).astype(np.float32),
        discount=rng.random((3, 5), np.float32),
        next_observation=rng.integers(0, 255, (3, 5, 4), np.uint8),
        ids=np.arange(15).reshape(3, 5) + 2**60,
        probability=np.full((3, 5), 0.25),
        size=77,
    )


def test_a_batch_as_tensors_is_a_copy_of_the_same_dtypes() -> None:
    batch = a_batch()
    for array in vars(batch).values():
        if isinstance(array, np.ndarray):
            array.flags.writeable = False  # as a view into Ray's object store
    tensors = TransitionBatch.of(batch)
    for name in ("observation", "action", "reward", "discount", "next_observation", "ids"):
        tensor, array = getattr(tensors, name), getattr(batch, name)
        np.testing.assert_array_equal(tensor.numpy(), array)
        assert tensor.numpy().dtype == array.dtype
        assert not np.shares_memory(tensor.numpy(), array)
    assert tensors.probability.dtype == torch.float32
    assert (tensors.probability == 0.25).all()
    assert tensors.size == 77


def test_split_gives_the_k_batches_in_order() -> None:
    whole = TransitionBatch.of(a_batch())
    parts = whole.split()
    assert len(parts) == 3
    for i, part in enumerate(parts):
        assert part.size == 77
        for name in whole._fields[:7]:
            assert torch.equal(getattr(part, name), getattr(whole, name)[i])
        assert part[7:] == (77, None, 0, None)
    (again,) = parts[1].split()
    assert again is parts[1]


def test_precomputed_values_are_split_and_moved_with_their_batches() -> None:
    whole = TransitionBatch.of(a_batch())
    values = torch.randn(*whole.reward.shape, 2)
    for i, part in enumerate(
        whole._replace(target_values_ahead=values, target_syncs=5).map(lambda tensor: 2 * tensor).split()
    ):
        assert part.target_values_ahead is not None
        assert torch.equal(part.target_values_ahead, 2 * values[i])
        assert (part.size, part.target_syncs) == (77, 5)


def test_trajectories_as_tensors_are_filled_up_behind_their_ends() -> None:
    trajectories = [make_trajectory(2, seed=0, version=7), make_trajectory(4, seed=1, version=5, ends="truncated")]
    batch = TrajectoryBatch.of(trajectories)
    assert batch.version == 5, "the oldest"
    assert batch.valid.tolist() == [[True, True, False, False], [True] * 4]
    for u, trajectory in enumerate(trajectories):
        rows = len(trajectory.action)
        for name in ("action", "reward", "discount", "log_probability"):
            tensor, array = getattr(batch, name), getattr(trajectory, name)
            np.testing.assert_array_equal(tensor[u, :rows].numpy(), array)
            assert not tensor[u, rows:].any()
            assert tensor.numpy().dtype == array.dtype
        np.testing.assert_array_equal(batch.observation[u, : rows + 1].numpy(), trajectory.observation)
        assert (batch.observation[u, rows + 1 :].numpy() == trajectory.observation[-1]).all()
        trajectory.observation[:] = 99.0
    assert not (batch.observation == 99.0).any(), "a copy"


def test_visited_are_the_observations_of_steps_in_the_order_of_valid() -> None:
    trajectories = [make_trajectory(2, seed=0), make_trajectory(3, seed=1)]
    batch = TrajectoryBatch.of(trajectories)
    expected = np.concatenate([trajectory.observation[:-1] for trajectory in trajectories])
    np.testing.assert_array_equal(batch.visited.numpy(), expected)
    np.testing.assert_array_equal(
        batch.reward[batch.valid].numpy(), np.concatenate([trajectory.reward for trajectory in trajectories])
    )
    (again,) = batch.split()
    assert again is batch
    halved = batch.map(lambda tensor: tensor[:1])
    assert (len(halved.reward), halved.version) == (1, batch.version)
    transitions = TransitionBatch.of(a_batch()).split()[0]
    assert transitions.visited is transitions.observation
