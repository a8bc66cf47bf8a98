"""Segments and trajectories of real environments, bit for bit, against plain lists of full transitions."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from actors.environments import EnvironmentSpec, specify
from actors.policies import PolicySpec
from actors.segments import SegmentBuilder, TrajectoryBuilder
from actors.vector_runner import VectorRunner
from replay.messages import Batch, Push
from replay.table import TableSpec, TransitionTable
from replay.trajectory_queue import Permit, TrajectoryQueue
from replay.types import Segment, Segments, Trajectory
from tests.actors.naive import NaiveExperience, NaiveLane, Transition, assert_equal, assert_holds, newest
from tests.actors.toys import RandomPolicy, Script, scripted
from tests.replay.naive import assert_same_bits, read_everything

GAMMA = 0.97
SHORT = specify("SquallShort-v0")
STACKS = replace(specify("SquallStacks-v0"), frame_stack=4)
SCRIPTED = specify("SquallScripted-v0")


class Rig:
    """An environment under random actions, a builder, a table, and the reference implementation."""

    def __init__(
        self, environment: EnvironmentSpec, *, lanes: int, n_steps: int, length: int, capacity: int, seed: int = 0
    ) -> None:
        layout = environment.layout(segment_length=length, n_steps=n_steps)
        self.policy = RandomPolicy(PolicySpec("random", environment))
        self.policy.begin(np.random.SeedSequence(seed))
        self.runner = VectorRunner(environment, lanes, np.random.SeedSequence((seed, 1)))
        self.naive = NaiveExperience(self.runner, segment_length=length, n_steps=n_steps, gamma=GAMMA)
        self.builder = SegmentBuilder(layout, lanes, GAMMA)
        self.table = TransitionTable(TableSpec(layout, capacity), seed=np.random.SeedSequence(seed))
        self.segments: list[Segment] = []
        self.cut: list[Segments] = []
        self.items: list[Batch] = []
        self.steps = 0
        self._before: list[Transition] = []
        self.terminated = self.truncated = 0

    def begin(self) -> None:
        self._before = self.expected
        self.builder.begin(self.runner.reset())

    @property
    def expected(self) -> list[Transition]:
        return self._before + self.naive.in_order()

    def roll_out(self, rows: int) -> None:
        for _ in range(rows):
            observation = np.stack([lane.shown[-1] for lane in self.naive.lanes])
            step = self.runner.step(self.policy, step=0)
            assert_same_bits(self.policy.shown.pop(), observation)
            cut = self.builder.add(
                step.action, step.reward, step.terminated, step.truncated, step.observation, step.failed
            )
            if cut is not None:
                self.cut.append(cut)
                self.insert(cut)
            self.steps += step.steps
            self.terminated += int(step.terminated.sum())
            self.truncated += int((step.truncated & ~step.terminated).sum())

    def insert(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            self.table.insert([segment])
            self.items.append(newest(self.table, segment.steps))
        self.segments += segments

    def check(self, *, flushed: bool) -> None:
        """Check the live items, and each item at its insertion: no transition is lost or repeated."""
        inserted = self.table.evicted + self.table.size
        expected = self.expected if flushed else self.expected[:inserted]
        assert_holds(self.table, expected)
        if expected:
            assert_equal(self.items, expected)


def roll_out_twice(rig: Rig, rows: int) -> None:
    """Roll out, check, continue, flush, check; reset and repeat, so that the ring buffer wraps more than once."""
    for _ in range(2):
        rig.begin()
        rig.roll_out(rows)
        rig.check(flushed=False)
        rig.roll_out(rows // 2 + 1)
        rig.insert(rig.builder.flush())
        rig.check(flushed=True)
    assert rig.steps == rig.table.evicted + rig.table.size
    assert rig.table.evicted > 0
    rig.runner.close()


@pytest.mark.parametrize("environment", [SHORT, STACKS], ids=["vectors", "stacks"])
@pytest.mark.parametrize("lanes", [1, 2, 5])
@pytest.mark.parametrize("n_steps", [1, 3, 5])
@pytest.mark.parametrize("length", [1, 4, 16, 64])
def test_every_item_of_short_episodes(environment: EnvironmentSpec, lanes: int, n_steps: int, length: int) -> None:
    seed = 100 * lanes + 10 * n_steps + length
    rig = Rig(environment, lanes=lanes, n_steps=n_steps, length=length, capacity=lanes * length + 30, seed=seed)
    roll_out_twice(rig, 2 * length + seed % 7 + 40)
    assert rig.terminated > 0
    assert rig.truncated > 0
    if length >= 16:
        # A reset inside a segment leaves a gap between its steps; these short episodes leave several.
        assert max(int((np.diff(segment.row) > 1).sum()) for segment in rig.segments) > 1


@pytest.mark.parametrize("environment", [SHORT, STACKS], ids=["vectors", "stacks"])
@pytest.mark.parametrize("n_steps", [1, 3, 5])
@pytest.mark.parametrize("length", [1, 4])
def test_a_flush_at_any_row_loses_nothing(environment: EnvironmentSpec, n_steps: int, length: int) -> None:
    for rows in range(2 * length + n_steps + 3):
        rig = Rig(environment, lanes=2, n_steps=n_steps, length=length, capacity=100, seed=rows)
        rig.begin()
        rig.roll_out(rows)
        pushed = len(rig.segments)
        rig.insert(rig.builder.flush())
        rig.check(flushed=True)
        assert rig.table.size == rig.steps
        assert not rig.builder.flush()
        assert sum(segment.steps for segment in rig.segments[pushed:]) <= 2 * (length + max(n_steps - 2, 0))


@pytest.mark.parametrize("lanes", [1, 7])
def test_a_push_has_as_many_arrays_as_a_segment_has_however_many_lanes_there_are(lanes: int) -> None:
    rig = Rig(SHORT, lanes=lanes, n_steps=1, length=16, capacity=200)
    rig.begin()
    rig.roll_out(16)
    whole = rig.cut[-1]
    assert len(whole) == lanes
    buffers: list[Any] = []
    pickle.dumps(Push(0, 0, 0, whole), protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == len(fields(Segments)) == 10


def test_a_flushed_tail_has_shorter_returns() -> None:
    with scripted(default=Script(length=100, reward=2.0)):
        rig = Rig(SCRIPTED, lanes=1, n_steps=3, length=8, capacity=8)
        rig.begin()
        rig.roll_out(4)
        [segment] = rig.builder.flush()
    assert segment.reward.tolist() == pytest.approx([2 * (1 + 0.97 + 0.97**2)] * 2 + [2 * 1.97, 2.0])
    assert segment.discount.tolist() == pytest.approx([0.97**3, 0.97**3, 0.97**2, 0.97])
    assert segment.bootstrap_row.tolist() == [3, 4, 4, 4]


@pytest.mark.parametrize("n_steps", [1, 3, 5])
@pytest.mark.parametrize("most_steps", [1, 2, 7, 30])
def test_every_item_of_the_native_cart_pole(n_steps: int, most_steps: int) -> None:
    environment = specify("CartPole-v1", {"max_episode_steps": most_steps})
    rig = Rig(environment, lanes=5, n_steps=n_steps, length=16, capacity=150)
    roll_out_twice(rig, 90)
    assert rig.truncated > 0
    assert rig.terminated > 0 or most_steps < 8


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("Pendulum-v1", {"max_episode_steps": 9}), ("FrozenLake-v1", {}), ("Acrobot-v1", {"max_episode_steps": 20})],
)
def test_every_item_of_a_sync_vector(name: str, arguments: dict[str, Any]) -> None:
    rig = Rig(specify(name, arguments), lanes=2, n_steps=3, length=16, capacity=100)
    roll_out_twice(rig, 70)
    assert rig.terminated + rig.truncated > 0


@pytest.mark.parametrize(
    ("name", "arguments", "lanes", "n_steps", "length", "rows"),
    [
        ("PongNoFrameskip-v4", {"max_num_frames_per_episode": 200}, 2, 3, 16, 110),
        ("PongNoFrameskip-v4", {"max_num_frames_per_episode": 12}, 1, 5, 4, 60),
        ("PongNoFrameskip-v4", {}, 1, 1, 64, 140),
        ("BreakoutNoFrameskip-v4", {"episodic_life": True}, 5, 5, 64, 80),
        ("ALE/Breakout-v5", {"episodic_life": True, "max_num_frames_per_episode": 100}, 2, 1, 1, 90),
    ],
)
def test_every_item_of_atari(
    name: str, arguments: dict[str, Any], lanes: int, n_steps: int, length: int, rows: int
) -> None:
    environment = specify(name, arguments)
    assert environment.frame_stack == 4
    rig = Rig(environment, lanes=lanes, n_steps=n_steps, length=length, capacity=lanes * (length + 9))
    roll_out_twice(rig, rows)
    assert rig.truncated > 0 or "max_num_frames_per_episode" not in arguments
    assert rig.terminated > 0 or "episodic_life" not in arguments


@pytest.mark.parametrize("environment", [SHORT, STACKS], ids=["vectors", "stacks"])
def test_sampling_hands_out_the_same_items(environment: EnvironmentSpec) -> None:
    rig = Rig(environment, lanes=3, n_steps=3, length=8, capacity=70)
    rig.begin()
    rig.roll_out(90)
    rig.insert(rig.builder.flush())
    assert rig.table.evicted > 0
    live, sampled = rig.expected[-rig.table.size :], read_everything(rig.table)
    for name in ("observation", "action", "reward", "discount", "next_observation"):
        assert_same_bits(getattr(sampled, name)[0], np.stack([getattr(transition, name) for transition in live]))


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("broken_step", range(1, 15))
def test_a_failed_lane_alone_loses_its_unsent_rows(n_steps: int, broken_step: int) -> None:
    script = Script(length=6, raises_at=frozenset({broken_step}))
    with scripted({1: script}, default=Script(length=5)) as scenario:
        rig = Rig(SCRIPTED, lanes=3, n_steps=n_steps, length=4, capacity=500)
        rig.begin()
        rig.roll_out(40)
        rig.insert(rig.builder.flush())
        rig.runner.close()
    failed_row = broken_step - 1 + (broken_step - 1) // 6
    assert rig.naive.failures == [(failed_row, 1)]
    assert scenario.made == 4
    assert scenario.closed[0] == 1
    rig.check(flushed=True)
    # `check` implies this already, but it is the essential property: no transition spans two instances.
    items = rig.expected
    assert all((item.observation[:2] == item.next_observation[:2]).all() for item in items)
    steps = {instance: sum(item.observation[0] == instance for item in items) for instance in range(4)}
    # Without a failure, a lane takes 5 steps in 6 rows. The rebuilt lane resets in the row after its failure.
    assert steps[0] == steps[2] == 34
    rows_left = 40 - (failed_row + 2)
    assert steps[3] == rows_left - rows_left // 6
    sent_rows = max(0, failed_row - (n_steps - 1)) // 4 * 4
    assert steps[1] == sent_rows - sent_rows // 7
    assert rig.steps == 34 * 2 + steps[3] + broken_step - 1


def test_a_lane_that_fails_all_the_time_sends_nothing() -> None:
    with scripted({0: Script(raises_at=frozenset({1})), 2: Script(raises_at=frozenset({1}))}, Script(length=9)):
        rig = Rig(SCRIPTED, lanes=2, n_steps=2, length=2, capacity=50)
        rig.begin()
        rig.roll_out(4)
        rig.insert(rig.builder.flush())
        rig.check(flushed=True)
    assert rig.naive.failures == [(0, 0), (2, 0)]
    assert {float(item.observation[0]) for item in rig.expected} == {1.0}


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
