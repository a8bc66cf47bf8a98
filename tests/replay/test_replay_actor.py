"""`ReplayClient` and `RemoteActor` on a local Ray: waits, deadlines, dead actors, and the types of errors."""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from replay.client import ReplayClient
from replay.errors import DeadlineExceeded, LayoutMismatch
from replay.messages import Push
from replay.remote import NAMESPACE, RemoteActor, fetch, is_ready
from replay.server import ReplayActor, ReplaySpec
from tests.replay.naive import make_segment
from tests.replay.test_server import LAYOUT, PRIORITIZED, SPEC, push

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
_NUMBERS = itertools.count()


@pytest.fixture
def start() -> Iterator[Callable[..., RemoteActor]]:
    """Yield a function that starts an actor under a new name, or under the name of a dead actor."""
    handles = []

    def start(actor_class: Any = ReplayActor, *arguments: Any, name: str = "", **options: Any) -> RemoteActor:
        name = name or f"under-test-{os.getpid()}-{next(_NUMBERS)}"
        handles.append(actor_class.options(name=name).remote(*arguments, **options))
        return RemoteActor(name)

    yield start
    for handle in handles:
        ray.kill(handle)


def start_replay(start: Callable[..., RemoteActor], spec: ReplaySpec = SPEC, deadline: float = 30.0) -> ReplayClient:
    return ReplayClient(start(ReplayActor, spec, run_seed=0), deadline_seconds=deadline)


def after(seconds: float, what: Callable[[], Any]) -> threading.Timer:
    timer = threading.Timer(seconds, what)
    timer.start()
    return timer


def wait_for_exit(pid: int) -> None:
    """Wait until a killed process has exited; until then, it may still answer calls after `ray.kill`."""
    deadline = time.monotonic() + 20.0
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} still runs 20 s after it was killed"
        time.sleep(0.02)


@ray.remote(num_cpus=0)
class Stubborn:
    """Replies after some seconds, or fails."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def pid(self) -> int:
        time.sleep(self.seconds)
        return os.getpid()

    def fail(self) -> None:
        raise ValueError("a factor, so to say an actor, is wrong")


def test_experience_goes_in_and_batches_come_out(start: Callable[..., RemoteActor]) -> None:
    client = start_replay(start, PRIORITIZED)
    assert client.insert(push(0, value=5)).accepted  # type: ignore[union-attr]
    reply = client.sample(4, 4)
    assert reply is not None
    assert reply.batch is not None
    assert (reply.batch.observation == 5.0).all()
    assert reply.batch.observation.shape == (4, 4, 3)
    client.update_priorities(reply.batch.ids, np.full((4, 4), 9.0))
    stats = client._actor.call("stats", seconds=30.0)
    assert (stats.size, stats.counters.samples, stats.highest_priority) == (8, 16, 9.0)
    assert stats.pid != os.getpid()
    assert client.waiting_for is None


def test_a_push_sent_twice_is_inserted_once(start: Callable[..., RemoteActor]) -> None:
    client = start_replay(start)
    replies = [client.insert(push(0)), client.insert(push(0))]
    assert [(reply.accepted, reply.repeated) for reply in replies if reply] == [(True, False), (False, True)]
    stats = client._actor.call("stats", seconds=30.0)
    assert (stats.size, stats.counters.env_steps, stats.repeated_pushes) == (8, 8, 1)


def test_a_sample_waits_until_experience_comes(start: Callable[..., RemoteActor]) -> None:
    client = start_replay(start)
    writer = ReplayClient(client._actor)
    seen: list[str] = []

    def insert() -> None:
        while client.waiting_for is None:
            time.sleep(0.01)
        seen.append(client.waiting_for)
        time.sleep(0.2)
        writer.insert(push(0))

    thread = after(0.0, insert)
    reply = client.sample(1, 4)
    thread.join()
    assert reply is not None
    assert reply.batch is not None
    assert seen == ["experience: 0 of the first 8 items inserted"]
    assert client.waiting_for is None
    assert client.seconds_waited >= 0.2


def test_a_call_made_ahead_is_the_next_one(start: Callable[..., RemoteActor]) -> None:
    client = start_replay(start, replace(SPEC, samples_per_insert=float("inf")))
    twin = start_replay(start, replace(SPEC, samples_per_insert=float("inf")))
    for sequence in (0, 1):
        client.insert(push(sequence))
        twin.insert(push(sequence))
    ids = [client.sample(2, 4, ahead=True).batch.ids for _ in range(3)]  # type: ignore[union-attr]
    np.testing.assert_array_equal(ids, [twin.sample(2, 4).batch.ids for _ in range(3)])  # type: ignore[union-attr]
    assert client._actor.call("stats", seconds=30.0).counters.samples == 4 * 8, "the fourth call is in progress"
    other = client.sample(1, 4)
    assert other is not None
    assert other.batch is not None
    assert other.batch.ids.shape == (1, 4), "a call with other arguments is not prefetched"
    twin.sample(2, 4)
    twin.sample(1, 4)
    for _ in range(2):
        pair = [one.sample(2, 4).batch.ids for one in (client, twin)]  # type: ignore[union-attr]
        assert pair[0].shape == pair[1].shape == (2, 4)


def test_a_call_made_ahead_of_a_server_that_died_is_made_again(start: Callable[..., RemoteActor]) -> None:
    spec = replace(SPEC, samples_per_insert=float("inf"))
    name = f"ahead-{os.getpid()}"
    actor = start(ReplayActor, spec, run_seed=0, name=name)
    client = ReplayClient(actor, deadline_seconds=60.0)
    client.insert(push(0, value=1))
    assert client.sample(1, 4, ahead=True) is not None
    stats = actor.call("stats", seconds=30.0)
    os.kill(stats.pid, signal.SIGKILL)
    wait_for_exit(stats.pid)
    ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    end = time.monotonic() + 30.0
    while True:
        try:
            start(ReplayActor, spec, run_seed=0, incarnation=1, name=name)
            break
        except ValueError:  # Ray keeps a dead actor's name for a second
            assert time.monotonic() < end
            time.sleep(0.1)
    ReplayClient(RemoteActor(name)).insert(push(1, value=2))
    reply = client.sample(1, 4, ahead=True)
    assert reply is not None
    assert reply.batch is not None
    # A sample of the dead server may have arrived before its exit; the next sample is from the new server.
    after = client.sample(1, 4)
    assert after is not None
    assert after.batch is not None
    assert (after.batch.observation == 2.0).all()


def test_an_insert_waits_until_the_learner_draws(start: Callable[..., RemoteActor]) -> None:
    client = start_replay(start)
    learner = ReplayClient(client._actor)
    for sequence in (0, 1):
        client.insert(push(sequence))
    timer = after(0.3, lambda: learner.sample(4, 4))
    reply = client.insert(push(2))
    timer.join()
    assert reply is not None
    assert reply.accepted
    assert reply.env_steps == 24


def test_a_wait_ends_at_its_deadline_with_the_reason(start: Callable[..., RemoteActor]) -> None:
    client = start_replay(start, deadline=0.6)
    client._actor.call("stats", seconds=30.0)
    begun = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="sample waited 1 s for experience: 0 of the first 8 items inserted"):
        client.sample(1, 4)
    assert 0.5 < time.monotonic() - begun < 5.0
    for sequence in (0, 1):
        client.insert(push(sequence))
    with pytest.raises(DeadlineExceeded, match="insert waited 1 s for the learner: an insert of 8 would leave 32"):
        client.insert(push(2))


def test_the_stop_event_ends_a_wait(start: Callable[..., RemoteActor]) -> None:
    client, stop = start_replay(start), threading.Event()
    client._actor.call("stats", seconds=30.0)
    timer = after(0.3, stop.set)
    begun = time.monotonic()
    assert client.sample(1, 4, stop=stop) is None
    assert time.monotonic() - begun < 5.0
    timer.join()
    assert client.waiting_for is None
    stop.clear()
    assert client.insert(push(0), stop=stop).accepted  # type: ignore[union-attr]
    assert client.sample(1, 4, stop=stop).batch is not None  # type: ignore[union-attr]


def test_a_layout_mismatch_comes_back_as_itself(start: Callable[..., RemoteActor]) -> None:
    client = start_replay(start)
    wrong = Push(0, 0, 0, (make_segment(replace(LAYOUT, frame_shape=(4,)), 8),))
    with pytest.raises(LayoutMismatch, match=r"frames must have shape \(9, 3\) and dtype float32, got") as caught:
        client.insert(wrong)
    assert type(caught.value) is LayoutMismatch
    assert isinstance(caught.value.__cause__, RayTaskError)  # with the traceback of the remote process
    assert "replay/types.py" in str(caught.value.__cause__)
    assert client.insert(push(0)).accepted  # type: ignore[union-attr]


def test_a_value_error_of_the_method_is_not_taken_for_a_missing_actor(start: Callable[..., RemoteActor]) -> None:
    begun = time.monotonic()
    with pytest.raises(ValueError, match="a factor, so to say an actor") as caught:
        start(Stubborn).call("fail", seconds=20.0)
    assert type(caught.value) is ValueError
    assert time.monotonic() - begun < 15.0


def test_an_actor_that_does_not_answer_is_waited_for_until_the_deadline_or_stop(
    start: Callable[..., RemoteActor],
) -> None:
    actor, stop = start(Stubborn, 3.0), threading.Event()
    with pytest.raises(
        DeadlineExceeded, match=f"waited 0 s for {actor.name} to answer pid: the process did not answer"
    ):
        actor.call("pid", seconds=0.4)
    stop.set()
    begun = time.monotonic()
    assert actor.call("pid", seconds=20.0, stop=stop) is None
    assert time.monotonic() - begun < 2.0


def test_fetch_keeps_its_time_and_looks_at_stop(start: Callable[..., RemoteActor]) -> None:
    actor, stop = start(Stubborn, 0.8), threading.Event()
    reference = actor.later("pid")
    assert not is_ready(reference)
    with pytest.raises(GetTimeoutError):
        fetch(reference, 0.1)
    with pytest.raises(GetTimeoutError):
        fetch(reference, 0.3, stop)
    assert isinstance(fetch(reference, 20.0, stop), int)
    assert is_ready(reference)


def test_an_actor_that_is_not_up_is_named_at_the_deadline() -> None:
    actor = RemoteActor("nobody-of-this-name")
    with pytest.raises(ValueError, match="nobody-of-this-name"):
        actor.later("stats")
    with pytest.raises(DeadlineExceeded, match=r"nobody-of-this-name.*no process with that name is running"):
        actor.call("stats", seconds=0.3)
    stop = threading.Event()
    stop.set()
    assert actor.call("stats", seconds=20.0, stop=stop) is None
    ReplayClient(actor).update_priorities(np.zeros(1, np.int64), np.ones(1))  # has no effect


def test_a_call_goes_on_with_the_actor_that_takes_the_place_of_a_dead_one(
    start: Callable[..., RemoteActor],
) -> None:
    actor = start(Stubborn)
    first = actor.call("pid", seconds=20.0)
    ray.kill(ray.get_actor(actor.name))
    wait_for_exit(first)
    timer = after(1.2, lambda: start(Stubborn, name=actor.name))
    second = actor.call("pid", seconds=20.0)
    timer.join()
    assert first != second


def test_a_remote_actor_travels_by_its_name(start: Callable[..., RemoteActor]) -> None:
    actor = start(Stubborn)
    actor.call("pid", seconds=20.0)
    twin = pickle.loads(pickle.dumps(actor))
    assert twin.name == actor.name
    assert twin.call("pid", seconds=20.0) == actor.call("pid", seconds=20.0)
