"""Experience sessions that wait, and the end of sessions and runs."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from replay.errors import DeadlineExceeded
from services.client.experience_client import ExperienceClient
from services.errors import NotReady
from services.rpc.auth import ServerConfig
from services.rpc.endpoint import Endpoint
from tests.actors.workers import Given, make_server, make_spec
from tests.services.rpc.experience_run import (
    CARTPOLE,
    TWO,
    VECTOR,
    SharedReplayClient,
    make_service,
    serve_run,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("toy_policies")


def test_an_idle_session_ends_with_the_reason_and_its_steps_count() -> None:
    with serve_run(idle_seconds=0.5) as run:
        session = run.open()
        session.reset(np.zeros(4, np.float32))
        session.step(1.0, False, False, np.zeros(4, np.float32))
        wait_for(lambda: run.env_steps == 1)
        with pytest.raises(DeadlineExceeded, match=r"no message for 0\.5 s"):
            session.step(1.0, False, False, np.zeros(4, np.float32))
        assert run.env_steps == 1


def test_a_session_waits_for_the_learner_and_says_so_while_others_open() -> None:
    rate = {"samples_per_insert": 1.0, "minimum_size": 1}
    with serve_run(rate=rate) as run, run.client() as client:
        outcome: list[Any] = []
        thread = threading.Thread(target=lambda: outcome.append(client.play(gym.make("CartPole-v1"), steps=100)))
        thread.start()
        wait_for(lambda: run.service.waiting_for is not None)
        wait_for(lambda: "1 of 1 sessions: the learner: an insert" in str(run.service.waiting_for))
        waited_at = run.env_steps
        with client.open(VECTOR, TWO) as other:
            assert other.reset(np.zeros(4, np.float32)) is not None, "only one session waits"
        assert run.env_steps == waited_at < 100
        while thread.is_alive():
            with run.replay._lock:
                run.replay.server.sample(1, 1)
            time.sleep(0.001)
        assert (outcome[0].steps, run.env_steps) == (100, 100)


def test_a_wait_for_the_learner_ends_at_its_deadline() -> None:
    rate = {"samples_per_insert": 1.0, "minimum_size": 1}
    with (
        serve_run(rate=rate, seconds=0.2) as run,
        run.client() as client,
        pytest.raises(DeadlineExceeded, match=r"waited 0\.2 s for the learner"),
    ):
        client.play(gym.make("CartPole-v1"), steps=100)


def test_a_session_waits_for_the_first_weights() -> None:
    with (
        serve_run(weights=Given(), weights_seconds=0.3) as run,
        run.open() as session,
        pytest.raises(NotReady, match="first weights"),
    ):
        session.reset(np.zeros(4, np.float32))


def test_a_finished_run_closes_sessions_and_takes_no_more() -> None:
    with serve_run(max_steps=100) as run, run.client() as client:
        played = client.play(gym.make("CartPole-v1"), seed=1)
        assert played.finished
        assert played.steps == run.env_steps >= 100
        again = client.play(gym.make("CartPole-v1"))
        assert (again.finished, again.steps) == (True, 0)


def test_a_run_that_takes_no_more_ends_sessions_with_the_word_and_their_steps() -> None:
    with serve_run() as run, run.client() as client:
        with client.open(VECTOR, TWO) as session:
            session.reset(np.zeros(4, np.float32))
            session.step(1.0, False, False, np.zeros(4, np.float32))
            run.service.finish()
            assert session.step(1.0, False, False, np.zeros(4, np.float32)) is None
            assert session.finished
        assert session.steps == run.env_steps == 2
        late = client.play(gym.make("CartPole-v1"))
        assert (late.finished, late.steps) == (True, 0)


def test_an_endpoint_closes_once_sessions_have_sent_what_they_have() -> None:
    spec = make_spec(CARTPOLE, "random", lanes=1, n_steps=2)
    replay = SharedReplayClient(make_server(spec))
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
    assert outcome[0].finished, "the end of the run is not an error"
    assert outcome[0].steps == outcome[0].taken == replay.server.stats().counters.env_steps
