"""The gateway: one port that looks up a run's endpoint in the store and forwards Policy and Experience calls."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from replay.errors import ConfigurationError, DeadlineExceeded
from services.client.run_client import SquallClient
from services.errors import NotReady, OutOfOrder, RunIsNotLive, ServesNothing, UnknownRun
from services.rpc import interceptors, squall_pb2_grpc
from services.rpc import squall_pb2 as pb
from services.rpc.endpoint import EndpointReport
from services.rpc.gateway import gateway_services
from services.rpc.server import Service
from services.store.base import RunStore
from services.store.records import this_process
from services.store.sqlite import SQLiteRunStore
from tests.services.serving import TOKEN_FOR_TESTS, open_backend, policy_service, register, serving

OBSERVATION = np.ones((3, 4), np.float32)
HERE = this_process().host


def snapshot_of(*services: str, address: str, node: str = HERE) -> dict[str, Any]:
    return {"endpoints": [EndpointReport(1, node, address, services, "").plain()]}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    with SQLiteRunStore(tmp_path / "squall.db") as store:
        yield store


@pytest.fixture
def client(store: RunStore) -> Iterator[SquallClient]:
    with serving(*gateway_services(store, TOKEN_FOR_TESTS)) as address, SquallClient(address) as client:
        yield client


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_a_policy_is_reached_by_its_runs_name(kind: str, tmp_path: Path) -> None:
    with (
        open_backend(kind, tmp_path) as store,
        serving(policy_service("one"), token=TOKEN_FOR_TESTS) as one,
        serving(policy_service("two"), token=TOKEN_FOR_TESTS) as two,
        serving(*gateway_services(store, TOKEN_FOR_TESTS)) as gateway,
        SquallClient(gateway) as client,
    ):
        for run, address in (("one", one), ("two", two)):
            register(store, run, snapshot=snapshot_of("squall.v1.Policy", address=address))
        assert {run.name for run in client.list_runs()} == {"one", "two"}
        for run, address in (("one", one), ("two", two)):
            with SquallClient(address, token=TOKEN_FOR_TESTS) as direct:
                assert client.describe(run) == direct.describe()
                expected = direct.act(OBSERVATION)
            np.testing.assert_array_equal(client.act(OBSERVATION, run).actions, expected.actions)
        with pytest.raises(ConfigurationError, match=re.escape("must be float32 of shape [B, 4], got float64")):
            client.act(OBSERVATION.astype(np.float64), "one")


def test_what_cannot_be_reached_is_said_with_its_reason(client: SquallClient, store: RunStore) -> None:
    policy = "squall.v1.Policy"
    for name, state, snapshot in (
        ("ended", "finished", snapshot_of(policy, address="127.0.0.1:1")),
        ("silent", "running", {"endpoints": None}),
        ("older", "running", {}),
        ("early", "starting", None),
        ("soon", "running", {"endpoints": []}),
        ("other", "running", snapshot_of("squall.v1.Experience", address="127.0.0.1:1")),
        ("far", "running", snapshot_of(policy, address="127.0.0.1:1", node="elsewhere")),
        ("dead", "running", snapshot_of(policy, address="127.0.0.1:1")),
    ):
        register(store, name, state, snapshot)
    for run, kind, words in (
        ("", ConfigurationError, "name a run"),
        ("soo", UnknownRun, "the nearest: soon"),
        ("ended", RunIsNotLive, "run 'ended' is finished; `squall serve ended`"),
        ("silent", ServesNothing, "started without --serve"),
        ("older", ServesNothing, "started without --serve"),
        ("early", NotReady, "run 'early' is starting, and its endpoint is not ready"),
        ("soon", NotReady, "not ready"),
        ("other", ServesNothing, "run 'other' does not serve Policy"),
        ("far", ServesNothing, "serves Policy to its own machine elsewhere only"),
        ("dead", NotReady, "the endpoint of run 'dead' at 127.0.0.1:1 does not answer"),
    ):
        with pytest.raises(kind, match=re.escape(words)):
            client.act(OBSERVATION, run)


def test_an_endpoint_that_came_back_elsewhere_is_found(client: SquallClient, store: RunStore) -> None:
    with serving(policy_service(), token=TOKEN_FOR_TESTS) as address:
        register(store, "mine", snapshot=snapshot_of("squall.v1.Policy", address=address))
        assert client.act(OBSERVATION, "mine").weights_version == 7
    with pytest.raises(NotReady):
        client.act(OBSERVATION, "mine")
    with serving(policy_service(), token=TOKEN_FOR_TESTS) as address:
        store.write_snapshot("mine", snapshot_of("squall.v1.Policy", address=address), time.time())
        assert client.act(OBSERVATION, "mine").weights_version == 7


def test_an_endpoint_that_wants_another_token_is_said_so(client: SquallClient, store: RunStore) -> None:
    with serving(policy_service(), token="another-token-than-that") as address:
        register(store, "mine", snapshot=snapshot_of("squall.v1.Policy", address=address))
        with pytest.raises(ServesNothing, match="has another token than this gateway"):
            client.act(OBSERVATION, "mine")


class Echo(squall_pb2_grpc.ExperienceServicer, Service):
    """A service that echoes the client's name and the step numbers; Step 3 raises an error, Step 4 aborts the call."""

    name = "squall.v1.Experience"

    def __init__(self) -> None:
        self.ended = 0

    def add_to(self, server: grpc.aio.Server) -> None:
        squall_pb2_grpc.add_ExperienceServicer_to_server(self, server)

    async def Play(self, requests: AsyncIterator[pb.PlayRequest], context: Any) -> AsyncIterator[pb.PlayResponse]:
        try:
            async for request in requests:
                if request.step.number == 3:
                    raise ConfigurationError("step 3 is refused")
                if request.step.number == 4:
                    await context.abort(grpc.StatusCode.INTERNAL, "Internal error from Core")
                if request.HasField("open"):
                    yield pb.PlayResponse(opened=pb.Opened(session=request.open.client))
                else:
                    yield pb.PlayResponse(action=pb.Action(number=request.step.number + 1))
        finally:
            self.ended += 1


def step(number: int) -> pb.PlayRequest:
    return pb.PlayRequest(step=pb.Step(number=number))


def test_a_session_is_passed_on_message_by_message(client: SquallClient, store: RunStore) -> None:
    stub = squall_pb2_grpc.ExperienceStub(client.channel)
    opening = pb.PlayRequest(open=pb.Open(run="mine", client="a simulator"))
    echo = Echo()
    with serving(echo, token=TOKEN_FOR_TESTS) as address:
        register(store, "mine", snapshot=snapshot_of("squall.v1.Experience", address=address))
        answers = list(stub.Play(iter([opening, step(1), step(2)]), timeout=30))
        assert answers[0].opened.session == "a simulator"
        assert [answer.action.number for answer in answers[1:]] == [2, 3]
        with pytest.raises(ConfigurationError, match="step 3 is refused"), client.errors():
            list(stub.Play(iter([opening, step(3)]), timeout=30))
        with pytest.raises(NotReady, match=r"the endpoint of run 'mine' at .* does not answer"), client.errors():
            list(stub.Play(iter([opening, step(4)]), timeout=30))
        with pytest.raises(OutOfOrder, match="a session begins with Open"), client.errors():
            list(stub.Play(iter([step(1)]), timeout=30))
        with pytest.raises(OutOfOrder, match="a session begins with Open"), client.errors():
            list(stub.Play(iter([]), timeout=30))
        with pytest.raises(UnknownRun), client.errors():
            list(stub.Play(iter([pb.PlayRequest(open=pb.Open(run="yours"))]), timeout=30))
        # A cancelled call ends the session at the endpoint too.
        call = stub.Play(_then_wait(opening), timeout=30)
        assert next(call).opened.session == "a simulator"
        assert echo.ended == 3
        call.cancel()
        deadline = time.monotonic() + 30
        while echo.ended < 4:
            assert time.monotonic() < deadline, "the session continues"
            time.sleep(0.01)


def test_a_session_that_is_never_opened_is_ended(client: SquallClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptors, "FIRST_MESSAGE_SECONDS", 0.2)
    stop = threading.Event()
    with pytest.raises(DeadlineExceeded, match=r"waited 0\.2 s for the call's first message"), client.errors():
        list(squall_pb2_grpc.ExperienceStub(client.channel).Play(iter(stop.wait, True), timeout=30))
    stop.set()


def _then_wait(first: pb.PlayRequest) -> Iterator[pb.PlayRequest]:
    yield first
    time.sleep(5)
