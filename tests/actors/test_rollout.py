"""The rollout loop, in process against a plain replay server, and as a live Ray actor."""

from __future__ import annotations

import sys
import time

import pytest
import ray

from actors import rollout
from actors.environments import specify
from actors.rollout import RolloutActor, RolloutWorker
from actors.weights import WeightClient, WeightStoreActor
from replay.client import ReplayClient
from replay.errors import DeadlineExceeded, EnvironmentFailed, LayoutMismatch
from replay.remote import RemoteActor
from replay.server import ReplayActor
from replay.types import EpisodeResult, Moments
from tests.actors.naive import NaiveExperience, assert_are_moments_of, assert_holds, discounted_returns
from tests.actors.toys import Script, scripted
from tests.actors.workers import (
    LONG,
    SHORT,
    Direct,
    Given,
    constant_policy,
    make_server,
    make_spec,
    make_worker,
    run_vector_steps,
    running,
    wait_until,
    weights_for,
)

pytestmark = pytest.mark.usefixtures("toy_policies")


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
