"""Experience sessions: their pushes, many at once, and the policy that serves them."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any, ClassVar

import grpc
import gymnasium as gym
import numpy as np
import pytest

from actors import policies
from actors.environments import EnvironmentSpec, seeds_for
from actors.policies import Action
from replay.seeds import spawn_seed
from replay.types import Array
from services.config import resolve
from services.errors import Overloaded
from services.rpc import squall_pb2 as pb
from services.rpc import squall_pb2_grpc
from services.rpc.experience import ExperienceService, NoExperience
from services.supervision.topology import FIRST_SESSION_WORKER, plan
from tests.actors.toys import RandomPolicy
from tests.actors.workers import Direct, Given, make_server, make_spec, make_worker, weights_for
from tests.replay.naive import assert_same_bits, read_everything
from tests.services.rpc.experience_run import (
    CARTPOLE,
    CLOSE,
    ROOT,
    SHORT,
    STACKS,
    TWO,
    VECTOR,
    ZEROS,
    exchange,
    reset,
    serve_run,
    step,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("toy_policies")


class ScriptedPolicy(RandomPolicy):
    """A policy that returns the actions of a script, and calls `at_end` after the last."""

    script: ClassVar[list[Array]] = []
    at_end: ClassVar[Callable[[], None]]

    def act(self, observation: Array, *, step: int, greedy: bool = False) -> Action:
        action = ScriptedPolicy.script.pop(0)[None]
        if not ScriptedPolicy.script:
            ScriptedPolicy.at_end()
        return Action(action, np.zeros(1, np.float32))


@pytest.fixture(autouse=True)
def scripted_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(policies.POLICIES, "scripted", ScriptedPolicy)


@pytest.mark.parametrize(
    ("environment", "n_steps", "clip"), [(SHORT, 1, False), (SHORT, 3, True), (STACKS, 2, False)], ids=str
)
def test_pushes_are_those_of_a_rollout_worker_bit_for_bit(
    environment: EnvironmentSpec, n_steps: int, clip: bool
) -> None:
    spec = make_spec(environment, "random", lanes=1, n_steps=n_steps, clip=clip)
    vector = environment.make(1)
    env = gym.make(environment.id or "")
    # The seed of the first reset of `VectorRunner`.
    seed = seeds_for(vector, spawn_seed(spec.run_seed, "worker").spawn(2)[0].spawn(1)[0])[0]
    vector.close()
    newest_frame = (lambda o: o[-1]) if environment.frame_stack > 1 else (lambda o: o)
    start = int(getattr(env.action_space, "start", 0))
    with serve_run(spec) as run:
        actions: list[Array] = []
        with run.open() as session:
            action = session.reset(newest_frame(env.reset(seed=seed)[0]))
            for _ in range(61):
                if action is None:
                    actions.append(np.zeros_like(actions[-1]))  # the row after an episode's end
                    action = session.reset(newest_frame(env.reset()[0]))
                assert action is not None
                actions.append(action)
                observation, reward, terminated, truncated, _ = env.step(action + start if start else action)
                action = session.step(float(reward), terminated, truncated, newest_frame(observation))
            assert session.close() == 61
        pushes = run.replay.pushes
    direct = Direct(make_server(spec))
    worker = make_worker(replace(spec, policy=replace(spec.policy, kind="scripted")), direct)
    ScriptedPolicy.script, ScriptedPolicy.at_end = actions, worker.stop
    worker.run()
    assert len(direct.pushes) == len(pushes) > 10
    for sent, expected in zip(pushes, direct.pushes, strict=True):
        assert (sent.sequence, sent.episodes, sent.returns) == (expected.sequence, expected.episodes, expected.returns)
        assert len(sent.segments) == len(expected.segments)
        for segment, expected_segment in zip(sent.segments, expected.segments, strict=True):
            for array, expected_array in zip(astuple(segment), astuple(expected_segment), strict=True):
                assert_same_bits(array, expected_array)


def test_a_reset_inside_an_episode_cuts_it_as_if_truncated() -> None:
    with serve_run() as run:
        messages = [reset(ZEROS), step(1, (1, 0, 0, 0)), step(2, (2, 0, 0, 0)), reset((9, 0, 0, 0)),
                    step(3, (10, 0, 0, 0), terminated=True)]  # fmt: skip
        *_, ended, closed = exchange(run.address, pb.PlayRequest(open=run.opening()), *messages, CLOSE)
        assert (ended.episode_ended.episode_return, ended.episode_ended.length) == (1.0, 1)
        assert closed.closed == pb.Closed(steps=3)
        items = read_everything(run.replay.server._table)
        order = np.argsort(items.observation[0, :, 0])
        gamma = run.spec.gamma
        assert items.observation[0, order, 0].tolist() == [0.0, 1.0, 9.0]
        assert items.next_observation[0, order, 0].tolist() == [2.0, 2.0, 10.0]
        np.testing.assert_allclose(items.reward[0, order], [1 + gamma, 1.0, 1.0], rtol=1e-6)
        np.testing.assert_allclose(items.discount[0, order], [gamma**2, gamma, 0.0], rtol=1e-6)
        assert [episode.length for episode in run.replay.server.drain_episodes()] == [1]


async def _play_toy(stub: Any, opening: pb.Open, index: int, steps: int) -> int:
    """Play episodes of 7 steps, with the session and the step in each observation; return the confirmed steps."""
    call = stub.Play(timeout=120.0)
    number = 0

    async def exchange_one(message: pb.PlayRequest) -> pb.PlayResponse:
        await call.write(message)
        answer: pb.PlayResponse = await call.read()
        return answer

    assert (await exchange_one(pb.PlayRequest(open=opening))).opened.session
    while number < steps:
        answer = await exchange_one(reset((index, number, 0, -1)))
        while answer.HasField("action") and number < steps:
            number += 1
            assert answer.action.number == number
            answer = await exchange_one(step(number, (index, number, 0, 0), terminated=number % 7 == 0))
    closed = (await exchange_one(CLOSE)).closed
    assert not closed.finished
    return closed.steps


def test_hundreds_of_sessions_beside_a_worker_count_every_step_once() -> None:
    sessions, steps = 150, 23
    spec = make_spec(CARTPOLE, "random", lanes=2, n_steps=2)

    async def play_all(address: str, opening: pb.Open) -> list[int]:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = squall_pb2_grpc.ExperienceStub(channel)
            return await asyncio.gather(*(_play_toy(stub, opening, index, steps) for index in range(sessions)))

    with serve_run(spec) as run:
        worker = make_worker(spec, run.replay)
        thread = threading.Thread(target=worker.run)
        thread.start()
        confirmed = asyncio.run(play_all(run.address, run.opening()))
        worker.stop()
        thread.join(30.0)
        run.wait_until_drained()
        assert confirmed == [steps] * sessions
        stats = run.replay.server.stats()
        assert stats.counters.env_steps == sum(confirmed) + worker.report().env_steps
        assert stats.repeated_pushes == 0
        batcher = run.service._batcher
        assert batcher.passes < batcher.requests / 2, "concurrent sessions share forward passes"
        items = [
            segment for push in run.replay.pushes if push.worker >= FIRST_SESSION_WORKER for segment in push.segments
        ]
        starts = [tuple(frame[:2]) for segment in items for frame in segment.frames[segment.row]]
        assert sorted(starts) == [(index, number) for index in range(sessions) for number in range(steps)]


def test_a_full_server_turns_sessions_away_and_takes_them_when_others_have_left() -> None:
    with serve_run(max_sessions=2) as run, run.client() as client:
        with client.open(VECTOR, TWO) as first, client.open(VECTOR, TWO):
            with pytest.raises(Overloaded, match="all 2 sessions are in use"):
                client.open(VECTOR, TWO)
            first.reset(np.zeros(4, np.float32))
        run.wait_until_drained()
        with client.open(VECTOR, TWO) as third:
            assert third.reset(np.zeros(4, np.float32)) is not None
            assert third.id != first.id


def test_exploration_follows_the_run_and_weights_are_the_newest() -> None:
    spec = make_spec(CARTPOLE, "constant", lanes=1)
    weights = Given(weights_for(spec, version=3, action=1))
    with serve_run(spec, weights=weights) as run, run.open() as session:
        run.service.note_progress(1234)
        assert session.reset(np.zeros(4, np.float32)) == 1
        weights.waiting.append(weights_for(spec, version=4, action=0))
        policy: Any = run.service._served.policy

        def acts_with_new_weights() -> bool:
            action = session.step(0.0, False, False, np.zeros(4, np.float32))
            return action == 0 and policy.steps[-1] == 1234

        wait_for(acts_with_new_weights)


def test_a_served_run_offers_experience_if_it_is_off_policy() -> None:
    for algorithm, kind in (("dqn", ExperienceService), ("a2c", NoExperience)):
        overrides = {"serve": "auto", **({"actors": 0} if algorithm == "dqn" else {})}
        config, _ = resolve(algorithm, "CartPole-v1", overrides=overrides)
        topology = plan(config, "mine", ROOT)
        # Pickled, as for the endpoint's process, where each service has clients of its own.
        policy, experience = (spec.build(0) for spec in pickle.loads(pickle.dumps(topology._service_specs())))
        assert type(experience) is kind
        if isinstance(experience, ExperienceService):
            assert experience._served._weights is not policy.served._weights
        assert topology.actors == overrides.get("actors", 2)
