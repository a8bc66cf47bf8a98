"""Messages and sessions that the Experience service refuses, each with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from actors.environments import EnvironmentSpec
from replay.errors import ConfigurationError
from services.client.experience_client import ExperienceClient
from services.config import resolve
from services.errors import OutOfOrder, ServesNothing, UnknownRun
from services.rpc import codec
from services.rpc import squall_pb2 as pb
from services.rpc.auth import ServerConfig
from services.rpc.codec import encode_array
from services.rpc.experience import NoExperience
from services.rpc.server import ServerThread
from services.runs import check
from tests.actors.workers import make_spec
from tests.services.rpc.experience_run import (
    CARTPOLE,
    CLOSE,
    CORRIDOR,
    STACKS,
    TWO,
    VECTOR,
    ZEROS,
    exchange,
    reset,
    serve_run,
    step,
)
from tests.services.serving import PENDULUM

pytestmark = pytest.mark.usefixtures("toy_policies")

FLOATS = encode_array(np.zeros(4, np.float32))


def _bad_step(**fields: Any) -> pb.PlayRequest:
    return pb.PlayRequest(step=pb.Step(**{"number": 1, "reward": 1.0, "observation": FLOATS, **fields}))


@pytest.mark.parametrize(
    ("messages", "kind", "words"),
    [
        ([step(1)], OutOfOrder, "step 1 came outside an episode; send a Reset first"),
        ([reset(ZEROS), step(2)], OutOfOrder, "expected step 1, got step 2"),
        ([reset(ZEROS), step(1, terminated=True), step(2)], OutOfOrder, "outside an episode"),
        ([reset(ZEROS), step(1), reset(ZEROS), step(1)], OutOfOrder, "expected step 2, got step 1"),
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
    with serve_run() as run:
        opening = pb.PlayRequest(open=run.opening())
        good = [reset(ZEROS), step(1), step(2), step(3, truncated=True)]
        with pytest.raises(kind, match=words):
            exchange(run.address, opening, *messages)
        run.wait_until_drained()
        counted = run.env_steps
        assert counted == sum(message.HasField("step") for message in messages[:-1]), "complete steps before it count"
        assert exchange(run.address, opening, *good, CLOSE)[-1].closed.steps == 3
        assert run.env_steps == counted + 3


@pytest.mark.parametrize(
    ("environment", "observations", "actions", "words"),
    [
        (CARTPOLE, spaces.Box(-1, 1, (3,), np.float32), TWO, r"of shape \[4\], got a Box of float32 of shape \[3\]"),
        (CARTPOLE, spaces.Box(-1, 1, (4,), np.int32), TWO, r"a Box of float32 .*, got a Box of int32"),
        (CARTPOLE, spaces.Discrete(4), TWO, r"a Box of float32 of shape \[4\], got Discrete\(4\)"),
        (CARTPOLE, VECTOR, spaces.Discrete(3), r"must be Discrete\(2\), got Discrete\(3\)"),
        (CARTPOLE, VECTOR, spaces.Box(-1, 1, (1,), np.float32), r"must be Discrete\(2\), got a Box of float32"),
        (CORRIDOR, spaces.Discrete(6), spaces.Discrete(3), r"must be Discrete\(5\), got Discrete\(6\)"),
        (STACKS, spaces.Box(0, 255, (4, 2, 3), np.uint8), spaces.Box(-2, 2, (2,), np.float32), "the run stacks 4"),
        (STACKS, spaces.Box(0, 255, (2, 3), np.uint8), spaces.Box(-1, 1, (2,), np.float32), "-2.0, 2.0.*got.*-1.0"),
    ],
)
def test_other_spaces_are_refused_with_both(
    environment: EnvironmentSpec, observations: spaces.Space[Any], actions: spaces.Space[Any], words: str
) -> None:
    with (
        serve_run(make_spec(environment, "random", lanes=1)) as run,
        run.client() as client,
        pytest.raises(ConfigurationError, match=words),
    ):
        client.open(observations, actions)


@pytest.mark.parametrize("which", ["observation_space", "action_space"])
def test_spaces_of_another_size_are_refused_before_their_bounds_are_made(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode_bounds(*_: Any) -> None:
        raise AssertionError("bounds were decoded")

    with serve_run(make_spec(PENDULUM, "random", lanes=1)) as run:
        opening = run.opening()
        getattr(opening, which).box.shape[:] = [2**22]
        monkeypatch.setattr(codec, "_decode_bounds", decode_bounds)
        with pytest.raises(ConfigurationError, match=r"got a Box of float32 of shape \[4194304\]"):
            exchange(run.address, pb.PlayRequest(open=opening))


def test_float64_is_taken_for_float32_and_a_discrete_observation_must_be_one() -> None:
    box = spaces.Box(-1, 1, (4,), np.float64)
    with serve_run() as run, run.client() as client, client.open(box, TWO) as session:
        assert session.reset(np.zeros(4)) is not None
    with serve_run(make_spec(CORRIDOR, "random", lanes=1)) as run, run.client() as client:
        with client.open(spaces.Discrete(5), spaces.Discrete(3)) as session:
            assert session.reset(4) is not None
            assert session.step(0.0, True, False, 0) is None
        with (
            pytest.raises(ConfigurationError, match=r"must lie in 0 \.\. 4, got 5"),
            client.open(spaces.Discrete(5), spaces.Discrete(3)) as session,
        ):
            session.reset(5)
        run.wait_until_drained()
        assert run.env_steps == 1


def test_a_step_sent_twice_is_answered_again_and_counted_once() -> None:
    with serve_run() as run:
        opening = pb.PlayRequest(open=run.opening())
        messages = [reset(ZEROS), step(1), step(1), step(2, terminated=True), step(2, terminated=True), CLOSE]
        answers = exchange(run.address, opening, *messages)
        assert answers[2] == answers[3]
        assert answers[4] == answers[5] != answers[3]
        assert answers[6].closed.steps == run.env_steps == 2


def test_openings_that_cannot_be() -> None:
    with serve_run() as run:
        other = run.opening()
        other.run = "yours"
        with pytest.raises(UnknownRun, match="'mine' only, not for 'yours'"):
            exchange(run.address, pb.PlayRequest(open=other))
        with pytest.raises(OutOfOrder, match="begins with Open"):
            exchange(run.address, reset(ZEROS))
        with pytest.raises(OutOfOrder, match="opened only once"):
            exchange(run.address, *[pb.PlayRequest(open=run.opening())] * 2)
        run.wait_until_drained()
        assert run.env_steps == 0


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
        ("a2c", {"actors": 0, "serve": "auto"}, "a2c is on-policy and accepts no external experience"),
    ],
)
def test_a_run_without_workers_must_be_served_and_off_policy(
    algorithm: str, overrides: dict[str, Any], words: str
) -> None:
    config, _ = resolve(algorithm, "CartPole-v1", overrides=overrides)
    with pytest.raises(ConfigurationError, match=words):
        check(config)
