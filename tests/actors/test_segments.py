"""Segments of real environments, bit for bit, against plain lists of full transitions."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from actors.environments import EnvironmentSpec, specify
from actors.policies import PolicySpec
from actors.segments import SegmentBuilder
from actors.vector_runner import VectorRunner
from replay.messages import Batch, Push
from replay.table import TableSpec, TransitionTable
from replay.types import Segment, Segments
from tests.actors.naive import NaiveExperience, Transition, assert_equal, assert_holds, newest
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
