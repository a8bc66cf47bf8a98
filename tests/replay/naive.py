"""Slow reference implementations of the replay package, for comparison with the fast ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from replay.messages import Batch
from replay.table import TransitionTable
from replay.types import Array, Layout, Segment


class NaiveSumTree:
    """A list of weights, which each method sums again."""

    def __init__(self, capacity: int) -> None:
        self.weights = [0.0] * capacity

    def set(self, leaves: list[int], weights: list[float]) -> None:
        for leaf, weight in zip(leaves, weights, strict=True):
            self.weights[leaf] = weight

    def total(self) -> float:
        return sum(self.weights)

    def find(self, target: float) -> int:
        running = 0.0
        for leaf, weight in enumerate(self.weights):
            running += weight
            if running > target:
                return leaf
        raise AssertionError(f"{target} is not below {running}")


@dataclass(frozen=True)
class Transition:
    """One full transition: both observations with all their frames."""

    observation: Array
    action: Array
    reward: np.float32
    discount: np.float32
    next_observation: Array


class NaiveTable:
    """A list of segments of full transitions; a full table evicts its oldest segment as a whole."""

    def __init__(self, capacity: int, frame_capacity: int) -> None:
        self.capacity, self.frame_capacity = capacity, frame_capacity
        self.segments: list[tuple[list[Transition], int]] = []
        self.evicted = 0

    @property
    def live(self) -> list[Transition]:
        return [transition for transitions, _ in self.segments for transition in transitions]

    def insert(self, transitions: list[Transition], frames: int) -> None:
        if transitions:
            self.segments.append((transitions, frames))
        while len(self.live) > self.capacity or sum(frames for _, frames in self.segments) > self.frame_capacity:
            self.evicted += len(self.segments.pop(0)[0])


class Lane:
    """A random environment lane that remembers all its rows and cuts them into segments.

    Row numbers count from the lane's first row. The last row of an episode is not a start position; the next row is the
    first row of a new episode.
    """

    def __init__(self, layout: Layout, rng: np.random.Generator, end_probability: float) -> None:
        self.layout, self.rng, self.end_probability = layout, rng, end_probability
        self.frames: list[Array] = []
        self.observations: list[Array] = []
        self.ages: list[int] = []
        self.ended: list[bool] = []
        self.steps: list[tuple[Array, float, float]] = []  # action, reward, discount of each row
        self.at = 0
        self._episode: list[Array] = []

    def _random(self, shape: tuple[int, ...], dtype: str) -> Array:
        raw = self.rng.integers(1, 250, shape)
        return np.asarray(raw if np.dtype(dtype).kind in "iu" else raw / 7, dtype)

    def _grow(self) -> None:
        layout, stack = self.layout, self.layout.stack
        if not self.ended or self.ended[-1]:
            self._episode = []
        frame = self._random(layout.frame_shape, layout.frame_dtype)
        self._episode.append(frame)
        padding = [np.zeros_like(frame)] * max(0, stack - len(self._episode))
        self.frames.append(frame)
        self.observations.append(frame if stack == 1 else np.stack(padding + self._episode[-stack:]))
        self.ages.append(min(stack, len(self._episode)) - 1)
        self.ended.append(len(self._episode) > 1 and self.rng.random() < self.end_probability)
        action = self._random(layout.action_shape, layout.action_dtype)
        self.steps.append((action, float(self.rng.normal()), float(self.rng.choice([0.0, 0.9, 0.99]))))

    def cut(self, length: int, *, flush: bool = False) -> tuple[Segment, list[Transition]]:
        """Return the next `length` rows as a segment, and as a list of full transitions.

        With `flush`, the last row only serves for bootstrapping, and the lane continues with a new episode.
        """
        layout, begin, end = self.layout, self.at, self.at + length
        while len(self.frames) < end + layout.n_steps:
            self._grow()
        self.at = end
        last_row = end - 1 if flush else end - 1 + layout.n_steps
        starts = [row for row in range(begin, end) if not self.ended[row] and row < last_row]
        bootstraps, transitions = [], []
        for start in starts:
            reward, discount, row = 0.0, 1.0, start
            while row < min(start + layout.n_steps, last_row) and not self.ended[row]:
                _, step_reward, step_discount = self.steps[row]
                reward, discount, row = reward + discount * step_reward, discount * step_discount, row + 1
            bootstraps.append(row)
            transitions.append(
                Transition(
                    self.observations[start],
                    self.steps[start][0],
                    np.float32(reward),
                    np.float32(discount),
                    self.observations[row],
                )
            )
        # The segment includes predecessors of the previous episode; only the ages exclude them from the stack.
        first = max(0, begin - (layout.stack - 1))
        segment = Segment(
            frames=np.stack(self.frames[first : max([end - 1, *bootstraps]) + 1]),
            row=np.array(starts, np.int32) - np.int32(first),
            age=np.array([self.ages[row] for row in starts], np.uint8),
            bootstrap_row=np.array(bootstraps, np.int32) - np.int32(first),
            bootstrap_age=np.array([self.ages[row] for row in bootstraps], np.uint8),
            action=np.array([t.action for t in transitions], layout.action_dtype).reshape(
                len(starts), *layout.action_shape
            ),
            reward=np.array([t.reward for t in transitions], np.float32),
            discount=np.array([t.discount for t in transitions], np.float32),
        )
        if flush:
            # Drop the rows generated in advance, as a stopped worker does with its environment.
            del self.frames[end:], self.observations[end:], self.ages[end:], self.ended[end:], self.steps[end:]
            self.ended[-1] = True
        return segment, transitions


def make_segment(layout: Layout, steps: int, *, value: int = 0) -> Segment:
    """Return a segment of `steps` steps without an episode end, with all frames filled with `value`."""
    n, stack = layout.n_steps, layout.stack
    rows = np.arange(steps, dtype=np.int32) + np.int32(stack - 1)
    full = np.full(steps, stack - 1, np.uint8)
    return Segment(
        frames=np.full((stack - 1 + steps + n, *layout.frame_shape), value, layout.frame_dtype),
        row=rows,
        age=full,
        bootstrap_row=rows + np.int32(n),
        bootstrap_age=full,
        action=np.zeros((steps, *layout.action_shape), layout.action_dtype),
        reward=np.zeros(steps, np.float32),
        discount=np.ones(steps, np.float32),
    )


def read_everything(table: TransitionTable, *, max_samples: int = 200) -> Batch:
    """Sample until all live items were seen; return each item once, oldest first, with shapes `[1, size, ...]`."""
    sampled: dict[str, list[Array]] = {}
    for _ in range(max_samples):
        batch = table.sample(2, 4 * table.size)
        for name, values in vars(batch).items():
            if name != "size":
                sampled.setdefault(name, []).append(values.reshape(-1, *values.shape[2:]))
        ids, first = np.unique(np.concatenate(sampled["ids"]), return_index=True)
        assert len(ids) <= table.size
        if len(ids) == table.size:
            once: dict[str, Any] = {name: np.concatenate(many)[None, first] for name, many in sampled.items()}
            return Batch(size=table.size, **once)
    raise AssertionError(f"{table.size - len(ids)} of {table.size} items were never sampled")


def assert_same_bits(actual: Array, expected: Array) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()
