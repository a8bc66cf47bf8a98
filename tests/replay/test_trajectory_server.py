"""TrajectoryServer as a plain object: replies, repeats, void permits, totals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from replay.trajectory_server import QueueSpec, TrajectoryServer
from replay.types import EpisodeResult, Layout, LayoutMismatch, Permit, Push, Trajectory

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


def push(permits: tuple[Permit, ...], sequence: int = 0, worker: int = 0) -> Push:
    made = tuple((permit, trajectory(permit.version)) for permit in permits)
    return Push(worker, 0, sequence, trajectories=made, episodes=(EpisodeResult(1.0, 2),))


def test_a_batch_goes_from_permits_to_the_learner_once() -> None:
    server = TrajectoryServer(QueueSpec(LAYOUT, 2))
    assert "0 of 2 units" in str(server.take().wait)
    assert server.stats().waiting == {"learner": server.take().wait}
    permits = server.request_permits(0, 0, 5).permits
    assert [permit.unit for permit in permits] == [0, 1]
    assert "every unit for version 0 is handed out" in str(server.request_permits(1, 0, 1).wait)
    assert server.insert(push(permits)).env_steps == 4, "invalid rows are no steps"
    taken = server.take().trajectories
    assert taken is not None
    assert len(taken) == 2
    assert "nothing is published" in str(server.take().wait)
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
