"""Slow twins of the actors' builders: every step a record of its own, everything else worked out from lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.rebuilding import FAILURE
from actors.vector_runner import VectorRunner
from replay.messages import Batch
from replay.table import TransitionTable
from replay.types import Array
from tests.replay.naive import assert_same_bits


@dataclass
class Step:
    """In `observation` the agent took `action`; then came `reward` and `next_observation`."""

    row: int
    observation: Array
    action: Array
    reward: float
    terminated: bool
    ended: bool
    next_observation: Array
    dropped: bool = False


@dataclass(frozen=True)
class Transition:
    """A step with its n-step return, worked out as in the textbook."""

    observation: Array
    action: Array
    reward: np.float32
    discount: np.float32
    next_observation: Array


class NaiveLane:
    """One lane: a list of episodes, each a list of steps."""

    def __init__(self, observation: Array) -> None:
        self.episodes: list[list[Step]] = [[]]
        self.shown = [observation]
        self.resetting = False
        self.row = 0

    def add(self, action: Array, reward: float, terminated: bool, truncated: bool, observation: Array) -> None:
        if self.resetting:
            self.episodes.append([])
            self.resetting = False
        else:
            ended = terminated or truncated
            self.episodes[-1].append(Step(self.row, self.shown[-1], action, reward, terminated, ended, observation))
            self.resetting = ended
        self.row += 1
        self.shown.append(observation)

    def drop_from(self, row: int) -> None:
        for episode in self.episodes:
            for step in episode:
                step.dropped = step.dropped or step.row >= row

    def transitions(self, n_steps: int, gamma: float, clip: bool) -> list[tuple[int, Transition]]:
        """Return `(row, transition)` of every step that was not dropped."""
        found = []
        for episode in self.episodes:
            for start, step in enumerate(episode):
                reward, discount = 0.0, 1.0
                for later in episode[start : start + n_steps]:
                    reward = reward + discount * (min(max(later.reward, -1.0), 1.0) if clip else later.reward)
                    discount = discount * gamma * (0.0 if later.terminated else 1.0)
                    bootstrap = later.next_observation
                if not step.dropped:
                    found.append(
                        (
                            step.row,
                            Transition(
                                step.observation, step.action, np.float32(reward), np.float32(discount), bootstrap
                            ),
                        )
                    )
        return found


class NaiveExperience:
    """Listens to the vector environment inside `VectorRunner`, so that nothing passes through the code under test."""

    def __init__(
        self, lanes: VectorRunner, *, segment_length: int, n_steps: int, gamma: float, clip: bool = False
    ) -> None:
        self.spec = lanes.environment
        self.segment_length, self.n_steps, self.gamma = segment_length, n_steps, gamma
        self.lanes: list[NaiveLane] = []
        self.failures: list[tuple[int, int]] = []  # (row, lane)
        self.rows = 0
        self._clip = clip
        self._reset, self._step = lanes.env.reset, lanes.env.step
        lanes.env.reset, lanes.env.step = self.reset, self.step  # type: ignore[method-assign]

    def _keep(self, observation: Array) -> Array:
        kept: Array = np.array(observation, self.spec.observation_dtype)
        return kept

    def reset(self, **arguments: Any) -> Any:
        observation, info = self._reset(**arguments)
        self.lanes = [NaiveLane(row) for row in self._keep(observation)]
        self.failures, self.rows = [], 0
        return observation, info

    def step(self, action: Array) -> Any:
        answer = observation, reward, terminated, truncated, info = self._step(action)
        kept = self._keep(observation)
        for at, lane in enumerate(self.lanes):
            lane.add(
                np.array(action[at]) - getattr(self.spec.actions, "start", 0),
                float(reward[at]),
                bool(terminated[at]),
                bool(truncated[at]),
                kept[at],
            )
            if info.get(f"_{FAILURE}", np.zeros(len(self.lanes)))[at]:
                self.failures.append((self.rows, at))
                # A block of rows is sent once the n - 1 rows behind it are known.
                lane.drop_from(max(0, self.rows - (self.n_steps - 1)) // self.segment_length * self.segment_length)
        self.rows += 1
        return answer

    def in_order(self) -> list[Transition]:
        """Return all transitions in the order they are sent: blocks of rows, in each block lane after lane."""
        found = [
            (row // self.segment_length, at, row, transition)
            for at, lane in enumerate(self.lanes)
            for row, transition in lane.transitions(self.n_steps, self.gamma, self._clip)
        ]
        return [entry[-1] for entry in sorted(found, key=lambda entry: entry[:3])]


FIELDS = ("observation", "action", "reward", "discount", "next_observation")


def newest(table: TransitionTable, count: int) -> Batch:
    """Return the last `count` items of a table."""
    inserted = table.evicted + table.size
    return table._frames.batch(table._drawn(np.arange(inserted - count, inserted), np.ones(count)))


def assert_equal(batches: list[Batch], expected: list[Transition]) -> None:
    """Check batches, one after the other, against a list of transitions, bit for bit."""
    for name in FIELDS:
        actual = np.concatenate([getattr(batch, name) for batch in batches])
        assert_same_bits(actual, np.stack([getattr(transition, name) for transition in expected]))


def assert_holds(table: TransitionTable, expected: list[Transition]) -> None:
    """Check every live item of a table that got `expected` and nothing else."""
    assert table.evicted + table.size == len(expected)
    if table.size:
        assert_equal([newest(table, table.size)], expected[table.evicted :])
