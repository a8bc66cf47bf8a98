"""Slow reference implementations of the builders: one record per step, and everything else computed from lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from actors.rebuilding import FAILURE
from actors.vector_runner import VectorRunner
from replay.messages import Batch
from replay.table import TransitionTable
from replay.types import Array, Moments
from tests.replay.naive import assert_same_bits


@dataclass
class Step:
    """One environment step: `action` taken in `observation` led to `reward` and `next_observation`."""

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
    """A step with its n-step return, computed by the textbook definition."""

    observation: Array
    action: Array
    reward: np.float32
    discount: np.float32
    next_observation: Array


class NaiveLane:
    """One lane: a list of episodes, each a list of steps; `shown` has the observation of each row."""

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
        transitions = []
        for episode in self.episodes:
            for start, step in enumerate(episode):
                reward, discount = 0.0, 1.0
                for later in episode[start : start + n_steps]:
                    reward = reward + discount * (min(max(later.reward, -1.0), 1.0) if clip else later.reward)
                    discount = discount * gamma * (0.0 if later.terminated else 1.0)
                    bootstrap = later.next_observation
                if not step.dropped:
                    transitions.append(
                        (
                            step.row,
                            Transition(
                                step.observation, step.action, np.float32(reward), np.float32(discount), bootstrap
                            ),
                        )
                    )
        return transitions


class NaiveExperience:
    """Records the vector environment inside a `VectorRunner`.

    It wraps the environment's methods, so that the recorded data do not pass through the code under test.
    """

    def __init__(
        self, runner: VectorRunner, *, segment_length: int, n_steps: int, gamma: float, clip: bool = False
    ) -> None:
        self.spec = runner.environment
        self.segment_length, self.n_steps, self.gamma = segment_length, n_steps, gamma
        self.lanes: list[NaiveLane] = []
        self.failures: list[tuple[int, int]] = []  # (row, lane)
        self.rows = 0
        self._clip = clip
        self._reset, self._step = runner.env.reset, runner.env.step
        runner.env.reset, runner.env.step = self.reset, self.step  # type: ignore[method-assign]

    def _convert(self, observation: Array) -> Array:
        converted: Array = np.array(observation, self.spec.observation_dtype)
        return converted

    def reset(self, **arguments: Any) -> Any:
        observation, info = self._reset(**arguments)
        self.lanes = [NaiveLane(of_lane) for of_lane in self._convert(observation)]
        self.failures, self.rows = [], 0
        return observation, info

    def step(self, action: Array) -> Any:
        outcome = observation, reward, terminated, truncated, info = self._step(action)
        converted = self._convert(observation)
        for at, lane in enumerate(self.lanes):
            lane.add(
                np.array(action[at]) - getattr(self.spec.actions, "start", 0),
                float(reward[at]),
                bool(terminated[at]),
                bool(truncated[at]),
                converted[at],
            )
            if info.get(f"_{FAILURE}", np.zeros(len(self.lanes)))[at]:
                self.failures.append((self.rows, at))
                # The builder cuts a block of rows once the following n - 1 rows are known.
                lane.drop_from(max(0, self.rows - (self.n_steps - 1)) // self.segment_length * self.segment_length)
        self.rows += 1
        return outcome

    def in_order(self) -> list[Transition]:
        """Return all transitions in the order of sending: block by block, and in each block lane by lane."""
        entries = [
            (row // self.segment_length, at, row, transition)
            for at, lane in enumerate(self.lanes)
            for row, transition in lane.transitions(self.n_steps, self.gamma, self._clip)
        ]
        return [entry[-1] for entry in sorted(entries, key=lambda entry: entry[:3])]


FIELDS = ("observation", "action", "reward", "discount", "next_observation")


def newest(table: TransitionTable, count: int) -> Batch:
    """Return the last `count` items of a table."""
    inserted = table.evicted + table.size
    return table._frames.batch(table._read_indices(np.arange(inserted - count, inserted), np.ones(count)))


def assert_equal(batches: list[Batch], expected: list[Transition]) -> None:
    """Check that the concatenated batches equal a list of transitions, bit for bit."""
    for name in FIELDS:
        actual = np.concatenate([getattr(batch, name) for batch in batches])
        assert_same_bits(actual, np.stack([getattr(transition, name) for transition in expected]))


def assert_holds(table: TransitionTable, expected: list[Transition]) -> None:
    """Check every live item of a table into which exactly `expected` was inserted."""
    assert table.evicted + table.size == len(expected)
    if table.size:
        assert_equal([newest(table, table.size)], expected[table.evicted :])


def discounted_returns(naive: NaiveExperience, clip: bool) -> list[float]:
    """Return `G_t = gamma G_{t-1} + r_t` of every step that did not fail; G restarts with each episode."""
    returns = []
    for at, lane in enumerate(naive.lanes):
        for episode in lane.episodes:
            total = 0.0
            for step in episode:
                total = naive.gamma * total + (min(max(step.reward, -1.0), 1.0) if clip else step.reward)
                if (step.row, at) not in naive.failures:
                    returns.append(total)
    return returns


def assert_are_moments_of(moments: Moments, numbers: list[float]) -> None:
    assert moments.count == len(numbers)
    assert moments.mean == pytest.approx(np.mean(numbers), rel=1e-9, abs=1e-12)
    assert moments.std == pytest.approx(np.std(numbers), rel=1e-9)
