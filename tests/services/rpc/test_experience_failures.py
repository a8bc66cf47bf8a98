"""Experience sessions whose client, connection, or endpoint fails."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import gymnasium as gym
import numpy as np
import pytest

from services.client.experience_client import ExperienceClient
from services.errors import CallFailed, ServerUnavailable
from services.rpc import squall_pb2 as pb
from services.rpc import squall_pb2_grpc
from services.rpc.auth import ServerConfig
from services.rpc.endpoint import EndpointReport
from services.rpc.experience import ExperienceService
from services.rpc.gateway import gateway_services
from services.rpc.server import ServerThread
from services.store.records import this_process
from services.store.sqlite import SQLiteRunStore
from tests.actors.workers import make_server, make_spec
from tests.services.rpc.experience_run import (
    CARTPOLE,
    CLOSE,
    ROOT,
    ZEROS,
    SharedReplayClient,
    exchange,
    make_service,
    reset,
    serve_run,
    step,
    wait_for,
)
from tests.services.serving import register, serving

pytestmark = pytest.mark.usefixtures("toy_policies")


def test_a_killed_client_leaves_its_whole_steps_and_another_one_goes_on() -> None:
    script = (
        "import sys, gymnasium, services.experience_client as e\n"
        "e.ExperienceClient(sys.argv[1]).play(gymnasium.make('CartPole-v1'))"
    )
    with serve_run() as run:
        process = subprocess.Popen([sys.executable, "-c", script, run.address], cwd=ROOT)
        try:
            wait_for(lambda: run.service.steps > 50, 60.0)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(10)
        run.wait_until_drained()
        left = run.env_steps
        assert left == run.service.steps > 50
        with run.client() as client:
            played = client.play(gym.make("CartPole-v1"), steps=40, seed=3)
        assert (played.steps, played.taken, played.sessions, played.finished) == (40, 40, 1, False)
        assert run.env_steps == left + 40


def test_play_opens_a_new_session_when_the_connection_breaks() -> None:
    spec = make_spec(CARTPOLE, "random", lanes=1)
    replay = SharedReplayClient(make_server(spec, max_env_steps=600))
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
    assert second.steps == outcome[0].steps, "the steps of the broken session are never confirmed to its client"
    assert outcome[0].taken >= 600


def test_sessions_go_on_through_a_gateway_when_the_endpoint_behind_it_is_another_one(tmp_path: Path) -> None:
    spec = make_spec(CARTPOLE, "random", lanes=1)
    replay = SharedReplayClient(make_server(spec, max_env_steps=600))
    services = [make_service(spec, replay, first_incarnation=incarnation * 10**12) for incarnation in range(2)]
    outcome: list[Any] = []

    def snapshot_of(server: ServerThread) -> dict[str, Any]:
        report = EndpointReport(1, this_process().host, server.address, (ExperienceService.name,), "")
        return {"endpoints": [report.plain()]}

    with SQLiteRunStore(tmp_path / "squall.db") as store, serving(*gateway_services(store, None)) as gateway:
        server = ServerThread([services[0]], ServerConfig())
        register(store, "mine", snapshot=snapshot_of(server))
        with ExperienceClient(gateway, run="mine", answer_seconds=30.0) as client:
            thread = threading.Thread(target=lambda: outcome.append(client.play(gym.make("CartPole-v1"), seed=0)))
            thread.start()
            wait_for(lambda: services[0].steps > 50)
            server.close()
            server = ServerThread([services[1]], ServerConfig())
            try:
                store.write_snapshot("mine", snapshot_of(server), time.time())
                thread.join(60.0)
            finally:
                server.close()
    assert (outcome[0].finished, outcome[0].sessions) == (True, 2)
    assert replay.server.stats().counters.env_steps == services[0].steps + services[1].steps
    assert services[1].steps == outcome[0].steps


def test_a_call_that_breaks_off_counts_the_steps_that_arrived() -> None:
    with serve_run() as run:
        session = run.open()
        session.reset(np.zeros(4, np.float32))
        for _ in range(6):
            session.step(1.0, False, False, np.zeros(4, np.float32))
        session._call.cancel()
        run.wait_until_drained()
        assert run.env_steps == run.service.steps == 6
        with pytest.raises((CallFailed, ServerUnavailable)):
            session.step(1.0, False, False, np.zeros(4, np.float32))
        with pytest.raises(ServerUnavailable, match="open another"):
            session.step(1.0, False, False, np.zeros(4, np.float32))


def test_a_call_that_breaks_off_while_it_waits_for_the_learner_loses_no_step() -> None:
    spec = make_spec(CARTPOLE, "random", lanes=1, n_steps=3)
    rate = {"samples_per_insert": 1.0, "minimum_size": 1}
    with serve_run(spec, rate=rate) as run, grpc.insecure_channel(run.address) as channel:
        opening = pb.PlayRequest(open=run.opening())
        messages = [opening, reset(ZEROS), *(step(number) for number in range(1, 100))]
        call = squall_pb2_grpc.ExperienceStub(channel).Play(iter(messages), timeout=60.0)
        next(call)
        (call_state,) = run.service._calls.values()
        # One push waits for the learner, and one segment waits for that push.
        wait_for(lambda: "the learner" in str(run.service.waiting_for) and call_state.session.is_ready())
        arrived = call_state.session.steps
        call.cancel()
        wait_for(lambda: call_state.closed)
        while run.service._calls:
            with run.replay._lock:
                run.replay.server.sample(1, 1)
            time.sleep(0.001)
        assert run.env_steps == run.service.steps == arrived


def test_random_and_truncated_bytes_are_an_error_and_change_nothing() -> None:
    rng = np.random.default_rng(0)
    with serve_run() as run, grpc.insecure_channel(run.address) as channel:
        valid = [
            message.SerializeToString()
            for message in (pb.PlayRequest(open=run.opening()), reset(ZEROS), step(1), step(2))
        ]
        play = channel.stream_stream("/squall.v1.Experience/Play")
        for attempt in range(60):
            last = valid[attempt % 4]
            bad = last[: rng.integers(len(last))] if attempt < 20 else rng.bytes(int(rng.integers(1, 200)))
            call: Any = play(iter([*valid[: attempt % 4], bad]), timeout=30.0)
            try:
                list(call)
            except grpc.RpcError:
                assert call.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
            else:
                assert attempt % 4, "no session was opened"
        run.wait_until_drained()
        before = run.env_steps
        assert before == run.service.steps <= 60
        assert exchange(run.address, *map(pb.PlayRequest.FromString, valid), CLOSE)[-1].closed.steps == 2
        assert run.env_steps == before + 2


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
