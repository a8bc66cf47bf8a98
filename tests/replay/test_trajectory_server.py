"""`TrajectoryServer` as a plain object: replies, repeated pushes, invalid permits, and totals."""

from __future__ import annotations

import os
import random
import socket
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.errors import LayoutMismatch
from replay.messages import Permit, Push
from replay.server import Counters
from replay.trajectory_server import QueueSpec, QueueStats, TrajectoryServer
from replay.types import EpisodeResult, Layout, Moments, Trajectory

LAYOUT = Layout((2,), "float32", 1, (), "int64", segment_length=1, n_steps=1)


def trajectory(version: int, rows: int = 3) -> Trajectory:
    return Trajectory(
        observation=np.zeros((rows + 1, 2), np.float32),
        action=np.zeros(rows, np.int64),
        reward=np.ones(rows, np.float32),
        discount=np.ones(rows, np.float32),
        valid=np.array([True] * (rows - 1) + [False]),
        log_probability=np.zeros(rows, np.float32),
        version=version,
    )


def push(permits: tuple[Permit, ...], sequence: int = 0, worker: int = 0, incarnation: int = 0) -> Push:
    made = tuple((permit, trajectory(permit.version)) for permit in permits)
    returns = Moments.of(np.arange(3.0) + sequence)
    return Push(worker, incarnation, sequence, trajectories=made, episodes=(EpisodeResult(1.0, 2),), returns=returns)


def test_a_batch_goes_from_permits_to_the_learner_once() -> None:
    server = TrajectoryServer(QueueSpec(LAYOUT, 2))
    assert "0 of 2 units" in str(server.take().wait)
    assert server.stats().waiting == {"learner": server.take().wait}
    permits = server.request_permits(0, 0, 5).permits
    assert [permit.unit for permit in permits] == [0, 1]
    assert "permits for all units of version 0 are issued" in str(server.request_permits(1, 0, 1).wait)
    assert server.insert(push(permits)).env_steps == 4, "invalid rows are not steps"
    taken = server.take().trajectories
    assert taken is not None
    assert len(taken) == 2
    assert "no weights published" in str(server.take().wait)
    counters = server.stats().counters
    assert (counters.env_steps, counters.samples, counters.counted_inserts) == (4, 4, 4)
    assert len(server.drain_episodes()) == 1
    assert server.drain_episodes() == ()


def test_a_repeated_push_counts_once() -> None:
    server = TrajectoryServer(QueueSpec(LAYOUT, 2))
    sent = push(server.request_permits(0, 0, 1).permits)
    assert server.insert(sent).accepted
    again = server.insert(sent)
    assert again.repeated
    assert again.env_steps == 2
    assert server.stats().repeated_pushes == 1
    assert server.stats().discarded_steps == 0


def test_what_comes_too_late_is_discarded_and_counted() -> None:
    server = TrajectoryServer(QueueSpec(LAYOUT, 1))
    permits = server.request_permits(0, 0, 1).permits
    server.publish(1)
    assert server.insert(push(permits)).env_steps == 0
    assert server.stats().discarded_steps == 2
    assert server.request_permits(0, 0, 1).permits[0].version == 1


def test_a_trajectory_that_does_not_fit_is_refused_whole() -> None:
    server = TrajectoryServer(QueueSpec(LAYOUT, 1))
    permit = server.request_permits(0, 0, 1).permits[0]
    wrong = replace(trajectory(0), reward=np.ones(3, np.float64))
    with pytest.raises(
        LayoutMismatch, match=r"reward must have shape \(3,\) and dtype float32, got \(3,\) and float64"
    ):
        server.insert(Push(0, 0, 0, trajectories=((permit, wrong),)))
    assert server.insert(push((permit,))).accepted


def test_the_end_lets_a_complete_batch_out_and_no_permit() -> None:
    server = TrajectoryServer(QueueSpec(LAYOUT, 1))
    server.insert(push(server.request_permits(0, 0, 1).permits))
    server.finish()
    assert server.request_permits(0, 0, 1).finished
    assert server.take().trajectories is not None
    assert server.take().finished
    assert server.stats().waiting == {}


def test_a_batch_that_was_begun_when_the_steps_were_reached_is_completed_first() -> None:
    server = TrajectoryServer(QueueSpec(LAYOUT, 3), max_env_steps=4)
    mine, other = server.request_permits(0, 0, 2).permits, server.request_permits(1, 0, 1).permits
    assert server.insert(push(mine)).env_steps == 4
    for _ in range(2):
        waiting = server.request_permits(0, 0, 1)
        assert (waiting.finished, waiting.permits) == (False, ())
        assert "are issued" in str(waiting.wait)
        assert "2 of 3 units" in str(server.take().wait)
    assert set(server.stats().waiting) == {"worker-0", "learner"}
    assert server.insert(push(other, worker=1)).env_steps == 6
    assert server.request_permits(0, 0, 1).finished, "no worker is needed any more"
    assert not server.take().finished
    assert server.take().finished
    server.publish(1)
    assert server.take().finished
    assert server.request_permits(1, 0, 1).finished
    assert server.stats().waiting == {}


def test_the_units_that_are_not_handed_out_yet_are_completed_too() -> None:
    server = TrajectoryServer(QueueSpec(LAYOUT, 3), max_env_steps=1)
    for sequence in range(3):
        permits = server.request_permits(0, 0, 1).permits
        assert [permit.unit for permit in permits] == [sequence]
        assert server.insert(push(permits, sequence)).accepted
    assert server.request_permits(0, 0, 1).finished
    taken = server.take().trajectories
    assert taken is not None
    assert len(taken) == 3
    assert server.take().finished


def test_before_the_steps_are_reached_every_version_begins_a_batch() -> None:
    server = TrajectoryServer(QueueSpec(LAYOUT, 1), max_env_steps=6)
    for version in range(3):
        permits = server.request_permits(0, 0, 1).permits
        assert server.insert(push(permits, version)).env_steps == 2 * (version + 1)
        assert server.take().trajectories is not None
        server.publish(version + 1)
    assert server.request_permits(0, 0, 1).finished
    assert server.take().finished
    assert TrajectoryServer(QueueSpec(LAYOUT, 1), max_env_steps=None).request_permits(0, 0, 1).permits


def test_totals_carried_over_count_towards_the_end() -> None:
    server = TrajectoryServer(QueueSpec(LAYOUT, 1), carried=Counters(6, 6, 6), max_env_steps=6)
    assert server.take().finished
    assert server.request_permits(0, 0, 1).finished


@pytest.mark.parametrize("begun", [False, True])
def test_an_early_end_completes_what_was_begun(begun: bool) -> None:
    server = TrajectoryServer(QueueSpec(LAYOUT, 2))
    permits = server.request_permits(0, 0, 1).permits if begun else ()
    server.finish()
    assert server.take().finished is not begun
    reply = server.request_permits(1, 0, 5)
    assert reply.finished is not begun
    if begun:
        assert server.insert(push(permits)).accepted
        assert server.insert(push(reply.permits, worker=1)).accepted
        assert server.take().trajectories is not None
    assert server.take().finished


def test_a_dead_worker_does_not_hold_up_the_end() -> None:
    server = TrajectoryServer(QueueSpec(LAYOUT, 2), max_env_steps=2)
    lost, mine = server.request_permits(0, 0, 1).permits, server.request_permits(1, 0, 1).permits
    assert server.insert(push(mine, worker=1)).accepted
    assert server.request_permits(1, 0, 1).wait is not None
    assert server.revoke(0, 0) == 1
    assert server.request_permits(1, 0, 1).permits == lost
    assert server.insert(push(lost, sequence=1, worker=1)).accepted
    assert server.take().trajectories is not None
    assert server.take().finished


def test_a_batch_of_which_nothing_is_left_is_not_begun_anew_after_the_end() -> None:
    server = TrajectoryServer(QueueSpec(LAYOUT, 2))
    server.request_permits(0, 0, 2)
    server.finish()
    assert not server.take().finished
    assert server.revoke(0, 0) == 2
    assert server.request_permits(1, 0, 1).finished
    assert server.take().finished


def test_the_end_waits_for_a_batch_that_stands_before_a_complete_one() -> None:
    server = TrajectoryServer(QueueSpec(LAYOUT, 1, max_policy_lag=1), max_env_steps=2)
    lost, mine = server.request_permits(0, 0, 1).permits, server.request_permits(1, 0, 1).permits
    assert server.insert(push(mine, worker=1)).accepted
    server.revoke(0, 0)
    assert server.request_permits(1, 0, 1).permits == lost
    assert server.insert(push(lost, sequence=1, worker=1)).accepted
    assert server.request_permits(1, 0, 1).finished
    assert server.take().trajectories is not None
    assert server.take().trajectories is not None
    assert server.take().finished


def test_a_new_incarnation_takes_its_predecessor_s_permits_back() -> None:
    server = TrajectoryServer(QueueSpec(LAYOUT, 3))
    held, other = server.request_permits(0, 0, 2).permits, server.request_permits(1, 0, 1).permits
    again = server.request_permits(0, 1, 5).permits
    assert sorted(permit.unit for permit in again) == [permit.unit for permit in held]
    assert server.insert(push(held)).env_steps == 0
    assert server.stats().discarded_steps == 4
    # A late request of the predecessor does not revoke permits of its successor.
    assert server.request_permits(0, 0, 1).wait is not None
    assert server.insert(push(again, incarnation=1)).env_steps == 4
    assert server.insert(push(other, worker=1)).env_steps == 6
    assert server.take().trajectories is not None


def test_the_moments_of_returns_come_with_a_batch() -> None:
    server = TrajectoryServer(QueueSpec(LAYOUT, 1))
    first = push(server.request_permits(0, 0, 1).permits)
    assert server.insert(first).accepted
    assert server.insert(first).repeated
    assert server.take().returns == Moments(3, 1.0, 2.0)
    server.publish(1)
    assert server.insert(push(server.request_permits(0, 0, 1).permits, sequence=1)).accepted
    returns = server.take().returns
    assert (returns.count, returns.mean) == (6, pytest.approx(1.5))
    assert returns.squares == pytest.approx(np.var([0, 1, 2, 1, 2, 3]) * 6)


def test_stats_say_what_is_held() -> None:
    server = TrajectoryServer(QueueSpec(LAYOUT, 2, max_policy_lag=2), version=7, carried=Counters(100, 90, 80))
    permits = server.request_permits(0, 0, 2).permits
    late = server.request_permits(1, 0, 2).permits
    assert server.insert(push(permits)).env_steps == 104
    server.revoke(1, 0)
    assert server.insert(push(late, worker=1)).accepted
    assert server.insert(push(late, worker=1)).repeated
    assert server.stats() == QueueStats(
        counters=Counters(104, 90, 84),
        size=2,
        capacity=6,
        bytes=2 * trajectory(7).bytes,
        version=7,
        complete_batches=1,
        discarded_steps=4,
        repeated_pushes=1,
        waiting={},
        pid=os.getpid(),
        node=socket.gethostname(),
    )
    server.take()
    stats = server.stats()
    assert (stats.size, stats.bytes, stats.complete_batches, stats.counters) == (0, 0, 0, Counters(104, 94, 84))
    assert "0 of 2 units" in str(server.take().wait)
    assert set(server.stats().waiting) == {"learner"}


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 3), st.integers(0, 2), st.integers(1, 3), st.integers(1, 20), st.integers(0, 2**32))
def test_every_run_ends_with_every_begun_batch_handed_out(
    units: int, lag: int, workers: int, most: int, seed: int
) -> None:
    rng, server = random.Random(seed), TrajectoryServer(QueueSpec(LAYOUT, units, lag), max_env_steps=most)
    incarnations, sequences = [0] * workers, [0] * workers
    held: list[list[Permit]] = [[] for _ in range(workers)]
    done: set[int] = set()
    version = taken = 0
    finished = False
    for _ in range(3000):
        worker = rng.randrange(workers)
        match rng.choice(["work", "work", "learn", "die"]):
            case "work" if held[worker]:
                permits = (held[worker].pop(),)
                assert server.insert(push(permits, sequences[worker], worker, incarnations[worker])).accepted
                sequences[worker] += 1
            case "work" if worker not in done:
                reply = server.request_permits(worker, incarnations[worker], rng.randint(1, 3))
                held[worker] += reply.permits
                if reply.finished:
                    assert server.stats().counters.env_steps >= most
                    done.add(worker)
            case "learn":
                answer = server.take()
                if answer.trajectories is not None:
                    assert not finished
                    assert len(answer.trajectories) == units
                    taken += 2 * units
                    version += 1
                    server.publish(version)
                finished = finished or answer.finished
            case "die" if worker not in done:
                if rng.random() < 0.5:
                    server.revoke(worker, incarnations[worker])
                incarnations[worker], sequences[worker], held[worker] = incarnations[worker] + 1, 0, []
        if finished and len(done) == workers:
            break
    assert finished
    assert len(done) == workers
    assert server.stats().size == 0
    assert server.stats().discarded_steps == 0
    assert server.stats().counters.env_steps == taken
