"""Experience from this process keeps the limiter's ratio; from a server it is fetched ahead, within a bound."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from learner.experience import LocalTransitions, RemoteTransitions, TransitionBatch
from replay.server import ReplayServer, ReplaySpec
from replay.table import TableSpec
from replay.types import Batch, DeadlineExceeded, Layout
from tests.learner.toys import InProcessReplay, Tally, make_push, quiet_trainer, small_dqn

# Batches as tensors.


def a_batch() -> Batch:
    rng = np.random.default_rng(0)
    return Batch(
        observation=rng.integers(0, 255, (3, 5, 4), np.uint8),
        action=rng.integers(2, size=(3, 5)),
        reward=rng.normal(size=(3, 5)).astype(np.float32),
        discount=rng.random((3, 5), np.float32),
        next_observation=rng.integers(0, 255, (3, 5, 4), np.uint8),
        ids=np.arange(15).reshape(3, 5) + 2**60,
        probability=np.full((3, 5), 0.25),
        size=77,
    )


def test_a_batch_as_tensors_is_a_copy_of_the_same_dtypes() -> None:
    batch = a_batch()
    for array in vars(batch).values():
        if isinstance(array, np.ndarray):
            array.flags.writeable = False  # as a view into Ray's object store
    tensors = TransitionBatch.of(batch)
    for name in ("observation", "action", "reward", "discount", "next_observation", "ids"):
        tensor, array = getattr(tensors, name), getattr(batch, name)
        np.testing.assert_array_equal(tensor.numpy(), array)
        assert tensor.numpy().dtype == array.dtype
        assert not np.shares_memory(tensor.numpy(), array)
    assert tensors.probability.dtype == torch.float32
    assert (tensors.probability == 0.25).all()
    assert tensors.size == 77


def test_split_gives_the_k_batches_in_order() -> None:
    whole = TransitionBatch.of(a_batch())
    parts = whole.split()
    assert len(parts) == 3
    for i, part in enumerate(parts):
        assert part.size == 77
        for name in whole._fields[:-1]:
            assert torch.equal(getattr(part, name), getattr(whole, name)[i])
    (again,) = parts[1].split()
    assert again is parts[1]


# In this process.


def local(env: str = "SquallTally-v0", **options: Any) -> LocalTransitions:
    experience = small_dqn(env, **options).train_dataloader()
    assert isinstance(experience, LocalTransitions)
    return experience


class Meter:
    """Counts what goes into and comes out of an experience's table."""

    def __init__(self, experience: LocalTransitions, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inserts = self.samples = 0
        self.first_sample_at: int | None = None
        table = experience._table
        insert, sample = table.insert, table.sample

        def counted_insert(segment: Any) -> None:
            insert(segment)
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
    experience = local(warm_start_size=100, **options)
    meter = Meter(experience, monkeypatch)
    ratio, tolerance = 8 * updates_per_step, max(8 * k, 8 * updates_per_step * num_envs * 4)
    for _ in range(-(-800 // k)):
        experience.next()
        assert abs(meter.samples - ratio * (meter.inserts - 100)) <= 2 * tolerance
    assert meter.samples / (meter.inserts - 100) == pytest.approx(ratio, rel=2 * tolerance / meter.samples)


@pytest.mark.parametrize("warm_start_size", [1, 100])
def test_nothing_is_drawn_before_the_warm_start(warm_start_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    experience = local(warm_start_size=warm_start_size, num_envs=2, segment_length=4)
    meter = Meter(experience, monkeypatch)
    experience.next()
    assert meter.first_sample_at is not None
    assert warm_start_size <= meter.first_sample_at <= warm_start_size + 2 * 4


def test_only_real_steps_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fourth row is a reset: it is no step of the environment, and none in the count."""
    Tally.steps = 0
    experience = local(num_envs=3, segment_length=4, warm_start_size=90)
    meter = Meter(experience, monkeypatch)
    experience.next()
    assert experience.env_steps == Tally.steps
    assert meter.inserts <= experience.env_steps < meter.inserts + 3 * 4
    assert [episode.length for episode in experience.episodes] == [3] * len(experience.episodes)
    assert 3 * len(experience.episodes) <= experience.env_steps < 3 * len(experience.episodes) + 9


@pytest.mark.parametrize(("clip", "seen"), [(None, 5.0), (False, 5.0), (True, 1.0)])
def test_rewards_are_clipped_for_the_learner_and_never_in_returns(clip: bool | None, seen: float) -> None:
    experience = local(clip_rewards=clip)
    assert set(experience.next().reward.ravel().tolist()) == {seen}
    assert {episode.episode_return for episode in experience.episodes} == {15.0}


def test_exploration_follows_the_step_count(monkeypatch: pytest.MonkeyPatch) -> None:
    module = small_dqn("SquallTally-v0", num_envs=2)
    experience = module.train_dataloader()
    asked: list[int] = []
    act = module.policy.act

    def watched(observation: Any, *, step: int, greedy: bool = False) -> Any:
        asked.append(step)
        assert not greedy
        return act(observation, step=step)

    monkeypatch.setattr(module.policy, "act", watched)
    experience.next()  # type: ignore[union-attr]
    assert asked[:5] == [0, 2, 4, 6, 6], "the fourth row of each lane is a reset"
    module.experience = None
    module.env_steps = 1_000
    asked.clear()
    module.train_dataloader().next()
    assert asked[0] == 1_000


@pytest.mark.parametrize(("length", "k", "items"), [(10, 1, 10), (10, 4, 3), (8, 4, 2)])
def test_an_epoch_has_the_length_it_says(length: int, k: int, items: int) -> None:
    experience = local(batches_per_epoch=length, updates_per_training_step=k)
    assert len(experience) == items
    for _ in range(2):
        shapes = [tuple(batch.observation.shape) for batch in experience]
        assert shapes == [(k, 8, 2)] * items


def test_epochs_go_on_where_the_last_one_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    experience = local(batches_per_epoch=5)
    resets = 0
    reset = experience._lanes.reset

    def counted() -> Any:
        nonlocal resets
        resets += 1
        return reset()

    monkeypatch.setattr(experience._lanes, "reset", counted)
    steps = []
    for _ in range(3):
        list(experience)
        steps.append(experience.env_steps)
    assert steps == sorted(set(steps))
    assert resets == 1


def test_priorities_reach_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    experience = local()
    got: list[Any] = []
    monkeypatch.setattr(experience._table, "update_priorities", lambda *arguments: got.append(arguments))
    experience.update_priorities(np.array([3]), np.array([0.5]))
    assert got == [(np.array([3]), np.array([0.5]))]


# From a replay server.

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


def test_it_fetches_two_calls_ahead_and_no_more(remote: Remote) -> None:
    replay = InProcessReplay(server(), pushes())
    batches = iter(remote(replay))
    for taken in (1, 2, 3):
        next(batches)
        assert eventually(lambda: replay.samples == taken + 2)  # noqa: B023
        time.sleep(0.05)
        assert replay.samples == taken + 2


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
    """16 inserts after the first 8, at 7.5 samples each, are 120 samples: eight calls of 15, then the word."""
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
    begun = time.monotonic()
    timer.start()
    assert list(experience) == []
    assert time.monotonic() - begun < 2.0
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
    assert eventually(lambda: replay.samples == 3)
    experience.close()
    assert experience._thread is not None
    assert not experience._thread.is_alive()


def test_while_waiting_is_called_in_the_waiting_thread(remote: Remote) -> None:
    replay = InProcessReplay(server())
    experience = remote(replay)
    threads: list[threading.Thread] = []
    why: list[str | None] = []

    def while_waiting() -> None:
        threads.append(threading.current_thread())
        why.append(experience.waiting_for)
        if len(threads) == 2:
            replay.pushes = pushes()

    experience.while_waiting = while_waiting
    batches = iter(experience)
    next(batches)
    assert len(threads) >= 2
    assert set(threads) == {threading.current_thread()}
    assert why[0] == "experience: 0 of the first 8 items inserted"
    called = len(threads)
    assert eventually(lambda: replay.samples == 3)
    next(batches)
    assert len(threads) == called, "a batch was there"
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


def test_batches_are_those_of_the_server(remote: Remote) -> None:
    """The prefetching thread keeps their order."""
    twin = server()
    for push in pushes(1):
        twin.insert(push)
    expected = [TransitionBatch.of(twin.sample(3, 5).batch) for _ in range(4)]  # type: ignore[arg-type]
    for batch, other in zip(remote(InProcessReplay(server(), pushes(1))), expected, strict=True):
        assert torch.equal(batch.ids, other.ids)
        assert torch.equal(batch.observation, other.observation)


def test_both_kinds_go_on_in_the_middle_of_an_epoch(remote: Remote) -> None:
    """Lightning asks a dataloader for its place before it resumes; these have none, which is not to be warned of."""
    for experience in (local(), remote(InProcessReplay(server()))):
        assert experience.state_dict() == {}
        experience.load_state_dict({})
