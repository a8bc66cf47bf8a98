"""Tests of experience: batches as tensors, local experience at the limiter's ratio, bounded prefetch from a server."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from learner import AdvantageActorCritic, Reinforce
from learner.batches import TrajectoryBatch, TransitionBatch
from learner.experience import Experience, LocalTransitions, RemoteTrajectories, RemoteTransitions
from replay.errors import DeadlineExceeded, StalePolicy
from replay.messages import Batch, Push
from replay.server import ReplayServer, ReplaySpec
from replay.table import TableSpec
from replay.trajectory_server import QueueSpec, TrajectoryServer
from replay.types import Layout, Moments, Segment
from tests.learner.toys import (
    CARTPOLE,
    InProcessQueue,
    InProcessReplay,
    Tally,
    make_push,
    make_trajectory,
    quiet_trainer,
    small,
    small_dqn,
    toy,
)

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
        for name in whole._fields[:7]:
            assert torch.equal(getattr(part, name), getattr(whole, name)[i])
        assert part[7:] == (77, None, 0, None)
    (again,) = parts[1].split()
    assert again is parts[1]


def test_precomputed_values_are_split_and_moved_with_their_batches() -> None:
    whole = TransitionBatch.of(a_batch())
    values = torch.randn(*whole.reward.shape, 2)
    for i, part in enumerate(
        whole._replace(target_values_ahead=values, target_syncs=5).map(lambda tensor: 2 * tensor).split()
    ):
        assert part.target_values_ahead is not None
        assert torch.equal(part.target_values_ahead, 2 * values[i])
        assert (part.size, part.target_syncs) == (77, 5)


def test_trajectories_as_tensors_are_filled_up_behind_their_ends() -> None:
    trajectories = [make_trajectory(2, seed=0, version=7), make_trajectory(4, seed=1, version=5, ends="truncated")]
    batch = TrajectoryBatch.of(trajectories)
    assert batch.version == 5, "the oldest"
    assert batch.valid.tolist() == [[True, True, False, False], [True] * 4]
    for u, trajectory in enumerate(trajectories):
        rows = len(trajectory.action)
        for name in ("action", "reward", "discount", "log_probability"):
            tensor, array = getattr(batch, name), getattr(trajectory, name)
            np.testing.assert_array_equal(tensor[u, :rows].numpy(), array)
            assert not tensor[u, rows:].any()
            assert tensor.numpy().dtype == array.dtype
        np.testing.assert_array_equal(batch.observation[u, : rows + 1].numpy(), trajectory.observation)
        assert (batch.observation[u, rows + 1 :].numpy() == trajectory.observation[-1]).all()
        trajectory.observation[:] = 99.0
    assert not (batch.observation == 99.0).any(), "a copy"


def test_visited_are_the_observations_of_steps_in_the_order_of_valid() -> None:
    trajectories = [make_trajectory(2, seed=0), make_trajectory(3, seed=1)]
    batch = TrajectoryBatch.of(trajectories)
    expected = np.concatenate([trajectory.observation[:-1] for trajectory in trajectories])
    np.testing.assert_array_equal(batch.visited.numpy(), expected)
    np.testing.assert_array_equal(
        batch.reward[batch.valid].numpy(), np.concatenate([trajectory.reward for trajectory in trajectories])
    )
    (again,) = batch.split()
    assert again is batch
    halved = batch.map(lambda tensor: tensor[:1])
    assert (len(halved.reward), halved.version) == (1, batch.version)
    transitions = TransitionBatch.of(a_batch()).split()[0]
    assert transitions.visited is transitions.observation


# Experience generated in this process.


def local(env: str = "SquallTally-v0", **options: Any) -> LocalTransitions:
    experience = small_dqn(env, **options).train_dataloader()
    assert isinstance(experience, LocalTransitions)
    return experience


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
    """Every fourth row is a reset, which is not an environment step."""
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
    experience = local(batches_per_epoch=length, updates_per_training_step=k)
    assert len(experience) == items
    for _ in range(2):
        shapes = [tuple(batch.observation.shape) for batch in experience]
        assert shapes == [(k, 8, 2)] * items


def test_epochs_go_on_where_the_last_one_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    experience = local(batches_per_epoch=5)
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
    experience = local()
    received: list[Any] = []
    monkeypatch.setattr(experience._table, "update_priorities", lambda *arguments: received.append(arguments))
    experience.update_priorities(np.array([3]), np.array([0.5]))
    assert received == [(np.array([3]), np.array([0.5]))]


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


# Experience from a replay server.

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
    for experience in (local(), remote(InProcessReplay(server()))):
        assert experience.state_dict() == {}
        experience.load_state_dict({})


# Experience from a trajectory server.

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
    with pytest.raises(StalePolicy, match="a trajectory of version 0 arrived after 1 was published"):
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
