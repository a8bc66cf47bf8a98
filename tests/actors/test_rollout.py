"""The rollout loop, in process against a plain replay server, and as a live Ray actor."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors import policies, rollout
from actors.environments import EnvironmentSpec, specify
from actors.policies import Policy, PolicySpec, StochasticPolicy
from actors.rollout import RolloutActor, RolloutSpec, RolloutWorker, WorkerReport
from actors.vector_runner import VectorRunner
from actors.weights import WeightClient, Weights, WeightStoreActor, pack
from replay.client import ReplayClient
from replay.errors import DeadlineExceeded, EnvironmentFailed, LayoutMismatch
from replay.messages import InsertReply, Push
from replay.remote import RemoteActor
from replay.server import ReplayActor, ReplayServer, ReplaySpec
from replay.table import TableSpec
from replay.types import EpisodeResult, Moments
from tests.actors.naive import NaiveExperience, assert_holds
from tests.actors.toys import TEST_POLICIES, Lever, Script, Scripted, theatre

SHORT = specify("SquallShort-v0")
SCRIPTED = specify("SquallScripted-v0")
LONG = Script(length=10_000)


@pytest.fixture(autouse=True)
def test_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, policy in TEST_POLICIES.items():
        monkeypatch.setitem(policies.POLICIES, kind, policy)


class Direct:
    """A `ReplayClient` without Ray; keeps what was sent."""

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
    """Never lets a push in."""

    def __init__(self) -> None:
        self.waiting_for = None
        self.pushes = []

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply | None:
        self.waiting_for = "the learner: it sleeps"
        assert stop is not None
        stop.wait()
        return None


class Failing(Direct):
    """Fails at one push."""

    def __init__(self, server: ReplayServer, at: int) -> None:
        super().__init__(server)
        self.at = at

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply | None:
        if push.sequence == self.at:
            raise LayoutMismatch("the push does not fit")
        return super().insert(push, stop=stop)


class Given:
    """Weights from a list, one at a time."""

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
    kind: str = "lever",
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


def weights_for(spec: RolloutSpec, version: int = 0, arm: int = 0) -> Weights:
    policy = spec.policy.build()
    if isinstance(policy, Lever):
        policy.arm.fill_(arm)  # type: ignore[operator]
    return pack(policy, version)


def make_worker(spec: RolloutSpec, replay: Any, *weights: Weights | None, **set_rank: int) -> RolloutWorker:
    set_rank = {"worker": 0, "workers": 1, "incarnation": 0, **set_rank}
    return RolloutWorker(spec, replay=replay, weights=Given(*(weights or (weights_for(spec),))), **set_rank)


def lever(worker: RolloutWorker) -> Lever:
    assert isinstance(worker._policy, Lever)
    return worker._policy


def run_rows(worker: RolloutWorker, rows: int) -> WorkerReport:
    lever(worker).after[rows] = worker.stop
    return worker.run()


@contextmanager
def running(worker: RolloutWorker) -> Iterator[Callable[[], WorkerReport]]:
    """Run in a thread; gives a function that waits for its end and returns or raises what came of it."""
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
    twin = NaiveExperience(worker._lanes, segment_length=8, n_steps=n_steps, gamma=0.97, clip=clip)
    with running(worker) as end:
        wait_until(lambda: len(replay.pushes) > 12)
        worker.stop()
        report = end()
    expected = twin.in_order()
    assert_holds(server._table, expected)
    assert report.env_steps == server.stats().counters.env_steps == len(expected)
    assert report.status_message == "done"

    # The returns are the environment's, whatever the learner sees.
    finished = [episode for lane in twin.lanes for episode in lane.episodes if episode and episode[-1].ended]
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


def discounted_returns(twin: NaiveExperience, clip: bool) -> list[float]:
    """Return `G_t = gamma G_{t-1} + r_t` of every step that did not fail; G starts anew with each episode."""
    found = []
    for at, lane in enumerate(twin.lanes):
        for episode in lane.episodes:
            total = 0.0
            for step in episode:
                total = twin.gamma * total + (min(max(step.reward, -1.0), 1.0) if clip else step.reward)
                if (step.row, at) not in twin.failures:
                    found.append(total)
    return found


def assert_are_moments_of(moments: Moments, numbers: list[float]) -> None:
    assert moments.count == len(numbers)
    assert moments.mean == pytest.approx(np.mean(numbers), rel=1e-9, abs=1e-12)
    assert moments.std == pytest.approx(np.std(numbers), rel=1e-9)


def one_policy(environment: EnvironmentSpec, kind: str = "random") -> Policy:
    policy = PolicySpec(kind, environment).build()
    policy.begin(np.random.SeedSequence(0))
    return policy


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_discounted_returns_are_the_twin_s(gamma: float, clip: bool) -> None:
    """Over random rewards, terminations, truncations, and the rows after them, which are no steps."""
    lanes = VectorRunner(
        SHORT, 4, np.random.SeedSequence(3), track_return_statistics=True, gamma=gamma, clip_rewards=clip
    )
    twin = NaiveExperience(lanes, segment_length=1, n_steps=1, gamma=gamma)
    policy = one_policy(SHORT)
    lanes.reset()
    for _ in range(150):
        lanes.step(policy, step=0)
    numbers = discounted_returns(twin, clip)
    assert {step.terminated for lane in twin.lanes for episode in lane.episodes for step in episode if step.ended} == {
        True,
        False,
    }
    assert 300 < len(numbers) < 550
    assert_are_moments_of(lanes.returns, numbers)


def test_a_failed_step_and_its_rebuilt_episode_start_discounted_returns_anew() -> None:
    scripts = {0: Script(length=4, reward=2.0, raises_at=frozenset({3})), 2: Script(length=3, reward=-0.5)}
    with theatre(scripts, default=Script(length=3, reward=0.25, truncates=True)):
        lanes = VectorRunner(SCRIPTED, 2, np.random.SeedSequence(0), track_return_statistics=True, gamma=0.5)
        twin = NaiveExperience(lanes, segment_length=1, n_steps=1, gamma=0.5)
        policy = one_policy(SCRIPTED)
        lanes.reset()
        rows = [lanes.step(policy, step=0) for _ in range(10)]
        lanes.close()
    assert [row.failed.tolist() for row in rows].count([True, False]) == 1
    # Lane 0: 2 and 3, then the failure and a reset, then those of instance 2.
    first = [2.0, 3.0, -0.5, -0.75, -0.875, -0.5, -0.75]
    second = [0.25, 0.375, 0.4375] * 2 + [0.25, 0.375]
    assert discounted_returns(twin, clip=False) == first + second
    assert_are_moments_of(lanes.returns, first + second)


def test_a_reset_starts_discounted_returns_anew_and_keeps_their_moments() -> None:
    with theatre(default=LONG):
        lanes = VectorRunner(SCRIPTED, 1, np.random.SeedSequence(0), track_return_statistics=True, gamma=0.5)
        policy = one_policy(SCRIPTED)
        for _ in range(2):
            lanes.reset()
            for _ in range(3):
                lanes.step(policy, step=0)
        lanes.close()
    assert_are_moments_of(lanes.returns, [1.0, 1.5, 1.75] * 2)


@pytest.mark.parametrize("clip", [False, True])
def test_the_moments_of_returns_come_with_the_pushes(clip: bool) -> None:
    spec = make_spec(SHORT, "random", lanes=3, length=8, n_steps=3, clip=clip)
    server = make_server(spec)
    replay = Direct(server)
    worker = make_worker(spec, replay)
    twin = NaiveExperience(worker._lanes, segment_length=8, n_steps=3, gamma=0.97)
    with running(worker) as end:
        wait_until(lambda: len(replay.pushes) > 6)
        worker.stop()
        end()
    numbers = discounted_returns(twin, clip)
    merged = Moments()
    for push in replay.pushes:
        # The last push holds the tail of steps that were told of before, and perhaps nothing else.
        assert (push is replay.pushes[-1]) or push.returns.count > 0
        assert push.returns.count <= 3 * 10
        merged = merged.merged(push.returns)
    assert_are_moments_of(merged, numbers)
    served = server.sample(1, 1)
    assert_are_moments_of(served.returns, numbers)
    assert server.insert(replay.pushes[-1]).repeated
    assert server.sample(1, 1).returns == served.returns


def test_a_row_shows_what_the_learner_sees() -> None:
    with theatre({0: Script(reward=7.0), 1: Script(reward=-0.5)}):
        for clip in (False, True):
            lanes = VectorRunner(SCRIPTED, 2, np.random.SeedSequence(0), clip_rewards=clip)
            policy = one_policy(SCRIPTED, "lever")
            lanes.reset()
            rows = [lanes.step(policy, step=0) for _ in range(5)]
            lanes.close()
            if not clip:
                assert rows[0].reward.tolist() == [7.0, -0.5]
                assert dict(rows[4].episodes) == {0: EpisodeResult(35.0, 5), 1: EpisodeResult(-2.5, 5)}
                Scripted.theatre.made = 0
    assert rows[0].reward.tolist() == [1.0, -0.5]
    assert dict(rows[4].episodes) == {0: EpisodeResult(35.0, 5), 1: EpisodeResult(-2.5, 5)}
    # This policy is no distribution.
    assert (rows[0].log_probability.dtype, rows[0].log_probability.tolist()) == (np.float32, [0.0, 0.0])


def test_a_row_has_the_policy_s_log_probabilities_and_unclipped_actions() -> None:
    stacks = specify("SquallStacks-v0")  # its box is [-2, 2], and it refuses actions outside
    lanes = VectorRunner(stacks, 50, np.random.SeedSequence(0))
    policy = PolicySpec("gaussian", replace(stacks, observation_shape=(24,)), (4,)).build()
    policy.begin(np.random.SeedSequence(1))
    observation = lanes.reset()
    row = lanes.step(policy, step=0)
    assert isinstance(policy, StochasticPolicy)
    assert np.abs(row.action).max() > 2.0
    log_probability, _ = policy.log_probability(policy(torch.from_numpy(observation)), torch.from_numpy(row.action))
    assert row.log_probability.dtype == np.float32
    np.testing.assert_allclose(row.log_probability, log_probability.detach(), rtol=1e-4, atol=1e-4)


def test_pushes_are_numbered_signed_and_bounded() -> None:
    spec = make_spec(lanes=2, length=4, n_steps=5)
    replay = Direct(make_server(spec))
    with theatre(default=LONG):
        run_rows(make_worker(spec, replay, worker=3, workers=5, incarnation=2), 31)
    assert [push.sequence for push in replay.pushes] == list(range(len(replay.pushes)))
    assert {(push.worker, push.incarnation) for push in replay.pushes} == {(3, 2)}
    steps = [push.steps for push in replay.pushes]
    # Of 31 rows 24 are sent with the 4 rows behind them known; the flush sends a segment and its tail of 3.
    assert steps == [2 * 4] * 6 + [2 * 7]
    assert spec.largest_push == 2 * 7


def test_stop_sends_the_rest() -> None:
    for rows in (1, 2, 3, 4, 5):
        spec = make_spec(lanes=2, length=4)
        server = make_server(spec)
        with theatre(default=LONG):
            report = run_rows(make_worker(spec, Direct(server)), rows)
        assert report.env_steps == server.stats().counters.env_steps == 2 * rows


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
    with pytest.raises(DeadlineExceeded, match="no weights came"):
        make_worker(spec, Direct(make_server(spec)), None).run()


def test_weights_of_another_network_end_the_run() -> None:
    spec, other = make_spec(), make_spec(kind="epsilon_greedy")
    with pytest.raises(LayoutMismatch, match="not of this network"):
        make_worker(spec, Direct(make_server(spec)), weights_for(other)).run()


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_new_weights_change_what_is_done(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "_SECONDS_BETWEEN_REFRESHES", seconds)
    spec = make_spec()
    weights = [weights_for(spec, 3, arm=0), None, weights_for(spec, 4, arm=1)]
    worker = make_worker(spec, Direct(make_server(spec)), *weights)
    report = run_rows(worker, 40)
    if seconds:
        assert (report.weights_version, lever(worker).pulled) == (3, [0] * 40), "not asked for again so soon"
        return
    assert report.weights_version == 4
    assert lever(worker).pulled == [0] * 8 + [1] * 32, "weights are asked for after a push, every 4 rows here"


def test_exploration_follows_the_servers_count() -> None:
    spec = make_spec(lanes=1, length=2)
    server = make_server(spec)
    worker = make_worker(spec, Direct(server))
    with running(worker) as end:
        wait_until(lambda: len(lever(worker).steps) > 10)
        server._limiter.record_insert(10**9)  # what other workers push
        wait_until(lambda: lever(worker).steps[-1] > 10**9)
        worker.stop()
        end()
    steps = lever(worker).steps
    assert steps[0] == 0
    assert steps == sorted(steps)
    assert steps[-1] <= server.stats().counters.env_steps


def test_a_server_that_says_wait_stops_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "SECONDS_TO_SEND_THE_REST", 0.2)
    spec = make_spec(lanes=2, length=4)
    with theatre(default=LONG):
        worker = make_worker(spec, Blocked())
    # One push with the server, two waiting, one in the loop's hands; n = 1.
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
def test_a_worker_that_leaves_sends_what_it_has_as_long_as_it_is_given(
    monkeypatch: pytest.MonkeyPatch, opens: bool
) -> None:
    monkeypatch.setattr(rollout, "SECONDS_TO_SEND_THE_REST", 0.0)
    spec = make_spec(lanes=2, length=4)
    server = make_server(spec, samples_per_insert=1.0, minimum_size=8)
    with theatre(default=LONG):
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
    monkeypatch.setattr(rollout, "SECONDS_TO_SEND_THE_REST", 0.2)
    spec = make_spec(lanes=2, length=4)
    server = make_server(spec, samples_per_insert=1.0, minimum_size=8)
    with theatre(default=LONG):
        worker = make_worker(spec, Direct(server))
    with running(worker):
        wait_until(lambda: "samples due" in str(worker.report().waiting_for))
        held = server.stats().counters.env_steps
        for _ in range(16):
            assert server.sample(1, 1).batch is not None
        wait_until(lambda: server.stats().counters.env_steps > held)


@pytest.mark.parametrize("at", [0, 1, 4])
def test_what_a_push_meets_ends_the_run(at: int) -> None:
    """Also when it was the very last push, of which the loop itself hears nothing any more."""
    spec = make_spec(lanes=1, length=4)
    with theatre(default=LONG):
        worker = make_worker(spec, Failing(make_server(spec), at))
    with pytest.raises(LayoutMismatch, match="the push does not fit"):
        run_rows(worker, 18)
    assert worker.report().status_message == "rolling out"


def test_a_finished_run_ends_the_loop() -> None:
    spec = make_spec(lanes=2, length=4)
    server = make_server(spec, max_env_steps=50)
    with theatre(default=LONG), running(make_worker(spec, Direct(server))) as end:
        end()
    assert 50 <= server.stats().counters.env_steps < 50 + 2 * 4


def test_failures_are_reported() -> None:
    spec = make_spec(lanes=2, length=4)
    server = make_server(spec)
    with theatre({0: Script(length=100, raises_at=frozenset({6}))}, default=LONG):
        report = run_rows(make_worker(spec, Direct(server)), 12)
        # The broken lane lost the sixth step with the fifth, which was not sent yet, and a row to its reset.
        assert server.stats().counters.env_steps == 12 + 12 - 3
        assert report.env_steps == 12 + 12 - 2
    assert report.failures == 1

    with theatre({0: Script(length=100, raises_at=frozenset({6}))}, default=LONG):
        worker = make_worker(spec, Direct(make_server(spec)))
        words: list[str] = []
        lever(worker).after[8] = lambda: words.append(worker.report().status_message)
        run_rows(worker, 9)
    assert words == ["rebuilt an environment after RuntimeError: instance 0 broke at step 6"]


def test_an_environment_that_fails_for_good_ends_the_run() -> None:
    spec = make_spec(lanes=1)
    with theatre(default=Script(raises_at=frozenset({1}))):
        worker = make_worker(spec, Direct(make_server(spec)))
        with pytest.raises(EnvironmentFailed, match="instance 5 broke at step 1"):
            worker.run()
    assert not worker._sender._thread.is_alive()


def test_the_last_episodes_are_sent_though_no_step_is_left() -> None:
    spec = make_spec(lanes=1, length=64)
    replay = Direct(make_server(spec))
    with theatre({0: Script(length=2, reward=3.0, raises_at=frozenset({3}))}):
        run_rows(make_worker(spec, replay), 4)
    [push] = replay.pushes
    assert push.segments == ()
    assert push.episodes == (EpisodeResult(6.0, 2),)
    assert replay.server.drain_episodes() == push.episodes


def test_every_worker_and_incarnation_has_its_own_experience() -> None:
    def first_push(**set_rank: int) -> bytes:
        spec = make_spec(specify("CartPole-v1"), lanes=2, length=8, seed=set_rank.pop("seed", 0))
        replay = Direct(make_server(spec))
        run_rows(make_worker(spec, replay, **set_rank), 9)
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


def test_discounted_returns_are_measured_only_where_they_are_asked_for() -> None:
    with theatre():
        lanes = VectorRunner(SCRIPTED, 2, np.random.SeedSequence(0), gamma=0.5)
        lanes.reset()
        for _ in range(5):
            lanes.step(one_policy(SCRIPTED, "lever"), step=0)
        lanes.close()
    assert lanes.returns == Moments()
