"""Tests of transitions from a replay server: bounded prefetch, waits, errors, and the ends of epochs and runs."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from learner.batches import TransitionBatch
from learner.experience import RemoteTransitions
from replay.errors import DeadlineExceeded
from replay.server import ReplayServer, ReplaySpec
from replay.table import TableSpec
from replay.types import Layout
from tests.learner.toys import InProcessReplay, local_transitions, make_push, quiet_trainer, small_dqn

LAYOUT = Layout((4,), "float32", 1, (), "int64", segment_length=8, n_steps=1)


def server(warm_start: int = 8, max_env_steps: int | None = None, samples_per_insert: float = 1e9) -> ReplayServer:
    spec = ReplaySpec(TableSpec(LAYOUT, 1_000), samples_per_insert, warm_start, 8, batch_size=5, batches_per_sample=3)
    return ReplayServer(spec, run_seed=0, max_env_steps=max_env_steps)


def pushes(count: int | None = None) -> Iterator[Any]:
    return (make_push(LAYOUT, n) for n in (itertools.count() if count is None else range(count)))


@pytest.fixture
def remote() -> Iterator[Callable[..., RemoteTransitions]]:
    made: list[RemoteTransitions] = []

    def make(replay: InProcessReplay, length: int = 12) -> RemoteTransitions:
        made.append(RemoteTransitions(replay, k=3, batch_size=5, length=length))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for experience in made:
        experience.close()
        assert not any(thread.name == "prefetch" and thread.is_alive() for thread in threading.enumerate())


Remote = Callable[..., RemoteTransitions]


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


def test_batches_come_in_k_by_b(remote: Remote) -> None:
    experience = remote(InProcessReplay(server(), pushes()))
    assert len(experience) == 4
    for _ in range(2):
        shapes = [tuple(batch.observation.shape) for batch in experience]
        assert shapes == [(3, 5, 4)] * 4
    assert not experience.finished


def test_no_thread_starts_before_the_first_batch(remote: Remote) -> None:
    replay = InProcessReplay(server(), pushes())
    experience = remote(replay)
    iterator = iter(experience)
    time.sleep(0.02)
    assert replay.samples == 0
    next(iterator)
    assert replay.samples > 0


def test_it_fetches_a_call_ahead_and_no_more(remote: Remote) -> None:
    replay = InProcessReplay(server(), pushes())
    batches = iter(remote(replay))
    for taken in (1, 2, 3):
        next(batches)
        assert eventually(lambda: replay.samples == taken + 1)  # noqa: B023
        time.sleep(0.05)
        assert replay.samples == taken + 1


@pytest.mark.parametrize("error", [DeadlineExceeded("waited 300 s for experience"), ValueError("a broken table")])
def test_what_the_fetching_thread_meets_is_raised_to_the_trainer(error: Exception, remote: Remote) -> None:
    replay = InProcessReplay(server(), pushes())
    batches = iter(remote(replay, length=1_000))
    next(batches)
    replay.failure = error
    with pytest.raises(type(error)) as raised:
        list(batches)
    assert raised.value is error
    assert replay.samples <= 4


def test_an_epoch_ends_when_the_run_is_finished(remote: Remote) -> None:
    """16 inserts after the first 8, at 7.5 samples each, are 120 samples: eight calls of 15, then the run ends."""
    replay = InProcessReplay(server(max_env_steps=24, samples_per_insert=7.5), pushes())
    experience = remote(replay)
    assert [len(list(experience)) for _ in range(4)] == [4, 4, 0, 0]
    assert experience.finished
    assert replay.server.stats().counters.samples_per_insert == 7.5


def test_a_trainer_ends_with_the_run(remote: Remote) -> None:
    module = small_dqn(updates_per_training_step=3)
    experience = remote(InProcessReplay(server(max_env_steps=24, samples_per_insert=7.5), pushes()), length=9)
    trainer = quiet_trainer(max_epochs=4)
    trainer.fit(module, experience)
    assert trainer.global_step == 24
    assert experience.finished


def test_interrupt_ends_a_wait_at_once(remote: Remote) -> None:
    experience = remote(InProcessReplay(server()))
    timer = threading.Timer(0.1, experience.interrupt)
    start = time.monotonic()
    timer.start()
    assert list(experience) == []
    assert time.monotonic() - start < 2.0
    assert experience.finished
    timer.join()


def test_interrupt_before_the_first_batch(remote: Remote) -> None:
    experience = remote(InProcessReplay(server(), pushes()))
    experience.interrupt()
    assert list(experience) == []


def test_close_ends_a_thread_whose_batches_nobody_takes(remote: Remote) -> None:
    replay = InProcessReplay(server(), pushes())
    experience = remote(replay)
    next(iter(experience))
    assert eventually(lambda: replay.samples == 2)
    experience.close()
    assert experience._thread is not None
    assert not experience._thread.is_alive()


def test_while_waiting_is_called_in_the_waiting_thread(remote: Remote) -> None:
    replay = InProcessReplay(server())
    experience = remote(replay)
    threads: list[threading.Thread] = []
    reasons: list[str | None] = []

    def while_waiting() -> None:
        threads.append(threading.current_thread())
        reasons.append(experience.waiting_for)
        if len(threads) == 2:
            replay.pushes = pushes()

    experience.while_waiting = while_waiting
    batches = iter(experience)
    next(batches)
    assert len(threads) >= 2
    assert set(threads) == {threading.current_thread()}
    assert reasons[0] == "experience: 0 of the first 8 items inserted"
    called = len(threads)
    assert eventually(lambda: replay.samples == 2)
    next(batches)
    assert len(threads) == called, "a batch was ready"
    assert experience.waiting_for is None


def test_what_while_waiting_raises_ends_the_iteration(remote: Remote) -> None:
    experience = remote(InProcessReplay(server()))

    def fail() -> None:
        raise RuntimeError("no")

    experience.while_waiting = fail
    with pytest.raises(RuntimeError, match="no"):
        next(iter(experience))


def test_priorities_go_to_the_server(remote: Remote) -> None:
    replay = InProcessReplay(server())
    remote(replay).update_priorities(np.array([3]), np.array([0.5]))
    assert replay.updated == [(np.array([3]), np.array([0.5]))]


def test_batches_for_a_gpu_lie_where_it_can_fetch_them(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)  # needs a GPU
    experience = remote(InProcessReplay(server(), pushes()))
    experience.pin_memory = True
    batch = next(iter(experience))
    assert all(value is other for value, other in zip([v for v in batch if torch.is_tensor(v)], pinned, strict=False))
    assert all(tensor.is_contiguous() for tensor in pinned)
    assert len(pinned) >= 7


def test_batches_are_those_of_the_server(remote: Remote) -> None:
    """The prefetch thread keeps the order of the batches."""
    twin = server()
    for push in pushes(1):
        twin.insert(push)
    expected = [TransitionBatch.of(twin.sample(3, 5).batch) for _ in range(4)]  # type: ignore[arg-type]
    for batch, other in zip(remote(InProcessReplay(server(), pushes(1))), expected, strict=True):
        assert torch.equal(batch.ids, other.ids)
        assert torch.equal(batch.observation, other.observation)


def test_both_kinds_go_on_in_the_middle_of_an_epoch(remote: Remote) -> None:
    """Before Lightning resumes, it reads a dataloader's state, and warns unless the dataloader has these methods."""
    for experience in (local_transitions(), remote(InProcessReplay(server()))):
        assert experience.state_dict() == {}
        experience.load_state_dict({})
