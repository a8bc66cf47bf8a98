"""The endpoint of a live run, without Ray: its address, its report, and its token."""

from __future__ import annotations

import pickle
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from replay.errors import ConfigurationError
from services.client.run_client import SquallClient
from services.config import resolve
from services.rpc.auth import TOKEN_VARIABLE, ServerConfig, split_address
from services.rpc.endpoint import Endpoint, reachable
from services.rpc.policy import PolicyService
from services.supervision import topology
from tests.services.serving import policy_service


@dataclass(frozen=True)
class ReadyPolicySpec:
    """The description of a service whose policy already has its weights."""

    built: list[PolicyService]

    def build(self, incarnation: int) -> PolicyService:
        self.built.append(policy_service(f"run-{incarnation}"))
        return self.built[0]


def test_an_endpoint_serves_and_says_where() -> None:
    spec = ReadyPolicySpec([])
    with closing(Endpoint([spec], incarnation=3)) as endpoint:
        endpoint.listen(ServerConfig())
        report = endpoint.report()
        assert report.services == ("squall.v1.Policy",)
        assert report.status_message == f"serves Policy on {report.address}"
        assert report.plain() == {"node": report.node, "address": report.address, "services": ["squall.v1.Policy"]}
        with SquallClient(report.address) as client:
            assert client.act(np.zeros((1, 4), np.float32), "run-3").weights_version == 7
        endpoint.note_progress(1234)
        assert spec.built[0].served.step == 1234


def listening_endpoint(**options: Any) -> closing[Endpoint]:
    endpoint = Endpoint([ReadyPolicySpec([])])
    endpoint.listen(ServerConfig(), **options)
    return closing(endpoint)


def test_a_recreated_endpoint_listens_where_it_did_if_it_can() -> None:
    with listening_endpoint() as endpoint:
        before = endpoint.report().address
        port = split_address(before)[1]
        with listening_endpoint(previous_port=port) as other:
            assert other.report().address != before, "its port is taken"
    with listening_endpoint(previous_port=port) as again:
        assert again.report().address == before


def test_an_endpoint_that_cannot_listen_says_so_when_it_is_asked_how_it_goes() -> None:
    with listening_endpoint() as endpoint, closing(Endpoint([ReadyPolicySpec([])])) as other:
        for call in (lambda: other.listen(ServerConfig(endpoint.report().address)), other.report):
            with pytest.raises(ConfigurationError, match="cannot listen on"):
                call()


def test_a_token_is_not_among_what_the_cluster_keeps_of_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    token = "0123456789abcdef-secret-token"
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    stored: list[Any] = []
    configs: list[Any] = []
    actor = SimpleNamespace(listen=SimpleNamespace(remote=lambda *arguments, **options: configs.extend(arguments)))

    def create(*arguments: Any, **options: Any) -> Any:
        stored.append((arguments, options))
        return actor

    monkeypatch.setattr(topology, "EndpointActor", SimpleNamespace(options=lambda **_: SimpleNamespace(remote=create)))
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.1.2.3")
    context = SimpleNamespace(get_node_id=lambda: "ab" * 28)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    config, _ = resolve("dqn", "CartPole-v1", overrides={"serve": "auto"})
    topology.plan(config, "mine", Path("checkpoints")).start_endpoint(0)
    assert token.encode() not in pickle.dumps(stored)
    assert [config.token for config in configs] == [token]


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_who_listens_everywhere_is_known_by_one_address(host: str) -> None:
    assert reachable(f"{host}:5", "10.1.2.3") == "10.1.2.3:5"
    assert reachable("127.0.0.1:5", "10.1.2.3") == "127.0.0.1:5"
