"""On-policy workers with a real trajectory queue, in threads: permits, exact versions, dead workers, whole episodes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from actors.environments import specify
from actors.on_policy import OnPolicyWorker
from actors.policies import Action, EpsilonGreedyPolicy, PolicySpec
from actors.rollout import RolloutSpec
from actors.weights import Weights, pack
from replay.messages import InsertReply, PermitReply, Push, TakeReply
from replay.trajectory_server import QueueSpec, TrajectoryServer
from replay.types import Trajectory

CARTPOLE = PolicySpec("epsilon_greedy", specify("CartPole-v1"), hidden_sizes=(4,))


class DirectQueue:
    """A `TrajectoryClient` of a `TrajectoryServer` in this process."""

    def __init__(self, server: TrajectoryServer) -> None:
        self.server, self.lock = server, threading.Lock()
        self.waiting_for: str | None = None

    def _until(self, call: Any, stop: threading.Event | None) -> Any:
        while True:
            with self.lock:
                reply = call()
            self.waiting_for = reply.wait
            if reply.wait is None:
                return reply
            if stop is not None and stop.wait(0.001):
                return None

    def request_permits(self, *request: int, stop: threading.Event | None = None) -> PermitReply | None:
        reply: PermitReply | None = self._until(lambda: self.server.request_permits(*request), stop)
        return reply

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply | None:
        reply: InsertReply | None = self._until(lambda: self.server.insert(push), stop)
        return reply

    def revoke(self, worker: int, incarnation: int, *, seconds: float | None = None) -> None:
        with self.lock:
            self.server.revoke(worker, incarnation)

    def take(self, stop: threading.Event) -> TakeReply | None:
        reply: TakeReply | None = self._until(self.server.take, stop)
        return reply


class Source:
    """A weight source in which the head's bias equals the version, so that experience reveals its version."""

    def __init__(self) -> None:
        self.version, self.newest = -1, 0
        self.module = EpsilonGreedyPolicy(CARTPOLE)

    pending = False

    def poll(self) -> Weights | None:
        if self.newest == self.version:
            return None
        self.version = self.newest
        with torch.no_grad():
            self.module.q_network.head.bias.fill_(float(self.version))
        return pack(self.module, self.version)


@contextmanager
def recorded_versions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the policy return the version of its weights as the log-probability of its actions."""
    original = EpsilonGreedyPolicy.act

    def act(self: EpsilonGreedyPolicy, observation: Any, *, step: int, greedy: bool = False) -> Action:
        version = self.q_network.head.bias.detach()[0].item()
        action = original(self, observation, step=0).action
        return Action(action, np.full(len(observation), version, np.float32))

    with monkeypatch.context() as patch:
        patch.setattr(EpsilonGreedyPolicy, "act", act)
        yield


def make_worker(queue: DirectQueue, source: Source, index: int, rows: int | None, lanes: int = 3) -> OnPolicyWorker:
    spec = RolloutSpec(
        CARTPOLE, lanes, segment_length=1, n_steps=1, gamma=0.9, clip_rewards=False, run_seed=0, trajectory_rows=rows
    )
    return OnPolicyWorker(spec, queue=queue, worker=index, workers=2, incarnation=0, weights=source)


def collect(
    rows: int | None, units: int, batches: int, lanes: int = 3
) -> tuple[list[tuple[Trajectory, ...]], TrajectoryServer]:
    """Collect `batches` batches from two workers, and publish a version after each batch."""
    layout = CARTPOLE.environment.layout(segment_length=1, n_steps=1)
    server = TrajectoryServer(QueueSpec(layout, units))
    queue, stop, taken = DirectQueue(server), threading.Event(), []
    sources = [Source(), Source()]
    workers = [make_worker(queue, source, index, rows, lanes) for index, source in enumerate(sources)]
    threads = [threading.Thread(target=worker.run) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        for version in range(batches):
            timer = threading.Timer(20.0, stop.set)
            timer.start()
            reply = queue.take(stop)
            timer.cancel()
            assert reply is not None, f"no batch: {queue.waiting_for}"
            assert reply.trajectories is not None
            taken.append(reply.trajectories)
            for source in sources:
                source.newest = version + 1
            with queue.lock:
                server.publish(version + 1)
    finally:
        for worker in workers:
            worker.stop()
        for thread in threads:
            thread.join(10.0)
    assert not any(thread.is_alive() for thread in threads)
    return taken, server


@pytest.mark.parametrize(("rows", "units"), [(5, 6), (7, 4), (None, 5)])
def test_every_trajectory_is_made_wholly_by_the_version_that_trains_on_it(
    rows: int | None, units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recorded_versions(monkeypatch):
        taken, server = collect(rows, units, batches=6)
    for version, batch in enumerate(taken):
        assert len(batch) == units
        for trajectory in batch:
            assert trajectory.version == version
            assert (trajectory.log_probability == version).all()
            assert len(trajectory.action) == (rows or trajectory.steps)
    assert server.stats().discarded_steps == 0
    assert server.stats().counters.env_steps >= sum(t.steps for batch in taken for t in batch)


def test_whole_episodes_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    with recorded_versions(monkeypatch):
        taken, server = collect(None, 7, batches=4)
    trajectories = [trajectory for batch in taken for trajectory in batch]
    for trajectory in trajectories:
        assert trajectory.episodic
        assert trajectory.valid.all()
        assert (trajectory.discount[:-1] == np.float32(0.9)).all()
        assert trajectory.discount[-1] == 0.0
        assert (np.abs(trajectory.observation[0]) <= 0.05).all(), "an episode begins at a reset"
    lengths = sorted(result.length for result in server.drain_episodes())
    assert [length for length in sorted(t.steps for t in trajectories) if length not in lengths] == []


def test_permits_of_a_dead_worker_are_issued_again() -> None:
    layout = CARTPOLE.environment.layout(segment_length=1, n_steps=1)
    server = TrajectoryServer(QueueSpec(layout, 4))
    assert len(server.request_permits(0, 0, 3).permits) == 3
    server.revoke(0, 0)
    queue, source, stop = DirectQueue(server), Source(), threading.Event()
    worker = make_worker(queue, source, 1, rows=5)
    thread = threading.Thread(target=worker.run)
    thread.start()
    timer = threading.Timer(20.0, stop.set)
    timer.start()
    reply = queue.take(stop)
    timer.cancel()
    worker.stop()
    thread.join(10.0)
    assert reply is not None
    assert reply.trajectories is not None
    assert len(reply.trajectories) == 4


def test_a_finished_run_ends_the_worker_and_gives_no_more_permits() -> None:
    layout = CARTPOLE.environment.layout(segment_length=1, n_steps=1)
    server = TrajectoryServer(QueueSpec(layout, 3), max_env_steps=10)
    worker = make_worker(DirectQueue(server), Source(), 0, rows=5)
    report = worker.run()
    assert report.status_message == "done"
    assert server.stats().counters.env_steps >= 10
    assert server.request_permits(1, 0, 1).finished
    taken = server.take()
    assert taken.trajectories is not None
    assert server.take().finished
