"""Endpoint: the process of a live run that serves it over gRPC. It runs beside the driver, and takes no CPU slot."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from actors.policies import PolicySpec
from actors.rollout import RolloutSpec
from actors.weights import WeightClient
from replay.client import ReplayClient
from replay.errors import ConfigurationError
from replay.remote import actor_class
from replay.seeds import spawn_seed
from services.rpc.auth import ServerConfig, split_address
from services.rpc.experience import ExperienceService, NoExperience
from services.rpc.policy import PolicyService, ServedPolicy
from services.rpc.server import GRACE_SECONDS, ServerThread, Service

_EVERY_HOST = ("0.0.0.0", "::")


class ServiceSpec(Protocol):
    """A service described but not made: plain, so that it can be sent to the process that makes it."""

    def build(self, incarnation: int) -> Service:
        """Make the service, in that process."""


@dataclass(frozen=True)
class PolicyServiceSpec:
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
class ExperienceServiceSpec:
    """Experience, from environments outside.

    Attributes:
        run: the run's name.
        algorithm: what trains it.
        rollout: what a rollout worker of the run does.
        weights: where the policy's weights come from.
        replay: where experience goes; None for an on-policy run, which takes none.
        first_worker: worker index in the pushes of the first session.
        sessions: number of sessions that one incarnation of the endpoint may open.
    """

    run: str
    algorithm: str
    rollout: RolloutSpec
    weights: WeightClient
    replay: ReplayClient | None
    first_worker: int
    sessions: int

    def build(self, incarnation: int) -> Service:
        """Make the service."""
        if self.replay is None:
            return NoExperience(
                f"{self.algorithm} is on-policy: its batches are made under permits that only rollout workers hold; "
                f"experience from outside needs an off-policy algorithm, such as dqn or sac"
            )
        policy = self.rollout.policy.build()
        policy.begin(spawn_seed(self.rollout.run_seed, "experience", incarnation=incarnation))
        served = ServedPolicy(policy, self.algorithm, weights=self.weights)
        replay = self.replay
        # Each thread's own: a client says what its call waits for.
        return ExperienceService(
            self.run,
            self.rollout,
            served,
            lambda: copy(replay),
            first_worker=self.first_worker,
            first_incarnation=incarnation * self.sessions,
        )


@dataclass(frozen=True)
class EndpointReport:
    """What `squall status` shows of an endpoint, and a gateway needs to find it.

    Attributes:
        pid: of its process.
        node: its host.
        address: where it listens, `host:port`.
        services: what it offers, by full name.
        status_message: the same for people, and how it goes.
        waiting_for: what callers wait for, or None.
        finished: whether they were told that the run has all its steps.
    """

    pid: int
    node: str
    address: str
    services: tuple[str, ...]
    status_message: str
    waiting_for: str | None = None
    finished: bool = False

    def plain(self) -> dict[str, Any]:
        """Return what a gateway needs, as plain JSON values."""
        return {"node": self.node, "address": self.address, "services": list(self.services)}


class Endpoint:
    """Serves some services for as long as it lives."""

    def __init__(self, offers: Sequence[ServiceSpec], *, incarnation: int = 0, threads: int | None = None) -> None:
        """Make the services; `listen` opens.

        Args:
            offers: what to serve.
            incarnation: how often this process was recreated.
            threads: PyTorch threads of this process; None leaves them.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        self._services = [offer.build(incarnation) for offer in offers]
        self._server: ServerThread | None = None
        self._refused: ConfigurationError | None = None
        self._address = ""

    def listen(
        self, server_config: ServerConfig, *, known_as: str | None = None, port_before: int | None = None
    ) -> None:
        """Take calls.

        Args:
            server_config: where, and for whom.
            known_as: the host that others reach this one by, where it listens on every address it has.
            port_before: where an earlier process listened that took any free port: this one does again, if it can.

        Raises:
            ConfigurationError: nothing can listen there; `report` raises it too.
        """
        try:
            self._server = _listen(self._services, server_config, port_before)
        except ConfigurationError as error:
            self._refused = error
            raise
        self._address = reachable(self._server.address, known_as)

    def note_progress(self, env_steps: int) -> None:
        """Take note of how far the run is."""
        for service in self._services:
            service.note_progress(env_steps)

    def report(self) -> EndpointReport:
        """Return where it listens, and what it offers; raises what `listen` met."""
        if self._refused is not None:
            raise self._refused
        names = tuple(service.name for service in self._services)
        what = ", ".join(name.rpartition(".")[2] for name in names)
        told = [service.status_message for service in self._services if service.status_message]
        return EndpointReport(
            os.getpid(),
            socket.gethostname(),
            self._address,
            names,
            status_message="; ".join([f"serves {what} on {self._address}", *told]),
            waiting_for=next((service.waiting_for for service in self._services if service.waiting_for), None),
            finished=any(service.finished for service in self._services),
        )

    def finish(self) -> None:
        """Tell callers who bring something that the run takes no more."""
        for service in self._services:
            service.finish()

    def close(self) -> None:
        """Listen no more, once callers have had a moment to hear that it is over."""
        self.finish()
        if self._server is not None:
            self._server.close(GRACE_SECONDS)


def _listen(services: Sequence[Service], server_config: ServerConfig, port_before: int | None) -> ServerThread:
    if port_before is not None and server_config.address.endswith(":0"):
        with contextlib.suppress(ConfigurationError):  # somebody else has it now
            return ServerThread(services, replace(server_config, address=f"{server_config.address[:-1]}{port_before}"))
    return ServerThread(services, server_config)


def reachable(address: str, known_as: str | None) -> str:
    """Return the address that others reach a server by; `known_as` is its host where it listens on all it has."""
    host, port = split_address(address)
    return f"{known_as}:{port}" if known_as and host in _EVERY_HOST else address


EndpointActor = actor_class(Endpoint)
