"""`TrajectoryQueue`: permits, exact lag, order, and that no trajectory is lost or returned twice."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.errors import ConfigurationError
from replay.messages import Permit
from replay.trajectory_queue import TrajectoryQueue
from replay.types import Trajectory


def trajectory(version: int, *, tag: float = 0.0, steps: int = 3) -> Trajectory:
    rows = steps + 1  # the last row is not a step
    valid = np.ones(rows, np.bool_)
    valid[-1] = False
    return Trajectory(
        observation=np.full((rows + 1, 1), tag, np.float32),
        action=np.zeros(rows, np.int64),
        reward=np.zeros(rows, np.float32),
        discount=np.zeros(rows, np.float32),
        valid=valid,
        log_probability=np.zeros(rows, np.float32),
        version=version,
    )


def tag_of(unit: Trajectory) -> float:
    return float(unit.observation[0, 0])


def permits_of(queue: TrajectoryQueue, worker: int, count: int, incarnation: int = 0) -> tuple[Permit, ...]:
    permits = queue.request_permits(worker, incarnation, count)
    assert not isinstance(permits, str), permits
    return permits


def batch_of(queue: TrajectoryQueue) -> tuple[Trajectory, ...]:
    batch = queue.take()
    assert not isinstance(batch, str), batch
    return batch


def fill(queue: TrajectoryQueue, worker: int = 0) -> None:
    for permit in permits_of(queue, worker, queue.units_per_batch):
        assert queue.put(permit, worker, 0, trajectory(permit.version))


def test_a_batch_is_divided_among_the_workers_and_comes_out_in_permit_order() -> None:
    queue = TrajectoryQueue(5)
    first, second = permits_of(queue, 0, 3), permits_of(queue, 1, 3)
    assert first == tuple(Permit(0, unit, 0) for unit in (0, 1, 2))
    assert second == (Permit(0, 3, 0), Permit(0, 4, 0))
    assert queue.request_permits(2, 0, 1) == "the learner: permits for all units of version 0 are issued"
    for done, permit in enumerate((second[1], first[2], second[0], first[0])):
        assert queue.take() == f"trajectories: {done} of 5 units of version 0 received"
        assert queue.put(permit, 0 if permit.unit < 3 else 1, 0, trajectory(0, tag=permit.unit))
    assert queue.complete_batches == 0
    assert queue.put(first[1], 0, 0, trajectory(0, tag=1))
    assert queue.complete_batches == 1
    assert [tag_of(unit) for unit in batch_of(queue)] == [0, 1, 2, 3, 4]
    assert queue.discarded_steps == 0


def test_a_batch_is_taken_once_and_the_next_waits_for_the_next_version() -> None:
    queue = TrajectoryQueue(2)
    fill(queue)
    batch_of(queue)
    assert queue.complete_batches == 0
    assert queue.take() == "the learner: no weights published since the batch of version 0 was taken"
    assert isinstance(queue.request_permits(0, 0, 1), str)
    queue.publish(1)
    assert permits_of(queue, 0, 9) == (Permit(1, 0, 1), Permit(1, 1, 1))


def test_lag_0_every_unit_is_of_the_version_that_trains_on_it() -> None:
    queue = TrajectoryQueue(4, version=10)
    for version in range(10, 20):
        fill(queue)
        assert {unit.version for unit in batch_of(queue)} == {version} == {queue.version}
        queue.publish(version + 1)
    assert queue.discarded_steps == 0


def test_lag_0_what_was_begun_for_an_older_version_is_discarded_and_counted() -> None:
    queue = TrajectoryQueue(3)
    a, b, late = permits_of(queue, 0, 3)
    assert queue.put(a, 0, 0, trajectory(0, steps=5))
    assert queue.put(b, 0, 0, trajectory(0, steps=7))
    queue.publish(1)
    assert queue.discarded_steps == 12
    assert not queue.put(late, 0, 0, trajectory(0, steps=9))
    assert queue.discarded_steps == 21
    fill(queue)
    assert [unit.version for unit in batch_of(queue)] == [1, 1, 1]


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_a_lag_keeps_that_many_more_batches_open_and_no_more(lag: int) -> None:
    queue = TrajectoryQueue(2, max_policy_lag=lag)
    for _ in range(1 + lag):
        fill(queue)
    assert queue.complete_batches == 1 + lag
    assert isinstance(queue.request_permits(0, 0, 1), str)  # bounded
    batch_of(queue)
    assert isinstance(queue.request_permits(0, 0, 1), str)  # until the next version
    queue.publish(1)
    assert {permit.version for permit in permits_of(queue, 0, 9)} == {1}


@pytest.mark.parametrize("lag", [0, 1, 2, 3])
def test_a_steady_learner_trains_on_nothing_older_than_the_lag_and_discards_nothing(lag: int) -> None:
    queue = TrajectoryQueue(2, max_policy_lag=lag)
    lags = []
    for version in range(20):
        while not isinstance(permits := queue.request_permits(0, 0, 2), str):
            for permit in permits:
                assert queue.put(permit, 0, 0, trajectory(permit.version))
        lags += [queue.version - unit.version for unit in batch_of(queue)]
        queue.publish(version + 1)
    assert max(lags) == lag
    assert set(lags[2 * lag :]) == {lag}
    assert queue.discarded_steps == 0


def test_a_permit_of_an_older_batch_is_good_until_the_lag_is_used_up() -> None:
    queue = TrajectoryQueue(1, max_policy_lag=1)
    (a,), (b,) = permits_of(queue, 0, 1), permits_of(queue, 1, 1)
    assert (a, b) == (Permit(0, 0, 0), Permit(1, 0, 0))
    queue.publish(1)
    assert queue.put(a, 0, 0, trajectory(0))
    queue.publish(2)
    assert queue.discarded_steps == 3  # trajectory a is too old
    assert not queue.put(b, 1, 0, trajectory(0))
    assert queue.discarded_steps == 6


def test_units_still_to_be_issued_go_out_under_the_newest_version() -> None:
    queue = TrajectoryQueue(2, max_policy_lag=1)
    (old,) = permits_of(queue, 0, 1)
    queue.publish(1)
    (new,) = permits_of(queue, 1, 1)
    assert (old, new) == (Permit(0, 0, 0), Permit(0, 1, 1))
    assert queue.put(new, 1, 0, trajectory(1))
    assert queue.put(old, 0, 0, trajectory(0))
    assert [unit.version for unit in batch_of(queue)] == [0, 1]


def test_batches_leave_in_the_order_they_were_opened_and_only_those_count_as_complete() -> None:
    queue = TrajectoryQueue(1, max_policy_lag=2)
    permits = [permits_of(queue, worker, 1)[0] for worker in range(3)]
    assert queue.put(permits[2], 2, 0, trajectory(0, tag=2))
    assert queue.put(permits[1], 1, 0, trajectory(0, tag=1))
    assert queue.complete_batches == 0
    assert queue.take() == "trajectories: 0 of 1 units of version 0 received"
    assert queue.put(permits[0], 0, 0, trajectory(0, tag=0))
    assert queue.complete_batches == 3
    assert [tag_of(batch_of(queue)[0]) for _ in range(3)] == [0, 1, 2]


def test_the_permits_of_a_dead_worker_are_issued_again() -> None:
    queue = TrajectoryQueue(4)
    done, lost, also_lost = permits_of(queue, 0, 3)
    (other,) = permits_of(queue, 1, 1)
    assert queue.put(done, 0, 0, trajectory(0, tag=0))
    assert queue.revoke(0, 0) == 2
    assert queue.revoke(0, 0) == 0
    assert not queue.put(lost, 0, 0, trajectory(0))  # the worker had not died
    assert queue.discarded_steps == 3
    again = permits_of(queue, 0, 9, incarnation=1)
    assert sorted(permit.unit for permit in again) == [lost.unit, also_lost.unit]
    assert not queue.put(lost, 0, 0, trajectory(0))  # it may not use a permit of its successor either
    for permit in again:
        assert queue.put(permit, 0, 1, trajectory(0, tag=permit.unit))
    assert queue.put(other, 1, 0, trajectory(0, tag=other.unit))
    assert [tag_of(unit) for unit in batch_of(queue)] == [0, 1, 2, 3]
    assert queue.discarded_steps == 6


def test_revoking_leaves_other_workers_and_incarnations_alone() -> None:
    queue = TrajectoryQueue(3)
    (mine,), (other,), (successor,) = (
        permits_of(queue, 0, 1),
        permits_of(queue, 1, 1),
        permits_of(queue, 0, 1, incarnation=1),
    )
    assert queue.revoke(0, 0) == 1
    assert queue.put(other, 1, 0, trajectory(0))
    assert queue.put(successor, 0, 1, trajectory(0))
    assert permits_of(queue, 2, 9) == (mine,)


def test_revoking_reaches_every_open_batch() -> None:
    queue = TrajectoryQueue(1, max_policy_lag=2)
    held = [permits_of(queue, 0, 1)[0] for _ in range(3)]
    assert queue.revoke(0, 0) == 3
    assert [permits_of(queue, 1, 1)[0] for _ in range(3)] == held


def test_a_permit_is_spent_once() -> None:
    queue = TrajectoryQueue(2)
    first, _ = permits_of(queue, 0, 2)
    assert queue.put(first, 0, 0, trajectory(0, tag=1))
    assert not queue.put(first, 0, 0, trajectory(0, tag=2))
    assert queue.discarded_steps == 3
    assert queue.take() == "trajectories: 1 of 2 units of version 0 received"


@pytest.mark.parametrize("forged", [Permit(0, 1, 0), Permit(0, 9, 0), Permit(7, 0, 0), Permit(0, 0, 5)])
def test_experience_without_a_permit_is_discarded(forged: Permit) -> None:
    queue = TrajectoryQueue(2)
    permits_of(queue, 0, 1)
    assert not queue.put(forged, 0, 0, trajectory(forged.version))
    assert queue.discarded_steps == 3


def test_a_trajectory_of_another_version_than_its_permit_is_discarded() -> None:
    queue = TrajectoryQueue(1, version=4)
    (permit,) = permits_of(queue, 0, 1)
    assert not queue.put(permit, 0, 0, trajectory(3))
    assert queue.discarded_steps == 3
    assert queue.put(permit, 0, 0, trajectory(4))  # the rejected trajectory has not used up the permit


def test_versions_only_grow() -> None:
    queue = TrajectoryQueue(1, version=5)
    with pytest.raises(ValueError, match="the version must be at least 5, got 4"):
        queue.publish(4)
    assert queue.version == 5


def test_publishing_a_version_again_changes_nothing_that_is_open() -> None:
    queue = TrajectoryQueue(1, version=5)
    (permit,) = permits_of(queue, 0, 1)
    queue.publish(5)
    assert queue.put(permit, 0, 0, trajectory(5))
    assert len(batch_of(queue)) == 1


def test_a_jump_in_versions_gives_up_every_open_batch() -> None:
    queue = TrajectoryQueue(1, max_policy_lag=2)
    fill(queue)
    queue.publish(100)
    assert queue.discarded_steps == 3
    assert permits_of(queue, 0, 1)[0].version == 100


@pytest.mark.parametrize(("units", "lag", "text"), [(0, 0, "units_per_batch"), (-1, 0, "units"), (1, -1, "lag")])
def test_refuses_counts_that_cannot_work(units: int, lag: int, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        TrajectoryQueue(units, max_policy_lag=lag)


def test_a_new_incarnation_takes_back_what_earlier_ones_of_its_worker_hold() -> None:
    queue = TrajectoryQueue(2, max_policy_lag=2)
    held = [*permits_of(queue, 0, 2), *permits_of(queue, 0, 1, incarnation=2)]
    (other,), (newer,) = permits_of(queue, 1, 1), permits_of(queue, 0, 1, incarnation=5)
    queue.revoke_earlier(0, 5)
    assert permits_of(queue, 0, 9, incarnation=5) == (held[1], held[0])
    assert permits_of(queue, 0, 9, incarnation=5) == (held[2],)
    assert not queue.put(held[0], 0, 0, trajectory(0))
    assert queue.put(newer, 0, 5, trajectory(0))
    queue.revoke_earlier(0, 4)  # a late call of an older incarnation has no effect
    assert queue.put(other, 1, 0, trajectory(0))
    assert queue.put(held[0], 0, 5, trajectory(0))


def test_what_is_in_stays_when_its_maker_is_forgotten() -> None:
    queue = TrajectoryQueue(2)
    done, lost = permits_of(queue, 0, 2)
    assert queue.put(done, 0, 0, trajectory(0, tag=1))
    queue.revoke_earlier(0, 1)
    assert permits_of(queue, 0, 9, incarnation=1) == (lost,)
    assert queue.put(lost, 0, 1, trajectory(0, tag=2))
    assert [tag_of(unit) for unit in batch_of(queue)] == [1, 2]


def test_a_batch_is_begun_with_its_first_permit_and_incomplete_until_its_last_unit() -> None:
    queue = TrajectoryQueue(2)

    def state() -> tuple[bool, bool]:
        return queue.started, queue.incomplete

    assert state() == (False, False)
    (first,), _ = permits_of(queue, 0, 1), permits_of(queue, 1, 1)
    assert state() == (True, True)
    assert queue.put(first, 0, 0, trajectory(0))
    queue.revoke(1, 0)
    assert state() == (True, True)
    (second,) = permits_of(queue, 0, 9)
    assert queue.put(second, 0, 0, trajectory(0))
    assert state() == (True, False)
    batch_of(queue)
    assert state() == (False, False)
    queue.publish(1)
    permits_of(queue, 0, 1)
    queue.revoke(0, 0)
    assert state() == (False, False), "no permit of the batch is in use any more"


def test_a_batch_may_be_gone_on_with_but_not_begun() -> None:
    queue = TrajectoryQueue(2, max_policy_lag=1)
    assert isinstance(queue.request_permits(0, 0, 9, may_start=False), str)
    permits_of(queue, 0, 1)
    assert queue.request_permits(1, 0, 9, may_start=False) == (Permit(0, 1, 0),)
    assert isinstance(queue.request_permits(1, 0, 9, may_start=False), str)
    assert permits_of(queue, 1, 9) == (Permit(1, 0, 0), Permit(1, 1, 0))


def test_a_batch_before_one_that_was_begun_is_under_way_too() -> None:
    """Batches leave in order, so an older incomplete batch delays the started one."""
    queue = TrajectoryQueue(1, max_policy_lag=2)
    (lost,), (kept,) = permits_of(queue, 0, 1), permits_of(queue, 1, 1)
    assert queue.put(kept, 1, 0, trajectory(0))
    queue.revoke(0, 0)
    assert queue.started
    assert queue.incomplete
    assert queue.request_permits(1, 0, 9, may_start=False) == (lost,)
    assert isinstance(queue.request_permits(1, 0, 9, may_start=False), str)
    assert queue.put(lost, 1, 0, trajectory(0))
    assert not queue.incomplete
    assert queue.complete_batches == 2


def test_number_and_memory_are_of_what_is_held() -> None:
    queue = TrajectoryQueue(2, max_policy_lag=1)
    assert (len(queue), queue.bytes) == (0, 0)
    permits = [*permits_of(queue, 0, 2), *permits_of(queue, 0, 1)]
    made = [trajectory(0, steps=steps) for steps in (1, 4, 9)]
    for permit, unit in zip(permits, made, strict=True):
        assert queue.put(permit, 0, 0, unit)
    assert len(queue) == 3
    arrays = ("observation", "action", "reward", "discount", "valid", "log_probability")
    assert queue.bytes == sum(unit.bytes for unit in made)
    assert queue.bytes == pytest.approx(sum(getattr(unit, name).nbytes for unit in made for name in arrays), rel=0.2)
    batch_of(queue)
    assert (len(queue), queue.bytes) == (1, made[2].bytes)
    queue.publish(2)
    assert (len(queue), queue.bytes, queue.discarded_steps) == (0, 0, 9)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(0, 3), st.integers(1, 4), st.randoms(use_true_random=False))
def test_whatever_happens_each_step_is_taken_once_or_discarded_once_within_the_lag(
    units: int, lag: int, workers: int, rng: random.Random
) -> None:
    queue = TrajectoryQueue(units, max_policy_lag=lag)
    incarnations = [0] * workers
    held: list[tuple[Permit, int, int]] = []
    put: set[float] = set()
    taken: list[float] = []
    discarded = offered = 0
    for tag in range(150):
        worker = rng.randrange(workers)
        match rng.choice(["request", "request", "put", "put", "put", "take", "publish", "die", "return"]):
            case "request":
                permits = queue.request_permits(worker, incarnations[worker], rng.randint(1, 3))
                if not isinstance(permits, str):
                    assert {permit.version for permit in permits} == {queue.version}
                    held += [(permit, worker, incarnations[worker]) for permit in permits]
            case "put" if held:
                permit, worker, incarnation = rng.choice(
                    held
                )  # sometimes for the second time, or after the worker's exit
                offered += 2
                unit = trajectory(permit.version, tag=float(tag), steps=2)
                if queue.put(permit, worker, incarnation, unit):
                    assert incarnation == incarnations[worker]
                    assert queue.version - permit.version <= lag
                    put.add(float(tag))
                else:
                    discarded += 2
            case "take":
                ready, batch = queue.complete_batches, queue.take()
                assert isinstance(batch, str) == (ready == 0)
                if not isinstance(batch, str):
                    assert len(batch) == units
                    assert all(0 <= queue.version - unit.version <= lag for unit in batch)
                    taken += [tag_of(unit) for unit in batch]
            case "publish":
                queue.publish(queue.version + rng.randint(1, 2))
            case "die":
                queue.revoke(worker, incarnations[worker])
                incarnations[worker] += 1
            case "return":
                incarnations[worker] += 1
                queue.revoke_earlier(worker, incarnations[worker])
        assert queue.discarded_steps >= discarded
    assert len(taken) == len(set(taken))
    assert set(taken) <= put
    # All trajectories in the queue become too old; then each offered step was taken or discarded.
    queue.publish(queue.version + lag + 1)
    assert offered == 2 * len(taken) + queue.discarded_steps
