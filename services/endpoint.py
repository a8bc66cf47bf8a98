"""Endpoint: the process of a live run that serves it over gRPC. It runs beside the driver, and takes no CPU slot."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from actors.policies import PolicySpec
from actors.weights import WeightClient
from replay.remote import actor_class
from replay.seeds import spawn_seed
from services.grpc_policy import PolicyService, ServedPolicy
from services.grpc_server import Listening, ServerThread, Service, split_address

_EVERY_HOST = ("0.0.0.0", "::")


class Offer(Protocol):
    """A service described but not made: plain, so that it can be sent to the process that makes it."""

    def build(self, incarnation: int) -> Service:
        """Make the service, in that process."""


@dataclass(frozen=True)
class PolicyOffer:
    """Policy, always with the run's newest weights.

    Attributes:
        run: the run's name.
        seed: the run's seed.
        algorithm: what trains it.
        spec: the acting module.
        weights: where its weights come from.
    """

    run: str
    seed: int
    algorithm: str
    spec: PolicySpec
    weights: WeightClient

    def build(self, incarnation: int) -> PolicyService:
        """Make the service."""
        policy = self.spec.build()
        policy.begin(spawn_seed(self.seed, "endpoint", incarnation=incarnation))
        return PolicyService(ServedPolicy(policy, self.algorithm, weights=self.weights), self.run)


@dataclass(frozen=True)
class EndpointReport:
    """What `squall status` shows of an endpoint, and a gateway needs to find it.

    Attributes:
        pid: of its process.
        node: its host.
        address: where it listens, `host:port`.
        services: what it offers, by full name.
        last_word: the same for people.
    """

    pid: int
    node: str
    address: str
    services: tuple[str, ...]
    last_word: str

    def plain(self) -> dict[str, Any]:
        """Return what a gateway needs, as plain JSON values."""
        return {"node": self.node, "address": self.address, "services": list(self.services)}


class Endpoint:
    """Serves some services for as long as it lives."""

    def __init__(
        self,
        offers: Sequence[Offer],
        listening: Listening,
        *,
        known_as: str | None = None,
        incarnation: int = 0,
        threads: int | None = None,
    ) -> None:
        """Make the services and listen.

        Args:
            offers: what to serve.
            listening: where, and for whom.
            known_as: the host that others reach this one by, where it listens on every address it has.
            incarnation: how often this process was recreated.
            threads: PyTorch threads of this process; None leaves them.

        Raises:
            ConfigurationError: nothing can listen there.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        self._services = [offer.build(incarnation) for offer in offers]
        self._server = ServerThread(self._services, listening)
        self._address = reachable(self._server.address, known_as)

    def note_progress(self, env_steps: int) -> None:
        """Take note of how far the run is."""
        for service in self._services:
            service.note_progress(env_steps)

    def report(self) -> EndpointReport:
        """Return where it listens, and what it offers."""
        names = tuple(service.name for service in self._services)
        what = ", ".join(name.rpartition(".")[2] for name in names)
        word = f"serves {what} on {self._address}"
        return EndpointReport(os.getpid(), socket.gethostname(), self._address, names, word)

    def close(self) -> None:
        """Listen no more."""
        self._server.close()


def reachable(address: str, known_as: str | None) -> str:
    """Return the address that others reach a server by; `known_as` is its host where it listens on all it has."""
    host, port = split_address(address)
    return f"{known_as}:{port}" if known_as and host in _EVERY_HOST else address


EndpointActor = actor_class(Endpoint)
