"""Trajectories of real environments, bit for bit, against plain lists of the lanes' steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from actors.environments import EnvironmentSpec, specify
from actors.policies import PolicySpec
from actors.segments import TrajectoryBuilder
from actors.vector_runner import VectorRunner
from replay.trajectory_queue import Permit, TrajectoryQueue
from replay.types import Trajectory
from tests.actors.naive import NaiveExperience, NaiveLane
from tests.actors.toys import RandomPolicy, Script, scripted
from tests.replay.naive import assert_same_bits

GAMMA = 0.97
SHORT = specify("SquallShort-v0")
STACKS = replace(specify("SquallStacks-v0"), frame_stack=4)
SCRIPTED = specify("SquallScripted-v0")


class Unrolls:
    """A trajectory queue and a builder; every batch is compared with the recorded environment."""

    def __init__(self, environment: EnvironmentSpec, *, lanes: int, rows: int | None, units: int) -> None:
        self.rows = rows
        self.environment = environment
        self.policy = RandomPolicy(PolicySpec("random", environment))
        self.policy.begin(np.random.SeedSequence(3))
        self.runner = VectorRunner(environment, lanes, np.random.SeedSequence(4))
        self.naive = NaiveExperience(self.runner, segment_length=1, n_steps=1, gamma=GAMMA)
        self.builder = TrajectoryBuilder(lanes, GAMMA, rows=rows)
        self.queue = TrajectoryQueue(units)
        self.actions: list[Any] = []
        self.begun: dict[Permit, tuple[int, int]] = {}
        self.permitted: set[int] = set()
        self.batches: list[tuple[Trajectory, ...]] = []

    def roll_out(self, rows: int) -> None:
        rng = np.random.default_rng(5)
        self.builder.begin(self.runner.reset())
        for _ in range(rows):
            for lane in self.builder.idle:
                if rng.random() < 0.5:
                    self.request(lane)
            assert self.builder.busy == bool(self.permitted)
            step = self.runner.step(self.policy, step=0)
            self.actions.append((step.action, step.log_probability))
            for permit, trajectory in self.builder.add(
                step.action,
                step.log_probability,
                step.reward,
                step.terminated,
                step.truncated,
                step.observation,
                step.failed,
            ):
                trajectory.check(self.environment.layout(segment_length=1, n_steps=1))
                assert self.queue.put(permit, 0, 0, trajectory)
                self.permitted.remove(self.begun[permit][0])
            self.take()
        self.runner.close()

    def request(self, lane: int) -> None:
        naive = self.naive.lanes[lane]
        assert lane not in self.permitted
        assert self.rows is not None or naive.resetting or not naive.episodes[-1]
        permits = self.queue.request_permits(0, 0, 1)
        if not isinstance(permits, str):
            self.builder.assign(lane, permits[0])
            self.begun[permits[0]] = (lane, self.naive.rows)
            self.permitted.add(lane)

    def take(self) -> None:
        batch = self.queue.take()
        if isinstance(batch, str):
            return
        for unit, trajectory in enumerate(batch):
            version = len(self.batches)
            lane, row = self.begun[Permit(version, unit, version)]
            assert trajectory.version == version
            assert trajectory.episodic == (self.rows is None)
            self.check(trajectory, lane, row)
        self.batches.append(batch)
        self.queue.publish(len(self.batches))

    def check(self, trajectory: Trajectory, lane: int, row: int) -> None:
        naive = self.naive.lanes[lane]
        if self.rows is None:
            row, rows = whole_episode(naive, row)
        else:
            rows = self.rows
        assert len(trajectory.action) == rows
        assert_same_bits(trajectory.observation, np.stack(naive.shown[row : row + rows + 1]))
        steps = {step.row: step for episode in naive.episodes for step in episode}
        for at in range(rows):
            step = steps.get(row + at)
            assert trajectory.valid[at] == (step is not None)
            action, log_probability = self.actions[row + at]
            assert_same_bits(trajectory.action[at], action[lane])
            assert trajectory.log_probability[at] == log_probability[lane]
            if step is None:
                assert trajectory.discount[at] == 0.0
            else:
                assert trajectory.reward[at] == np.float32(step.reward)
                assert trajectory.discount[at] == np.float32(0.0 if step.terminated else GAMMA)


def whole_episode(lane: NaiveLane, row: int) -> tuple[int, int]:
    """Return first row and length of the first episode that begins at `row` or later."""
    episode = next(episode for episode in lane.episodes if episode[0].row >= row)
    assert episode[-1].ended
    assert episode[0].row - row <= 1
    return episode[0].row, len(episode)


@pytest.mark.parametrize("environment", [SHORT, STACKS], ids=["vectors", "stacks"])
@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 5, 16, None])
def test_trajectories_are_what_the_lanes_showed(environment: EnvironmentSpec, lanes: int, rows: int | None) -> None:
    unrolls = Unrolls(environment, lanes=lanes, rows=rows, units=4)
    unrolls.roll_out(400)
    assert len(unrolls.batches) > 4
    assert unrolls.queue.discarded_steps == 0
    trajectories = [trajectory for batch in unrolls.batches for trajectory in batch]
    if rows is None:
        assert {trajectory.steps for trajectory in trajectories} == set(range(1, 8))
    elif rows > 1:
        assert any(not trajectory.valid.all() for trajectory in trajectories)


@pytest.mark.parametrize(
    ("name", "arguments", "rows"),
    [
        ("CartPole-v1", {"max_episode_steps": 12}, 8),
        ("CartPole-v1", {"max_episode_steps": 12}, None),
        ("PongNoFrameskip-v4", {"max_num_frames_per_episode": 40}, 8),
        ("PongNoFrameskip-v4", {"max_num_frames_per_episode": 40}, None),
    ],
)
def test_trajectories_of_native_vectors(name: str, arguments: dict[str, Any], rows: int | None) -> None:
    unrolls = Unrolls(specify(name, arguments), lanes=2, rows=rows, units=3)
    unrolls.roll_out(120)
    assert len(unrolls.batches) > 1


@pytest.mark.parametrize(("truncates", "last"), [(True, GAMMA), (False, 0.0)])
def test_truncation_bootstraps_and_termination_does_not(truncates: bool, last: float) -> None:
    builder = TrajectoryBuilder(1, GAMMA, rows=5)
    observations = np.arange(6.0, dtype=np.float32)[:, None, None]
    builder.begin(observations[0])
    builder.assign(0, Permit(0, 0, 0))
    complete: list[tuple[Permit, Trajectory]] = []
    for row in range(5):
        end = np.array([row == 2])
        outcome = (np.array([row]), np.zeros(1), np.array([10.0 + row]), end & (not truncates), end & truncates)
        complete = builder.add(*outcome, observations[row + 1])
    [(permit, trajectory)] = complete
    assert permit == Permit(0, 0, 0)
    assert trajectory.valid.tolist() == [True, True, True, False, True]
    assert trajectory.discount.tolist() == pytest.approx([GAMMA, GAMMA, last, 0.0, GAMMA])
    assert trajectory.observation[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert trajectory.reward[[0, 1, 2, 4]].tolist() == [10.0, 11.0, 12.0, 14.0]


@pytest.mark.parametrize("rows", [4, None])
def test_a_failed_lane_begins_its_trajectory_again(rows: int | None) -> None:
    with scripted({0: Script(length=6, raises_at=frozenset({3}))}, default=Script(length=4)):
        runner = VectorRunner(SCRIPTED, 2, np.random.SeedSequence(0))
        policy = RandomPolicy(PolicySpec("random", SCRIPTED))
        policy.begin(np.random.SeedSequence(1))
        builder = TrajectoryBuilder(2, GAMMA, rows=rows)
        builder.begin(runner.reset())
        for lane in builder.idle:
            builder.assign(lane, Permit(0, lane, 0))
        done: dict[Permit, Trajectory] = {}
        while builder.busy:
            step = runner.step(policy, step=0)
            done |= builder.add(
                step.action,
                step.log_probability,
                step.reward,
                step.terminated,
                step.truncated,
                step.observation,
                step.failed,
            )
    failed, other = done[Permit(0, 0, 0)], done[Permit(0, 1, 0)]
    assert other.observation[:, 0].tolist() == [1.0] * 5
    assert other.observation[:, 2].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert failed.observation[:, 0].tolist() == [2.0] * 5
    if rows is None:
        assert failed.observation[:, 2].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert failed.valid.all()
    else:
        # The first row is the rebuilt lane's reset, which is no environment step.
        assert failed.valid.tolist() == [False, True, True, True]
