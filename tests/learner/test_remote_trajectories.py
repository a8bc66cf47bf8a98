"""Tests of trajectories from a trajectory server: fetches on demand, the policy lag, and ends of epochs and runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from learner import Reinforce
from learner.batches import TrajectoryBatch
from learner.experience import RemoteTrajectories
from replay.errors import StalePolicy
from replay.messages import Push
from replay.trajectory_server import QueueSpec, TrajectoryServer
from replay.types import Layout, Moments
from tests.learner.toys import CARTPOLE, InProcessQueue, make_trajectory, quiet_trainer, small

TRAJECTORIES = Layout((4,), "float32", 1, (), "int64", segment_length=1, n_steps=1)


class Worker:
    """Requests permits and pushes their trajectories at each call."""

    def __init__(self, server: TrajectoryServer, index: int = 0) -> None:
        self.server, self.index, self.pushes = server, index, 0

    def __call__(self) -> None:
        permits = self.server.request_permits(self.index, 0, 2).permits
        if not permits:
            time.sleep(0.002)
            return
        made = tuple((permit, make_trajectory(3, seed=self.pushes, version=permit.version)) for permit in permits)
        self.server.insert(Push(self.index, 0, self.pushes, trajectories=made, returns=Moments(3, 1.0, 12.0)))
        self.pushes += 1


def queue_of(lag: int = 0, filled: bool = True, max_env_steps: int | None = None) -> InProcessQueue:
    server = TrajectoryServer(QueueSpec(TRAJECTORIES, 4, lag), max_env_steps=max_env_steps)
    return InProcessQueue(server, Worker(server) if filled else None)


@pytest.fixture
def on_policy() -> Iterator[Callable[..., RemoteTrajectories]]:
    made: list[RemoteTrajectories] = []

    def make(client: InProcessQueue, lag: int = 0, length: int = 5) -> RemoteTrajectories:
        made.append(RemoteTrajectories(client, max_policy_lag=lag, length=length))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for experience in made:
        experience.close()
        assert not any(thread.name == "prefetch" and thread.is_alive() for thread in threading.enumerate())


OnPolicy = Callable[..., RemoteTrajectories]


def test_a_batch_is_fetched_only_when_it_is_asked_for(on_policy: OnPolicy) -> None:
    client = queue_of()
    experience = on_policy(client)
    batches = iter(experience)
    time.sleep(0.02)
    assert client.takes == 0
    for version in range(3):
        batch = next(batches)
        assert (batch.version, tuple(batch.reward.shape)) == (version, (4, 3))
        time.sleep(0.05)
        assert client.takes == version + 1, "nothing is prefetched"
        experience.on_publish(version + 1)
    assert client.published == [1, 2, 3]
    assert client.server.stats().version == 3
    assert experience.returns.count > 0
    assert experience.returns.std == 2.0


def test_without_a_new_version_there_is_no_second_batch(on_policy: OnPolicy) -> None:
    experience = on_policy(queue_of())
    batches = iter(experience)
    next(batches)
    timer = threading.Timer(0.2, experience.interrupt)
    timer.start()
    assert list(batches) == []
    assert experience.waiting_for is not None
    timer.join()


def test_a_trajectory_older_than_the_lag_is_refused(on_policy: OnPolicy) -> None:
    """The server admits a lag of 1, and the learner admits none."""
    client = queue_of(lag=1)
    for _ in range(2):
        client.fill()  # type: ignore[misc]
    experience = on_policy(client, lag=0)
    experience.on_publish(1)
    with pytest.raises(StalePolicy, match="a trajectory of weights version 0 arrived after version 1 was published"):
        next(iter(experience))


def test_a_trajectory_within_the_lag_is_taken(on_policy: OnPolicy) -> None:
    client = queue_of(lag=1)
    for _ in range(2):
        client.fill()  # type: ignore[misc]
    experience = on_policy(client, lag=1)
    experience.on_publish(1)
    assert next(iter(experience)).version == 0


def test_an_on_policy_epoch_ends_when_the_run_is_finished(on_policy: OnPolicy) -> None:
    """Batches of 4 x 3 steps: the third reaches the run's 30 steps."""
    experience = on_policy(queue_of(max_env_steps=30), length=2)
    taken = []
    for epoch in range(3):
        taken.append(0)
        for batch in experience:
            taken[epoch] += 1
            experience.on_publish(batch.version + 1)
    assert taken == [2, 1, 0]
    assert experience.finished


def test_an_interrupt_ends_an_on_policy_wait_at_once(on_policy: OnPolicy) -> None:
    experience = on_policy(queue_of(filled=False))
    timer = threading.Timer(0.1, experience.interrupt)
    start = time.monotonic()
    timer.start()
    assert list(experience) == []
    assert time.monotonic() - start < 3.0
    timer.join()


def test_a_trainer_takes_one_batch_an_update_and_ends_with_the_run(on_policy: OnPolicy) -> None:
    client = queue_of(max_env_steps=30)
    module = small(Reinforce, CARTPOLE)
    module.experience = experience = on_policy(client, length=100)
    versions: list[int] = []
    trained = module.update

    def update(batch: TrajectoryBatch) -> dict[str, torch.Tensor]:
        versions.append(batch.version)
        logged = trained(batch)
        experience.on_publish(batch.version + 1)
        return logged

    module.update = update  # type: ignore[method-assign]
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, experience)
    assert versions == [0, 1, 2]
    assert trainer.global_step == client.takes == 3
