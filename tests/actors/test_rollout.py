"""The rollout loop, in process against a plain replay server, and as a live Ray actor."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray

from actors import policies, rollout
from actors.environments import specify
from actors.policies import PolicySpec
from actors.rollout import RolloutActor, RolloutSpec, RolloutWorker, WorkerReport
from actors.weights import WeightClient, Weights, WeightStoreActor, pack
from replay.client import ReplayClient
from replay.errors import DeadlineExceeded, EnvironmentFailed, LayoutMismatch
from replay.messages import InsertReply, Push
from replay.remote import RemoteActor
from replay.server import ReplayActor, ReplayServer, ReplaySpec
from replay.table import TableSpec
from replay.types import EpisodeResult, Moments
from tests.actors.naive import NaiveExperience, assert_are_moments_of, assert_holds, discounted_returns
from tests.actors.toys import TEST_POLICIES, ConstantPolicy, Script, scripted

SHORT = specify("SquallShort-v0")
SCRIPTED = specify("SquallScripted-v0")
LONG = Script(length=10_000)


@pytest.fixture(autouse=True)
def test_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, policy in TEST_POLICIES.items():
        monkeypatch.setitem(policies.POLICIES, kind, policy)


class Direct:
    """A `ReplayClient` without Ray; records the accepted pushes."""

    def __init__(self, server: ReplayServer) -> None:
        self.server = server
        self.waiting_for: str | None = None
        self.pushes: list[Push] = []

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply | None:
        while True:
            reply = self.server.insert(push)
            if reply.wait is None:
                self.waiting_for = None
                self.pushes.append(push)
                return reply
            self.waiting_for = reply.wait
            if stop is not None and stop.wait(0.002):
                return None


class Blocked(Direct):
    """A replay that accepts no push."""

    def __init__(self) -> None:
        self.waiting_for = None
        self.pushes = []

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply | None:
        self.waiting_for = "the learner: it sleeps"
        assert stop is not None
        stop.wait()
        return None


class Failing(Direct):
    """A replay that raises at push number `at`."""

    def __init__(self, server: ReplayServer, at: int) -> None:
        super().__init__(server)
        self.at = at

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply | None:
        if push.sequence == self.at:
            raise LayoutMismatch("the push does not fit")
        return super().insert(push, stop=stop)


class Given:
    """A weight source that returns the weights of a list, one per poll."""

    def __init__(self, *weights: Weights | None) -> None:
        self.waiting = list(weights)
        self.version = -1

    pending = False

    def poll(self) -> Weights | None:
        weights = self.waiting.pop(0) if self.waiting else None
        if weights is not None:
            self.version = weights.version
        return weights


def make_spec(
    environment: Any = SCRIPTED,
    kind: str = "constant",
    *,
    lanes: int = 2,
    length: int = 4,
    n_steps: int = 1,
    clip: bool = False,
    seed: int = 0,
) -> RolloutSpec:
    return RolloutSpec(
        PolicySpec(kind, environment), lanes, length, n_steps, 0.97, clip, seed, track_return_statistics=True
    )


def make_server(
    spec: RolloutSpec, capacity: int = 10_000, max_env_steps: int | None = None, **rate: float
) -> ReplayServer:
    limits = {"samples_per_insert": float("inf"), "minimum_size": 1, **rate}
    replay = ReplaySpec(
        TableSpec(spec.layout, capacity),
        largest_push=spec.largest_push,
        batch_size=1,
        batches_per_sample=1,
        **limits,  # type: ignore[arg-type]
    )
    return ReplayServer(replay, run_seed=0, max_env_steps=max_env_steps)


def weights_for(spec: RolloutSpec, version: int = 0, action: int = 0) -> Weights:
    policy = spec.policy.build()
    if isinstance(policy, ConstantPolicy):
        policy.action.fill_(action)  # type: ignore[operator]
    return pack(policy, version)


def make_worker(spec: RolloutSpec, replay: Any, *weights: Weights | None, **identity: int) -> RolloutWorker:
    identity = {"worker": 0, "workers": 1, "incarnation": 0, **identity}
    return RolloutWorker(spec, replay=replay, weights=Given(*(weights or (weights_for(spec),))), **identity)


def constant_policy(worker: RolloutWorker) -> ConstantPolicy:
    assert isinstance(worker._policy, ConstantPolicy)
    return worker._policy


def run_vector_steps(worker: RolloutWorker, steps: int) -> WorkerReport:
    constant_policy(worker).after[steps] = worker.stop
    return worker.run()


@contextmanager
def running(worker: RolloutWorker) -> Iterator[Callable[[], WorkerReport]]:
    """Run a worker in a thread; yield a function that joins the thread and returns its report or raises its error."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(worker.run())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def end() -> WorkerReport:
        thread.join(20)
        assert not thread.is_alive()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        report: WorkerReport = outcome[0]
        return report

    try:
        yield end
    finally:
        worker.stop()
        thread.join(20)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("n_steps", [1, 3])
def test_the_server_has_what_the_environment_did(clip: bool, n_steps: int) -> None:
    spec = make_spec(SHORT, "random", lanes=3, length=8, n_steps=n_steps, clip=clip)
    server = make_server(spec)
    replay = Direct(server)
    worker = make_worker(spec, replay)
    naive = NaiveExperience(worker._runner, segment_length=8, n_steps=n_steps, gamma=0.97, clip=clip)
    with running(worker) as end:
        wait_until(lambda: len(replay.pushes) > 12)
        worker.stop()
        report = end()
    expected = naive.in_order()
    assert_holds(server._table, expected)
    assert report.env_steps == server.stats().counters.env_steps == len(expected)
    assert report.status_message == "done"

    # Episode returns are those of the environment, even if the learner sees clipped rewards.
    finished = [episode for lane in naive.lanes for episode in lane.episodes if episode and episode[-1].ended]
    results = [EpisodeResult(sum_in_order([step.reward for step in episode]), len(episode)) for episode in finished]
    sent = server.drain_episodes()
    key = lambda result: (result.length, result.episode_return)  # noqa: E731
    assert sorted(sent, key=key) == sorted(results, key=key)
    assert report.episodes == len(results) > 20
    clipped = {abs(transition.reward) <= sum(0.97**k for k in range(n_steps)) + 1e-6 for transition in expected}
    assert clipped == ({True} if clip else {True, False})


def sum_in_order(rewards: list[float]) -> float:
    total = 0.0
    for reward in rewards:
        total += reward
    return total


@pytest.mark.parametrize("clip", [False, True])
def test_the_moments_of_returns_come_with_the_pushes(clip: bool) -> None:
    spec = make_spec(SHORT, "random", lanes=3, length=8, n_steps=3, clip=clip)
    server = make_server(spec)
    replay = Direct(server)
    worker = make_worker(spec, replay)
    naive = NaiveExperience(worker._runner, segment_length=8, n_steps=3, gamma=0.97)
    with running(worker) as end:
        wait_until(lambda: len(replay.pushes) > 6)
        worker.stop()
        end()
    numbers = discounted_returns(naive, clip)
    merged = Moments()
    for push in replay.pushes:
        # The last push may hold only the n-step tail, whose steps are in the moments of the push before.
        assert (push is replay.pushes[-1]) or push.returns.count > 0
        assert push.returns.count <= 3 * 10
        merged = merged.merged(push.returns)
    assert_are_moments_of(merged, numbers)
    served = server.sample(1, 1)
    assert_are_moments_of(served.returns, numbers)
    assert server.insert(replay.pushes[-1]).repeated
    assert server.sample(1, 1).returns == served.returns


def test_pushes_are_numbered_signed_and_bounded() -> None:
    spec = make_spec(lanes=2, length=4, n_steps=5)
    replay = Direct(make_server(spec))
    with scripted(default=LONG):
        run_vector_steps(make_worker(spec, replay, worker=3, workers=5, incarnation=2), 31)
    assert [push.sequence for push in replay.pushes] == list(range(len(replay.pushes)))
    assert {(push.worker, push.incarnation) for push in replay.pushes} == {(3, 2)}
    steps = [push.steps for push in replay.pushes]
    # Of 31 rows, 24 are sent once the 4 rows after them are known; the flush sends a segment and its tail of 3.
    assert steps == [2 * 4] * 6 + [2 * 7]
    assert spec.largest_push == 2 * 7


def test_stop_sends_the_rest() -> None:
    for steps in (1, 2, 3, 4, 5):
        spec = make_spec(lanes=2, length=4)
        server = make_server(spec)
        with scripted(default=LONG):
            report = run_vector_steps(make_worker(spec, Direct(server)), steps)
        assert report.env_steps == server.stats().counters.env_steps == 2 * steps


def test_nothing_happens_before_the_first_weights() -> None:
    spec = make_spec()
    replay = Direct(make_server(spec))
    given = Given()
    worker = RolloutWorker(spec, worker=1, workers=2, incarnation=0, replay=replay, weights=given)
    assert worker.report().status_message == "starting"
    with running(worker) as end:
        time.sleep(0.1)
        report = worker.report()
        assert report.waiting_for == "the learner's first weights"
        assert (report.env_steps, report.weights_version, report.worker) == (0, -1, 1)
        given.waiting.append(weights_for(spec, 6))
        wait_until(lambda: worker.report().env_steps > 0)
        assert worker.report().waiting_for is None
        assert worker.report().status_message == "rolling out"
        assert worker.report().weights_version == 6
        worker.stop()
        end()


def test_a_worker_may_be_stopped_before_the_first_weights() -> None:
    spec = make_spec()
    replay = Direct(make_server(spec))
    worker = make_worker(spec, replay, None)
    with running(worker) as end:
        worker.stop()
        assert end().env_steps == 0
    assert replay.pushes == []


def test_weights_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "_SECONDS_FOR_FIRST_WEIGHTS", 0.1)
    spec = make_spec()
    with pytest.raises(DeadlineExceeded, match="first weights did not arrive"):
        make_worker(spec, Direct(make_server(spec)), None).run()


def test_weights_of_another_network_end_the_run() -> None:
    spec, other = make_spec(), make_spec(kind="epsilon_greedy")
    with pytest.raises(LayoutMismatch, match="do not fit this network"):
        make_worker(spec, Direct(make_server(spec)), weights_for(other)).run()


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_new_weights_change_what_is_done(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "_SECONDS_BETWEEN_POLLS", seconds)
    spec = make_spec()
    weights = [weights_for(spec, 3, action=0), None, weights_for(spec, 4, action=1)]
    worker = make_worker(spec, Direct(make_server(spec)), *weights)
    report = run_vector_steps(worker, 40)
    if seconds:
        assert (report.weights_version, constant_policy(worker).taken) == (3, [0] * 40), "the next poll is not due yet"
        return
    assert report.weights_version == 4
    assert constant_policy(worker).taken == [0] * 8 + [1] * 32, "weights are polled after a push, here every 4 steps"


def test_exploration_follows_the_servers_count() -> None:
    spec = make_spec(lanes=1, length=2)
    server = make_server(spec)
    worker = make_worker(spec, Direct(server))
    with running(worker) as end:
        wait_until(lambda: len(constant_policy(worker).steps) > 10)
        server._limiter.record_insert(10**9)  # as if other workers had pushed steps
        wait_until(lambda: constant_policy(worker).steps[-1] > 10**9)
        worker.stop()
        end()
    steps = constant_policy(worker).steps
    assert steps[0] == 0
    assert steps == sorted(steps)
    assert steps[-1] <= server.stats().counters.env_steps


def test_a_server_that_says_wait_stops_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "DRAIN_SECONDS", 0.2)
    spec = make_spec(lanes=2, length=4)
    with scripted(default=LONG):
        worker = make_worker(spec, Blocked())
    # One push is at the server, two are waiting, and one is blocked in `put`; n = 1.
    most = 4 * 2 * 4
    with running(worker) as end:
        wait_until(lambda: worker.report().env_steps == most)
        time.sleep(0.3)
        assert worker.report().env_steps == most
        assert worker.report().waiting_for == "the learner: it sleeps"
        worker.stop()
        begun = time.monotonic()
        end()
        assert time.monotonic() - begun < 3.0


@pytest.mark.parametrize("opens", [True, False])
def test_a_draining_worker_sends_its_experience_until_the_deadline(
    monkeypatch: pytest.MonkeyPatch, opens: bool
) -> None:
    monkeypatch.setattr(rollout, "DRAIN_SECONDS", 0.0)
    spec = make_spec(lanes=2, length=4)
    server = make_server(spec, samples_per_insert=1.0, minimum_size=8)
    with scripted(default=LONG):
        worker = make_worker(spec, Direct(server))
    with running(worker) as end:
        wait_until(lambda: "samples due" in str(worker.report().waiting_for))
        wait_until(lambda: worker.report().env_steps == worker.report().steps_sent + 4 * 2 * 4)
        worker.stop(20.0 if opens else 0.3)
        time.sleep(0.4)
        while opens and worker.report().status_message != "done":
            server.sample(1, 1)
            time.sleep(0.001)
        report = end()
    assert report.steps_sent == server.stats().counters.env_steps
    assert report.steps_unsent == report.env_steps - report.steps_sent
    assert (report.steps_unsent == 0) is opens


def test_a_limiter_that_says_wait_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "DRAIN_SECONDS", 0.2)
    spec = make_spec(lanes=2, length=4)
    server = make_server(spec, samples_per_insert=1.0, minimum_size=8)
    with scripted(default=LONG):
        worker = make_worker(spec, Direct(server))
    with running(worker):
        wait_until(lambda: "samples due" in str(worker.report().waiting_for))
        before = server.stats().counters.env_steps
        for _ in range(16):
            assert server.sample(1, 1).batch is not None
        wait_until(lambda: server.stats().counters.env_steps > before)


@pytest.mark.parametrize("at", [0, 1, 4])
def test_what_a_push_meets_ends_the_run(at: int) -> None:
    """Also if it is the last push, after which the loop itself does not check for errors."""
    spec = make_spec(lanes=1, length=4)
    with scripted(default=LONG):
        worker = make_worker(spec, Failing(make_server(spec), at))
    with pytest.raises(LayoutMismatch, match="the push does not fit"):
        run_vector_steps(worker, 18)
    assert worker.report().status_message == "rolling out"


def test_a_finished_run_ends_the_loop() -> None:
    spec = make_spec(lanes=2, length=4)
    server = make_server(spec, max_env_steps=50)
    with scripted(default=LONG), running(make_worker(spec, Direct(server))) as end:
        end()
    assert 50 <= server.stats().counters.env_steps < 50 + 2 * 4


def test_failures_are_reported() -> None:
    spec = make_spec(lanes=2, length=4)
    server = make_server(spec)
    with scripted({0: Script(length=100, raises_at=frozenset({6}))}, default=LONG):
        report = run_vector_steps(make_worker(spec, Direct(server)), 12)
        # The failed lane lost its sixth step, its fifth step, which was not sent yet, and a row to the reset.
        assert server.stats().counters.env_steps == 12 + 12 - 3
        assert report.env_steps == 12 + 12 - 2
    assert report.failures == 1

    with scripted({0: Script(length=100, raises_at=frozenset({6}))}, default=LONG):
        worker = make_worker(spec, Direct(make_server(spec)))
        messages: list[str] = []
        constant_policy(worker).after[8] = lambda: messages.append(worker.report().status_message)
        run_vector_steps(worker, 9)
    assert messages == ["recreated an environment after RuntimeError: instance 0 broke at step 6"]


def test_an_environment_that_fails_for_good_ends_the_run() -> None:
    spec = make_spec(lanes=1)
    with scripted(default=Script(raises_at=frozenset({1}))):
        worker = make_worker(spec, Direct(make_server(spec)))
        with pytest.raises(EnvironmentFailed, match="instance 5 broke at step 1"):
            worker.run()
    assert not worker._sender._thread.is_alive()


def test_the_last_episodes_are_sent_though_no_step_is_left() -> None:
    spec = make_spec(lanes=1, length=64)
    replay = Direct(make_server(spec))
    with scripted({0: Script(length=2, reward=3.0, raises_at=frozenset({3}))}):
        run_vector_steps(make_worker(spec, replay), 4)
    [push] = replay.pushes
    assert push.segments == ()
    assert push.episodes == (EpisodeResult(6.0, 2),)
    assert replay.server.drain_episodes() == push.episodes


def test_every_worker_and_incarnation_has_its_own_experience() -> None:
    def first_push(**identity: int) -> bytes:
        spec = make_spec(specify("CartPole-v1"), lanes=2, length=8, seed=identity.pop("seed", 0))
        replay = Direct(make_server(spec))
        run_vector_steps(make_worker(spec, replay, **identity), 9)
        return b"".join(segment.frames.tobytes() for segment in replay.pushes[0].segments)

    pushes = [first_push(), first_push(worker=1, workers=2), first_push(incarnation=1), first_push(seed=1)]
    assert len(set(pushes)) == 4
    assert first_push() == pushes[0]


@pytest.mark.ray
def test_a_live_worker_is_lean_and_sends_what_it_counts(local_ray: None) -> None:
    spec = make_spec(specify("CartPole-v1"), "epsilon_greedy", lanes=2, length=8)
    replay = make_server(spec).spec
    actors = [
        ReplayActor.options(name="replay-of-rollout").remote(replay, run_seed=0),
        WeightStoreActor.options(name="weights-of-rollout").remote(ray.put),
    ]
    server, store = actors
    worker = RolloutActor.remote(
        spec,
        worker=0,
        workers=1,
        incarnation=0,
        replay=ReplayClient(RemoteActor("replay-of-rollout")),
        weights=WeightClient(RemoteActor("weights-of-rollout")),
        threads=1,
    )
    actors.append(worker)
    try:
        outcome = worker.run.remote()
        ray.get(store.publish.remote(weights_for(spec, 5)))
        wait_until(lambda: ray.get(server.stats.remote()).counters.env_steps > 200)
        report = ray.get(worker.report.remote(), timeout=20)
        assert report.weights_version == 5
        modules = ray.get(worker.__ray_call__.remote(lambda _: sorted(sys.modules)), timeout=20)
        assert "actors.rollout" in modules
        packages = {module.partition(".")[0] for module in modules}
        assert not packages & {"learner", "services", "pytorch_lightning", "lightning", "lightning_fabric"}

        ray.get(worker.stop.remote())
        report = ray.get(outcome, timeout=20)
        stats = ray.get(server.stats.remote())
        assert report.env_steps == stats.counters.env_steps
        assert report.status_message == "done"
        assert len({report.pid, stats.pid, ray.get(store.report.remote())["pid"]}) == 3
        assert len(ray.get(server.drain_episodes.remote())) == report.episodes
    finally:
        for actor in actors:
            ray.kill(actor)
