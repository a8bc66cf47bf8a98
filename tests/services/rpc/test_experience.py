"""Experience over gRPC: real servers and clients on loopback, a real replay behind them, in one process."""

from __future__ import annotations

import asyncio
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import grpc
import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from actors import policies
from actors.environments import DiscreteActions, EnvironmentSpec, seeds_for, specify
from actors.policies import Action, Policy
from actors.rollout import RolloutSpec
from replay.errors import ConfigurationError, DeadlineExceeded
from replay.messages import InsertReply, Push
from replay.seeds import spawn_seed
from replay.server import ReplayServer
from replay.types import Array
from services.client.experience_client import ExperienceClient, ExperienceSession
from services.config import resolve
from services.errors import CallFailed, NotReady, OutOfOrder, Overloaded, ServerUnavailable, ServesNothing, UnknownRun
from services.rpc import codec, squall_pb2_grpc
from services.rpc import squall_pb2 as pb
from services.rpc.auth import ServerConfig
from services.rpc.codec import encode_array, spaces_of
from services.rpc.endpoint import Endpoint, EndpointReport
from services.rpc.errors import from_status
from services.rpc.experience import ExperienceService, NoExperience
from services.rpc.gateway import gateway_services
from services.rpc.policy import ServedPolicy
from services.rpc.server import ServerThread
from services.runs import check
from services.store.records import this_process
from services.store.sqlite import SQLiteRunStore
from services.supervision.topology import FIRST_SESSION_WORKER, plan
from tests.actors.test_rollout import Direct, Given, make_server, make_spec, make_worker, weights_for
from tests.actors.toys import TEST_POLICIES, RandomPolicy
from tests.replay.naive import assert_same_bits, read_everything
from tests.services.serving import PENDULUM, register, serving

ROOT = Path(__file__).parents[3]
SHORT = specify("SquallShort-v0")
STACKS = replace(specify("SquallStacks-v0"), frame_stack=4)
CARTPOLE = EnvironmentSpec("CartPole-v1", (4,), "float32", 1, DiscreteActions(2))
CORRIDOR = EnvironmentSpec("Corridor-v0", (), "int64", 1, DiscreteActions(3), observation_count=5)
VECTOR = spaces.Box(-np.inf, np.inf, (4,), np.float32)
TWO = spaces.Discrete(2)


class Recorded(RandomPolicy):
    """Takes the actions of a script, then calls `at_end`."""

    script: ClassVar[list[Array]] = []
    at_end: ClassVar[Callable[[], None]]

    def act(self, observation: Array, *, step: int, greedy: bool = False) -> Action:
        action = Recorded.script.pop(0)[None]
        if not Recorded.script:
            Recorded.at_end()
        return Action(action, np.zeros(1, np.float32))


@pytest.fixture(autouse=True)
def test_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: dict[str, type[Policy]] = {**TEST_POLICIES, "recorded": Recorded}
    for kind, policy in kinds.items():
        monkeypatch.setitem(policies.POLICIES, kind, policy)


class Shared(Direct):
    """A replay client of several threads, with a deadline."""

    def __init__(self, server: ReplayServer, seconds: float = 30.0) -> None:
        super().__init__(server)
        self._lock, self._seconds = threading.Lock(), seconds

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply | None:
        end = time.monotonic() + self._seconds
        while True:
            with self._lock:
                reply = self.server.insert(push)
                if reply.wait is None:
                    self.waiting_for = None
                    self.pushes.append(push)
                    return reply
                self.waiting_for = reply.wait
            if stop is not None and stop.wait(0.002):
                return None
            if time.monotonic() > end:
                raise DeadlineExceeded(f"insert waited {self._seconds:g} s for {reply.wait}")


class Station:
    """A run that takes experience, and where."""

    def __init__(self, spec: RolloutSpec, replay: Shared, service: ExperienceService, address: str) -> None:
        self.spec, self.replay, self.service, self.address = spec, replay, service, address

    def client(self, **options: Any) -> ExperienceClient:
        return ExperienceClient(self.address, run="mine", answer_seconds=30.0, **options)

    def opening(self) -> pb.Open:
        environment = self.spec.policy.environment
        observations, actions = spaces_of(environment)
        if environment.frame_stack > 1:
            observations.box.shape[:] = environment.observation_shape[1:]
        return pb.Open(run="mine", observation_space=observations, action_space=actions)

    def open(self) -> ExperienceSession:
        return ExperienceSession(self.client()._client, self.opening(), seconds=30.0)

    def settle(self) -> None:
        """Wait until every session that ended has sent what it had."""
        wait_for(lambda: not self.service._callers)

    @property
    def env_steps(self) -> int:
        return self.replay.server.stats().counters.env_steps


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s"
        time.sleep(0.01)


def make_service(spec: RolloutSpec, replay: Shared, weights: Any = None, **options: Any) -> ExperienceService:
    policy = spec.policy.build()
    policy.begin(np.random.SeedSequence(5))
    served = ServedPolicy(policy, "dqn", weights=weights or Given(weights_for(spec)))
    options.setdefault("first_worker", FIRST_SESSION_WORKER)
    return ExperienceService("mine", spec, served, lambda: replay, **options)


@contextmanager
def station(
    spec: RolloutSpec | None = None,
    *,
    weights: Any = None,
    seconds: float = 30.0,
    most_steps: int | None = None,
    rate: dict[str, float] | None = None,
    **options: Any,
) -> Iterator[Station]:
    spec = spec or make_spec(CARTPOLE, "random", lanes=1, n_steps=2)
    replay = Shared(make_server(spec, max_env_steps=most_steps, **(rate or {})), seconds)
    service = make_service(spec, replay, weights, **options)
    server = ServerThread([service], ServerConfig())
    try:
        yield Station(spec, replay, service, server.address)
    finally:
        server.close()


def exchange(address: str, *messages: pb.PlayRequest) -> list[pb.PlayResponse]:
    """Send messages as they are, and return the answers."""
    with grpc.insecure_channel(address) as channel:
        call: Any = squall_pb2_grpc.ExperienceStub(channel).Play(iter(messages), timeout=30.0)
        try:
            return list(call)
        except grpc.RpcError:
            raise from_status(call.code(), call.details(), call.trailing_metadata(), address) from None


def reset(observation: Any) -> pb.PlayRequest:
    return pb.PlayRequest(reset=pb.Reset(observation=encode_array(np.asarray(observation, np.float32))))


def step(number: int, observation: Any = (0, 0, 0, 0), reward: float = 1.0, **ends: bool) -> pb.PlayRequest:
    array = encode_array(np.asarray(observation, np.float32))
    return pb.PlayRequest(step=pb.Step(number=number, reward=reward, observation=array, **ends))


CLOSE = pb.PlayRequest(close=pb.Close())
ZEROS = (0.0, 0.0, 0.0, 0.0)


# What a session sends is what a worker would have sent.


@pytest.mark.parametrize(
    ("environment", "n_steps", "clip"), [(SHORT, 1, False), (SHORT, 3, True), (STACKS, 2, False)], ids=str
)
def test_pushes_are_those_of_a_rollout_worker_bit_for_bit(
    environment: EnvironmentSpec, n_steps: int, clip: bool
) -> None:
    spec = make_spec(environment, "random", lanes=1, n_steps=n_steps, clip=clip)
    vector = environment.make(1)
    env = gym.make(environment.id or "")
    # As `VectorRunner` seeds its first reset.
    seed = seeds_for(vector, spawn_seed(spec.run_seed, "worker").spawn(2)[0].spawn(1)[0])[0]
    vector.close()
    newest = (lambda o: o[-1]) if environment.frame_stack > 1 else (lambda o: o)
    first = int(getattr(env.action_space, "start", 0))
    with station(spec) as here:
        taken: list[Array] = []
        with here.open() as session:
            action = session.reset(newest(env.reset(seed=seed)[0]))
            for _ in range(61):
                if action is None:
                    taken.append(np.zeros_like(taken[-1]))  # the row after an end
                    action = session.reset(newest(env.reset()[0]))
                assert action is not None
                taken.append(action)
                observation, reward, terminated, truncated, _ = env.step(action + first if first else action)
                action = session.step(float(reward), terminated, truncated, newest(observation))
            assert session.close() == 61
        pushes = here.replay.pushes
    direct = Direct(make_server(spec))
    worker = make_worker(replace(spec, policy=replace(spec.policy, kind="recorded")), direct)
    Recorded.script, Recorded.at_end = taken, worker.stop
    worker.run()
    assert len(direct.pushes) == len(pushes) > 10
    for sent, expected in zip(pushes, direct.pushes, strict=True):
        assert (sent.sequence, sent.episodes, sent.returns) == (expected.sequence, expected.episodes, expected.returns)
        assert len(sent.segments) == len(expected.segments)
        for mine, theirs in zip(sent.segments, expected.segments, strict=True):
            for one, other in zip(astuple(mine), astuple(theirs), strict=True):
                assert_same_bits(one, other)


def test_a_reset_inside_an_episode_cuts_it_as_if_truncated() -> None:
    with station() as here:
        messages = [reset(ZEROS), step(1, (1, 0, 0, 0)), step(2, (2, 0, 0, 0)), reset((9, 0, 0, 0)),
                    step(3, (10, 0, 0, 0), terminated=True)]  # fmt: skip
        *_, ended, closed = exchange(here.address, pb.PlayRequest(open=here.opening()), *messages, CLOSE)
        assert (ended.episode_ended.episode_return, ended.episode_ended.length) == (1.0, 1)
        assert closed.closed == pb.Closed(steps=3)
        items = read_everything(here.replay.server._table)
        order = np.argsort(items.observation[0, :, 0])
        gamma = here.spec.gamma
        assert items.observation[0, order, 0].tolist() == [0.0, 1.0, 9.0]
        assert items.next_observation[0, order, 0].tolist() == [2.0, 2.0, 10.0]
        np.testing.assert_allclose(items.reward[0, order], [1 + gamma, 1.0, 1.0], rtol=1e-6)
        np.testing.assert_allclose(items.discount[0, order], [gamma**2, gamma, 0.0], rtol=1e-6)
        assert [episode.length for episode in here.replay.server.drain_episodes()] == [1]


# Many at once.


async def _play_toy(stub: Any, opening: pb.Open, index: int, steps: int) -> int:
    """Play episodes of 7 steps whose observations say who and when; return what the server said it took."""
    call = stub.Play(timeout=120.0)
    number = 0

    async def ask(message: pb.PlayRequest) -> pb.PlayResponse:
        await call.write(message)
        answer: pb.PlayResponse = await call.read()
        return answer

    assert (await ask(pb.PlayRequest(open=opening))).opened.session
    while number < steps:
        answer = await ask(reset((index, number, 0, -1)))
        while answer.HasField("action") and number < steps:
            number += 1
            assert answer.action.number == number
            answer = await ask(step(number, (index, number, 0, 0), terminated=number % 7 == 0))
    closed = (await ask(CLOSE)).closed
    assert not closed.finished
    return closed.steps


def test_hundreds_of_sessions_beside_a_worker_count_every_step_once() -> None:
    sessions, steps = 150, 23
    spec = make_spec(CARTPOLE, "random", lanes=2, n_steps=2)

    async def play_all(address: str, opening: pb.Open) -> list[int]:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = squall_pb2_grpc.ExperienceStub(channel)
            return await asyncio.gather(*(_play_toy(stub, opening, index, steps) for index in range(sessions)))

    with station(spec) as here:
        worker = make_worker(spec, here.replay)
        thread = threading.Thread(target=worker.run)
        thread.start()
        told = asyncio.run(play_all(here.address, here.opening()))
        worker.stop()
        thread.join(30.0)
        here.settle()
        assert told == [steps] * sessions
        stats = here.replay.server.stats()
        assert stats.counters.env_steps == sum(told) + worker.report().env_steps
        assert stats.repeated_pushes == 0
        batcher = here.service._batcher
        assert batcher.passes < batcher.requests / 2, "concurrent sessions share forward passes"
        items = [
            segment for push in here.replay.pushes if push.worker >= FIRST_SESSION_WORKER for segment in push.segments
        ]
        starts = [tuple(frame[:2]) for segment in items for frame in segment.frames[segment.row]]
        assert sorted(starts) == [(index, number) for index in range(sessions) for number in range(steps)]


def test_a_full_server_turns_sessions_away_and_takes_them_when_others_have_left() -> None:
    with station(most_sessions=2) as here, here.client() as client:
        with client.open(VECTOR, TWO) as first, client.open(VECTOR, TWO):
            with pytest.raises(Overloaded, match="2 sessions are open"):
                client.open(VECTOR, TWO)
            first.reset(np.zeros(4, np.float32))
        here.settle()
        with client.open(VECTOR, TWO) as again:
            assert again.reset(np.zeros(4, np.float32)) is not None
            assert again.id != first.id


# What breaks.


def test_a_killed_client_leaves_its_whole_steps_and_another_one_goes_on() -> None:
    topology = (
        "import sys, gymnasium, services.experience_client as e\n"
        "e.ExperienceClient(sys.argv[1]).play(gymnasium.make('CartPole-v1'))"
    )
    with station() as here:
        process = subprocess.Popen([sys.executable, "-c", topology, here.address], cwd=ROOT)
        try:
            wait_for(lambda: here.service.steps > 50, 60.0)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(10)
        here.settle()
        left = here.env_steps
        assert left == here.service.steps > 50
        with here.client() as client:
            played = client.play(gym.make("CartPole-v1"), steps=40, seed=3)
        assert (played.steps, played.taken, played.sessions, played.finished) == (40, 40, 1, False)
        assert here.env_steps == left + 40


def test_play_opens_a_new_session_when_the_connection_breaks() -> None:
    spec = make_spec(CARTPOLE, "random", lanes=1)
    replay = Shared(make_server(spec, max_env_steps=600))
    first = make_service(spec, replay)
    server = ServerThread([first], ServerConfig())
    outcome: list[Any] = []
    with ExperienceClient(server.address, run="mine", answer_seconds=30.0) as client:
        thread = threading.Thread(target=lambda: outcome.append(client.play(gym.make("CartPole-v1"), seed=0)))
        thread.start()
        wait_for(lambda: first.steps > 50)
        server.close()
        second = make_service(spec, replay, first_incarnation=10**12)
        server = ServerThread([second], ServerConfig(server.address))
        try:
            thread.join(60.0)
        finally:
            server.close()
    assert outcome[0].finished
    assert outcome[0].sessions == 2
    assert replay.server.stats().counters.env_steps == first.steps + second.steps
    assert second.steps == outcome[0].steps, "what the broken session sent was never confirmed to its client"
    assert outcome[0].taken >= 600


def test_sessions_go_on_through_a_gateway_when_the_endpoint_behind_it_is_another_one(tmp_path: Path) -> None:
    spec = make_spec(CARTPOLE, "random", lanes=1)
    replay = Shared(make_server(spec, max_env_steps=600))
    services = [make_service(spec, replay, first_incarnation=incarnation * 10**12) for incarnation in range(2)]
    outcome: list[Any] = []

    def listed(server: ServerThread) -> dict[str, Any]:
        report = EndpointReport(1, this_process().host, server.address, (ExperienceService.name,), "")
        return {"endpoints": [report.plain()]}

    with SQLiteRunStore(tmp_path / "squall.db") as store, serving(*gateway_services(store, None)) as gateway:
        server = ServerThread([services[0]], ServerConfig())
        register(store, "mine", snapshot=listed(server))
        with ExperienceClient(gateway, run="mine", answer_seconds=30.0) as client:
            thread = threading.Thread(target=lambda: outcome.append(client.play(gym.make("CartPole-v1"), seed=0)))
            thread.start()
            wait_for(lambda: services[0].steps > 50)
            server.close()
            server = ServerThread([services[1]], ServerConfig())
            try:
                store.write_snapshot("mine", listed(server), time.time())
                thread.join(60.0)
            finally:
                server.close()
    assert (outcome[0].finished, outcome[0].sessions) == (True, 2)
    assert replay.server.stats().counters.env_steps == services[0].steps + services[1].steps
    assert services[1].steps == outcome[0].steps


def test_a_call_that_breaks_off_counts_the_steps_that_arrived() -> None:
    with station() as here:
        session = here.open()
        session.reset(np.zeros(4, np.float32))
        for _ in range(6):
            session.step(1.0, False, False, np.zeros(4, np.float32))
        session._call.cancel()
        here.settle()
        assert here.env_steps == here.service.steps == 6
        with pytest.raises((CallFailed, ServerUnavailable)):
            session.step(1.0, False, False, np.zeros(4, np.float32))
        with pytest.raises(ServerUnavailable, match="open another"):
            session.step(1.0, False, False, np.zeros(4, np.float32))


def test_a_call_that_breaks_off_while_it_waits_for_the_learner_loses_no_step() -> None:
    spec = make_spec(CARTPOLE, "random", lanes=1, n_steps=3)
    rate = {"samples_per_insert": 1.0, "minimum_size": 1}
    with station(spec, rate=rate) as here, grpc.insecure_channel(here.address) as channel:
        opening = pb.PlayRequest(open=here.opening())
        messages = [opening, reset(ZEROS), *(step(number) for number in range(1, 100))]
        call = squall_pb2_grpc.ExperienceStub(channel).Play(iter(messages), timeout=60.0)
        next(call)
        (caller,) = here.service._callers.values()
        # One push waits, and one segment waits for that.
        wait_for(lambda: "the learner" in str(here.service.waiting_for) and caller.session.is_ready())
        arrived = caller.session.steps
        call.cancel()
        wait_for(lambda: caller.left)
        while here.service._callers:
            with here.replay._lock:
                here.replay.server.sample(1, 1)
            time.sleep(0.001)
        assert here.env_steps == here.service.steps == arrived


def test_random_and_truncated_bytes_are_an_error_and_change_nothing() -> None:
    rng = np.random.default_rng(0)
    with station() as here, grpc.insecure_channel(here.address) as channel:
        whole = [
            message.SerializeToString()
            for message in (pb.PlayRequest(open=here.opening()), reset(ZEROS), step(1), step(2))
        ]
        play = channel.stream_stream("/squall.v1.Experience/Play")
        for attempt in range(60):
            last = whole[attempt % 4]
            bad = last[: rng.integers(len(last))] if attempt < 20 else rng.bytes(int(rng.integers(1, 200)))
            call: Any = play(iter([*whole[: attempt % 4], bad]), timeout=30.0)
            try:
                list(call)
            except grpc.RpcError:
                assert call.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
            else:
                assert attempt % 4, "no session was opened"
        here.settle()
        before = here.env_steps
        assert before == here.service.steps <= 60
        assert exchange(here.address, *map(pb.PlayRequest.FromString, whole), CLOSE)[-1].closed.steps == 2
        assert here.env_steps == before + 2


# What is refused, each with words.

FLOATS = encode_array(np.zeros(4, np.float32))


def _bad_step(**fields: Any) -> pb.PlayRequest:
    return pb.PlayRequest(step=pb.Step(**{"number": 1, "reward": 1.0, "observation": FLOATS, **fields}))


@pytest.mark.parametrize(
    ("messages", "kind", "words"),
    [
        ([step(1)], OutOfOrder, "step 1 came outside an episode; a Reset begins one"),
        ([reset(ZEROS), step(2)], OutOfOrder, "step 2 came where step 1 comes next"),
        ([reset(ZEROS), step(1, terminated=True), step(2)], OutOfOrder, "outside an episode"),
        ([reset(ZEROS), step(1), reset(ZEROS), step(1)], OutOfOrder, "step 1 came where step 2 comes next"),
        ([pb.PlayRequest()], ConfigurationError, "none of them"),
        ([reset((0, 0, 0))], ConfigurationError, r"float32 of shape \[4\], got float32 of shape \[3\]"),
        ([reset((0, 0, 0, np.nan))], ConfigurationError, "finite"),
        ([reset(ZEROS), step(1, (0, 0))], ConfigurationError, r"shape \[4\], got float32 of shape \[2\]"),
        ([reset(ZEROS), step(1, reward=np.nan)], ConfigurationError, "a reward must be a number .* got nan"),
        ([reset(ZEROS), step(1, reward=np.inf)], ConfigurationError, "got inf"),
        ([reset(ZEROS), step(1, reward=1e31)], ConfigurationError, r"got 1e\+31"),
        ([reset(ZEROS), _bad_step(observation=encode_array(np.zeros(4)))], ConfigurationError, "got float64"),
        ([reset(ZEROS), _bad_step(observation=pb.Array())], ConfigurationError, "got dtype number 0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(messages: Sequence[pb.PlayRequest], kind: type[Exception], words: str) -> None:
    with station() as here:
        opening = pb.PlayRequest(open=here.opening())
        good = [reset(ZEROS), step(1), step(2), step(3, truncated=True)]
        with pytest.raises(kind, match=words):
            exchange(here.address, opening, *messages)
        here.settle()
        counted = here.env_steps
        assert counted == sum(message.HasField("step") for message in messages[:-1]), "whole steps before it count"
        assert exchange(here.address, opening, *good, CLOSE)[-1].closed.steps == 3
        assert here.env_steps == counted + 3


@pytest.mark.parametrize(
    ("environment", "observations", "actions", "words"),
    [
        (CARTPOLE, spaces.Box(-1, 1, (3,), np.float32), TWO, r"of shape \[4\], got a Box of float32 of shape \[3\]"),
        (CARTPOLE, spaces.Box(-1, 1, (4,), np.int32), TWO, r"a Box of float32 .*, got a Box of int32"),
        (CARTPOLE, spaces.Discrete(4), TWO, r"a Box of float32 of shape \[4\], got Discrete\(4\)"),
        (CARTPOLE, VECTOR, spaces.Discrete(3), r"must be Discrete\(2\), got Discrete\(3\)"),
        (CARTPOLE, VECTOR, spaces.Box(-1, 1, (1,), np.float32), r"must be Discrete\(2\), got a Box of float32"),
        (CORRIDOR, spaces.Discrete(6), spaces.Discrete(3), r"must be Discrete\(5\), got Discrete\(6\)"),
        (STACKS, spaces.Box(0, 255, (4, 2, 3), np.uint8), spaces.Box(-2, 2, (2,), np.float32), "stacks 4 of them"),
        (STACKS, spaces.Box(0, 255, (2, 3), np.uint8), spaces.Box(-1, 1, (2,), np.float32), "-2.0, 2.0.*got.*-1.0"),
    ],
)
def test_other_spaces_are_refused_with_both(
    environment: EnvironmentSpec, observations: spaces.Space[Any], actions: spaces.Space[Any], words: str
) -> None:
    with (
        station(make_spec(environment, "random", lanes=1)) as here,
        here.client() as client,
        pytest.raises(ConfigurationError, match=words),
    ):
        client.open(observations, actions)


@pytest.mark.parametrize("which", ["observation_space", "action_space"])
def test_spaces_of_another_size_are_refused_before_their_bounds_are_made(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*_: Any) -> None:
        raise AssertionError("bounds were made")

    with station(make_spec(PENDULUM, "random", lanes=1)) as here:
        opening = here.opening()
        getattr(opening, which).box.shape[:] = [2**22]
        monkeypatch.setattr(codec, "_decode_bounds", made)
        with pytest.raises(ConfigurationError, match=r"got a Box of float32 of shape \[4194304\]"):
            exchange(here.address, pb.PlayRequest(open=opening))


def test_float64_is_taken_for_float32_and_a_discrete_observation_must_be_one() -> None:
    box = spaces.Box(-1, 1, (4,), np.float64)
    with station() as here, here.client() as client, client.open(box, TWO) as session:
        assert session.reset(np.zeros(4)) is not None
    with station(make_spec(CORRIDOR, "random", lanes=1)) as here, here.client() as client:
        with client.open(spaces.Discrete(5), spaces.Discrete(3)) as session:
            assert session.reset(4) is not None
            assert session.step(0.0, True, False, 0) is None
        with (
            pytest.raises(ConfigurationError, match=r"must lie in 0 \.\. 4, got 5"),
            client.open(spaces.Discrete(5), spaces.Discrete(3)) as session,
        ):
            session.reset(5)
        here.settle()
        assert here.env_steps == 1


def test_a_step_sent_twice_is_answered_again_and_counted_once() -> None:
    with station() as here:
        opening = pb.PlayRequest(open=here.opening())
        messages = [reset(ZEROS), step(1), step(1), step(2, terminated=True), step(2, terminated=True), CLOSE]
        answers = exchange(here.address, opening, *messages)
        assert answers[2] == answers[3]
        assert answers[4] == answers[5] != answers[3]
        assert answers[6].closed.steps == here.env_steps == 2


def test_openings_that_cannot_be() -> None:
    with station() as here:
        other = here.opening()
        other.run = "yours"
        with pytest.raises(UnknownRun, match="'mine' alone, not for 'yours'"):
            exchange(here.address, pb.PlayRequest(open=other))
        with pytest.raises(OutOfOrder, match="begins with Open"):
            exchange(here.address, reset(ZEROS))
        with pytest.raises(OutOfOrder, match="opened once"):
            exchange(here.address, *[pb.PlayRequest(open=here.opening())] * 2)
        here.settle()
        assert here.env_steps == 0


def test_play_says_once_that_nobody_answers(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as once:
        address = f"127.0.0.1:{once.getsockname()[1]}"
    with (
        ExperienceClient(address, patience_seconds=1.0) as client,
        pytest.raises(ServerUnavailable, match=address),
    ):
        client.play(gym.make("CartPole-v1"))
    (record,) = (r for r in caplog.records if r.name == "squall.experience")
    assert address in record.getMessage()
    assert record.getMessage().endswith("trying again for 1 s")


def test_an_on_policy_run_says_that_it_takes_none() -> None:
    server = ServerThread([NoExperience("a2c is on-policy: no experience from outside")], ServerConfig())
    try:
        with (
            ExperienceClient(server.address) as client,
            pytest.raises(ServesNothing, match="a2c is on-policy"),
        ):
            client.open(VECTOR, TWO)
    finally:
        server.close()


@pytest.mark.parametrize(
    ("algorithm", "overrides", "words"),
    [
        ("dqn", {"actors": 0}, r"got 0: .* add --serve \[HOST:PORT\]"),
        ("a2c", {"actors": 0, "serve": "auto"}, "a2c is on-policy and takes no experience from outside"),
    ],
)
def test_a_run_without_workers_must_be_served_and_off_policy(
    algorithm: str, overrides: dict[str, Any], words: str
) -> None:
    config, _ = resolve(algorithm, "CartPole-v1", overrides=overrides)
    with pytest.raises(ConfigurationError, match=words):
        check(config)


def test_a_served_run_offers_experience_if_it_is_off_policy() -> None:
    for algorithm, kind in (("dqn", ExperienceService), ("a2c", NoExperience)):
        overrides = {"serve": "auto", **({"actors": 0} if algorithm == "dqn" else {})}
        config, _ = resolve(algorithm, "CartPole-v1", overrides=overrides)
        topology = plan(config, "mine", ROOT)
        # As they arrive in the endpoint's process: each service has clients of its own.
        policy, experience = (offer.build(0) for offer in pickle.loads(pickle.dumps(topology._service_specs())))
        assert type(experience) is kind
        if isinstance(experience, ExperienceService):
            assert experience._served._weights is not policy.served._weights
        assert topology.actors == overrides.get("actors", 2)


# Waits.


def test_an_idle_session_ends_with_the_reason_and_its_steps_count() -> None:
    with station(idle_seconds=0.5) as here:
        session = here.open()
        session.reset(np.zeros(4, np.float32))
        session.step(1.0, False, False, np.zeros(4, np.float32))
        wait_for(lambda: here.env_steps == 1)
        with pytest.raises(DeadlineExceeded, match=r"nothing came for 0\.5 s"):
            session.step(1.0, False, False, np.zeros(4, np.float32))
        assert here.env_steps == 1


def test_a_session_waits_for_the_learner_and_says_so_while_others_open() -> None:
    rate = {"samples_per_insert": 1.0, "minimum_size": 1}
    with station(rate=rate) as here, here.client() as client:
        outcome: list[Any] = []
        thread = threading.Thread(target=lambda: outcome.append(client.play(gym.make("CartPole-v1"), steps=100)))
        thread.start()
        wait_for(lambda: here.service.waiting_for is not None)
        wait_for(lambda: "1 of 1 sessions: the learner: an insert" in str(here.service.waiting_for))
        waited_at = here.env_steps
        with client.open(VECTOR, TWO) as other:
            assert other.reset(np.zeros(4, np.float32)) is not None, "the wait is one session's alone"
        assert here.env_steps == waited_at < 100
        while thread.is_alive():
            with here.replay._lock:
                here.replay.server.sample(1, 1)
            time.sleep(0.001)
        assert (outcome[0].steps, here.env_steps) == (100, 100)


def test_a_wait_for_the_learner_ends_at_its_deadline() -> None:
    rate = {"samples_per_insert": 1.0, "minimum_size": 1}
    with (
        station(rate=rate, seconds=0.2) as here,
        here.client() as client,
        pytest.raises(DeadlineExceeded, match=r"waited 0\.2 s for the learner"),
    ):
        client.play(gym.make("CartPole-v1"), steps=100)


def test_a_session_waits_for_the_first_weights() -> None:
    with (
        station(weights=Given(), weights_seconds=0.3) as here,
        here.open() as session,
        pytest.raises(NotReady, match="first weights"),
    ):
        session.reset(np.zeros(4, np.float32))


def test_a_finished_run_closes_sessions_and_takes_no_more() -> None:
    with station(most_steps=100) as here, here.client() as client:
        played = client.play(gym.make("CartPole-v1"), seed=1)
        assert played.finished
        assert played.steps == here.env_steps >= 100
        again = client.play(gym.make("CartPole-v1"))
        assert (again.finished, again.steps) == (True, 0)


def test_a_run_that_takes_no_more_ends_sessions_with_the_word_and_their_steps() -> None:
    with station() as here, here.client() as client:
        with client.open(VECTOR, TWO) as session:
            session.reset(np.zeros(4, np.float32))
            session.step(1.0, False, False, np.zeros(4, np.float32))
            here.service.finish()
            assert session.step(1.0, False, False, np.zeros(4, np.float32)) is None
            assert session.finished
        assert session.steps == here.env_steps == 2
        late = client.play(gym.make("CartPole-v1"))
        assert (late.finished, late.steps) == (True, 0)


def test_an_endpoint_closes_once_sessions_have_sent_what_they_have() -> None:
    spec = make_spec(CARTPOLE, "random", lanes=1, n_steps=2)
    replay = Shared(make_server(spec))
    service = make_service(spec, replay)
    endpoint = Endpoint([SimpleNamespace(build=lambda incarnation: service)])
    endpoint.listen(ServerConfig())
    outcome: list[Any] = []
    with ExperienceClient(endpoint.report().address, answer_seconds=30.0) as client:
        thread = threading.Thread(target=lambda: outcome.append(client.play(gym.make("CartPole-v1"))))
        thread.start()
        wait_for(lambda: service.steps > 50)
        endpoint.close()
        thread.join(30.0)
    assert outcome[0].finished, "it is no error that the run ends"
    assert outcome[0].steps == outcome[0].taken == replay.server.stats().counters.env_steps


def test_exploration_follows_the_run_and_weights_are_the_newest() -> None:
    spec = make_spec(CARTPOLE, "lever", lanes=1)
    weights = Given(weights_for(spec, version=3, arm=1))
    with station(spec, weights=weights) as here, here.open() as session:
        here.service.note_progress(1234)
        assert session.reset(np.zeros(4, np.float32)) == 1
        weights.waiting.append(weights_for(spec, version=4, arm=0))
        policy: Any = here.service._served.policy

        def pull() -> bool:
            action = session.step(0.0, False, False, np.zeros(4, np.float32))
            return action == 0 and policy.steps[-1] == 1234

        wait_for(pull)
