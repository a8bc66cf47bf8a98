"""The endpoint of a live run, without Ray: it says where it is to be found, and explores as far as the run is."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pytest

from services.client import SquallClient
from services.endpoint import Endpoint, reachable
from services.grpc_policy import PolicyService
from services.grpc_server import Listening, split_address
from tests.services.serving import policy_service


@dataclass(frozen=True)
class Ready:
    """Offers a policy that has its weights already."""

    made: list[PolicyService]

    def build(self, incarnation: int) -> PolicyService:
        self.made.append(policy_service(f"run-{incarnation}"))
        return self.made[0]


def test_an_endpoint_serves_and_says_where() -> None:
    offer = Ready([])
    with closing(Endpoint([offer], Listening(), incarnation=3)) as endpoint:
        report = endpoint.report()
        assert report.services == ("squall.v1.Policy",)
        assert report.last_word == f"serves Policy on {report.address}"
        assert report.plain() == {"node": report.node, "address": report.address, "services": ["squall.v1.Policy"]}
        with SquallClient(report.address) as client:
            assert client.act(np.zeros((1, 4), np.float32), "run-3").weights_version == 7
        endpoint.note_progress(1234)
        assert offer.made[0].served.step == 1234


def test_a_recreated_endpoint_listens_where_it_did_if_it_can() -> None:
    with closing(Endpoint([Ready([])], Listening())) as endpoint:
        before = endpoint.report().address
        with closing(Endpoint([Ready([])], Listening(), port_before=split_address(before)[1])) as other:
            assert other.report().address != before, "its port is taken"
    with closing(Endpoint([Ready([])], Listening(), port_before=split_address(before)[1])) as again:
        assert again.report().address == before


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_who_listens_everywhere_is_known_by_one_address(host: str) -> None:
    assert reachable(f"{host}:5", "10.1.2.3") == "10.1.2.3:5"
    assert reachable("127.0.0.1:5", "10.1.2.3") == "127.0.0.1:5"
