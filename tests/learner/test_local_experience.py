"""Tests of experience generated in this process: the limiter's ratio, counted steps, epochs, and trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from learner import AdvantageActorCritic, Reinforce
from learner.experience import Experience, LocalTransitions
from replay.messages import Batch
from replay.types import Segment
from tests.learner.toys import Tally, local_transitions, small, small_dqn, toy

# Transitions.


class Meter:
    """Counts the steps inserted into an experience's table and the transitions sampled from the table."""

    def __init__(self, experience: LocalTransitions, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inserts = self.samples = 0
        self.first_sample_at: int | None = None
        table = experience._table
        insert, sample = table.insert, table.sample

        def counted_insert(segments: Sequence[Segment]) -> None:
            insert(segments)
            for segment in segments:
                self.inserts += segment.steps
                self.rewards = segment.reward

        def counted_sample(k: int, batch_size: int) -> Batch:
            self.first_sample_at = self.first_sample_at or self.inserts
            self.samples += k * batch_size
            return sample(k, batch_size)

        monkeypatch.setattr(table, "insert", counted_insert)
        monkeypatch.setattr(table, "sample", counted_sample)


@pytest.mark.parametrize(
    ("updates_per_step", "k", "num_envs"), [(1.0, 1, 1), (0.25, 1, 4), (0.25, 8, 2), (4.0, 8, 3), (1.0, 32, 1)]
)
def test_it_keeps_the_ratio(updates_per_step: float, k: int, num_envs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"updates_per_step": updates_per_step, "updates_per_training_step": k, "num_envs": num_envs}
    experience = local_transitions(warm_start_size=100, **options)
    meter = Meter(experience, monkeypatch)
    ratio, tolerance = 8 * updates_per_step, max(8 * k, 8 * updates_per_step * num_envs * 4)
    for _ in range(-(-800 // k)):
        experience.next()
        assert abs(meter.samples - ratio * (meter.inserts - 100)) <= 2 * tolerance
    assert meter.samples / (meter.inserts - 100) == pytest.approx(ratio, rel=2 * tolerance / meter.samples)


@pytest.mark.parametrize("warm_start_size", [1, 100])
def test_nothing_is_drawn_before_the_warm_start(warm_start_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    experience = local_transitions(warm_start_size=warm_start_size, num_envs=2, segment_length=4)
    meter = Meter(experience, monkeypatch)
    experience.next()
    assert meter.first_sample_at is not None
    assert warm_start_size <= meter.first_sample_at <= warm_start_size + 2 * 4


def test_only_real_steps_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fourth row is a reset, which is not an environment step."""
    Tally.steps = 0
    experience = local_transitions(num_envs=3, segment_length=4, warm_start_size=90)
    meter = Meter(experience, monkeypatch)
    experience.next()
    assert experience.env_steps == Tally.steps
    assert meter.inserts <= experience.env_steps < meter.inserts + 3 * 4
    assert [episode.length for episode in experience.episodes] == [3] * len(experience.episodes)
    assert 3 * len(experience.episodes) <= experience.env_steps < 3 * len(experience.episodes) + 9


@pytest.mark.parametrize(("clip", "seen"), [(None, 5.0), (False, 5.0), (True, 1.0)])
def test_rewards_are_clipped_for_the_learner_and_never_in_returns(clip: bool | None, seen: float) -> None:
    experience = local_transitions(clip_rewards=clip)
    assert set(experience.next().reward.ravel().tolist()) == {seen}
    assert {episode.episode_return for episode in experience.episodes} == {15.0}


def test_exploration_follows_the_step_count(monkeypatch: pytest.MonkeyPatch) -> None:
    module = small_dqn("SquallTally-v0", num_envs=2)
    experience = module.train_dataloader()
    steps: list[int] = []
    act = module.policy.act

    def watched(observation: Any, *, step: int, greedy: bool = False) -> Any:
        steps.append(step)
        assert not greedy
        return act(observation, step=step)

    monkeypatch.setattr(module.policy, "act", watched)
    experience.next()  # type: ignore[union-attr]
    assert steps[:5] == [0, 2, 4, 6, 6], "the fourth row of each lane is a reset"
    module.experience = None
    module.env_steps = 1_000
    steps.clear()
    module.train_dataloader().next()
    assert steps[0] == 1_000


@pytest.mark.parametrize(("length", "k", "items"), [(10, 1, 10), (10, 4, 3), (8, 4, 2)])
def test_an_epoch_has_the_length_it_says(length: int, k: int, items: int) -> None:
    experience = local_transitions(batches_per_epoch=length, updates_per_training_step=k)
    assert len(experience) == items
    for _ in range(2):
        shapes = [tuple(batch.observation.shape) for batch in experience]
        assert shapes == [(k, 8, 2)] * items


def test_epochs_go_on_where_the_last_one_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    experience = local_transitions(batches_per_epoch=5)
    resets = 0
    reset = experience._runner.reset

    def counted() -> Any:
        nonlocal resets
        resets += 1
        return reset()

    monkeypatch.setattr(experience._runner, "reset", counted)
    steps = []
    for _ in range(3):
        list(experience)
        steps.append(experience.env_steps)
    assert steps == sorted(set(steps))
    assert resets == 1


def test_priorities_reach_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    experience = local_transitions()
    received: list[Any] = []
    monkeypatch.setattr(experience._table, "update_priorities", lambda *arguments: received.append(arguments))
    experience.update_priorities(np.array([3]), np.array([0.5]))
    assert received == [(np.array([3]), np.array([0.5]))]


# Trajectories.


@pytest.mark.parametrize("num_envs", [1, 2, 4])
def test_unrolls_go_on_across_batches(num_envs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 trajectories of 5 rows. A lane's last observation is the first of its next trajectory: lanes are not reset."""
    module = small(AdvantageActorCritic, toy(lengths=(2, 7)), num_envs=num_envs, batch_size=20, unroll_length=5)
    resets = 0
    experience = module.train_dataloader()
    reset = experience._runner.reset

    def counted() -> Any:
        nonlocal resets
        resets += 1
        return reset()

    monkeypatch.setattr(experience._runner, "reset", counted)
    last: dict[int, torch.Tensor] = {}
    for _ in range(4):
        batch = experience.next()
        assert batch.reward.shape == (4, 5)
        for unit in range(4):
            lane = unit % num_envs
            if lane in last:
                assert torch.equal(batch.observation[unit, 0], last[lane])
            last[lane] = batch.observation[unit, -1]
        # The row after an episode's end is not a step; its next observation is that of the reset.
        for observation, valid in zip(batch.observation, batch.valid, strict=True):
            for row in range(5):
                step, length = observation[row, :2].tolist()
                assert bool(valid[row]) is (step < length)
                if not valid[row]:
                    assert observation[row + 1, 0] == 0
    assert resets == 1


def test_only_steps_of_unrolls_are_counted() -> None:
    module = small(AdvantageActorCritic, toy(lengths=(2,)), num_envs=4, batch_size=24, unroll_length=6)
    experience = module.train_dataloader()
    batch = experience.next()
    assert experience.env_steps == int(batch.valid.sum()) == 4 * 4
    assert [episode.length for episode in experience.episodes] == [2] * 8  # type: ignore[attr-defined]


@pytest.mark.parametrize(("num_envs", "episodes"), [(1, 2), (3, 4), (4, 3)])
def test_whole_episodes_begin_at_a_reset_and_lanes_play_in_turn(num_envs: int, episodes: int) -> None:
    module = small(Reinforce, toy(lengths=(1, 3, 6)), num_envs=num_envs, num_batch_episodes=episodes)
    experience = module.train_dataloader()
    starts = set()
    for _ in range(5):
        batch = experience.next()
        assert len(batch.reward) == episodes
        assert not batch.observation[:, 0, 0].any()
        starts |= {tuple(observation.tolist()) for observation in batch.observation[:, 0]}
    assert len(starts) == 5 * episodes, "each reset has its own seed"


def test_moments_of_discounted_returns_are_those_of_all_steps() -> None:
    """G is 5, 7.5, and 8.75 over the three steps of each episode."""
    module = small(Reinforce, toy(lengths=(3,), pays=5.0), gamma=0.5, num_batch_episodes=2, normalize_rewards=True)
    experience = module.train_dataloader()
    for batches in (1, 2):
        experience.next()
        assert experience.returns.count == 6 * batches
        assert experience.returns.mean == pytest.approx(np.mean([5.0, 7.5, 8.75]))
        assert experience.returns.std == pytest.approx(np.std([5.0, 7.5, 8.75]))


def test_trajectories_have_no_priorities() -> None:
    with pytest.raises(NotImplementedError):
        Experience[Any](3).update_priorities(np.array([3]), np.array([0.5]))
    assert len(Experience[Any](3)) == 3
