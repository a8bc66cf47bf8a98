"""The endpoint: the process of a live run that serves gRPC. It runs on the driver's node and reserves no CPU."""

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

_ALL_INTERFACES = ("0.0.0.0", "::")


class ServiceSpec(Protocol):
    """The description of a service, which can be pickled and sent to the process that builds the service."""

    def build(self, incarnation: int) -> Service:
        """Build the service, in the process that serves it; `incarnation` is that of the endpoint."""


@dataclass(frozen=True)
class PolicyServiceSpec:
    """The description of the Policy service of a live run, which always has the run's newest weights.

    Attributes:
        run: name of the run.
        seed: the run's seed.
        algorithm: name of the algorithm that trains the policy.
        spec: description of the policy.
        weights: source of its weights.
    """

    run: str
    seed: int
    algorithm: str
    spec: PolicySpec
    weights: WeightClient

    def build(self, incarnation: int) -> PolicyService:
        """Build the service."""
        policy = self.spec.build()
        policy.begin(spawn_seed(self.seed, "endpoint", incarnation=incarnation))
        return PolicyService(ServedPolicy(policy, self.algorithm, weights=self.weights), self.run)


@dataclass(frozen=True)
class ExperienceServiceSpec:
    """The description of the Experience service, which receives experience from external environments.

    Attributes:
        run: name of the run.
        algorithm: name of the algorithm that trains the policy.
        rollout: description of a rollout worker of the run.
        weights: source of the policy's weights.
        replay: client of the replay that receives the experience; None for an on-policy run, which accepts none.
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
        """Build the service."""
        if self.replay is None:
            return NoExperience(
                f"{self.algorithm} is on-policy: only rollout workers get the permits for its batches; external "
                f"experience needs an off-policy algorithm, such as dqn or sac"
            )
        policy = self.rollout.policy.build()
        policy.begin(spawn_seed(self.rollout.run_seed, "experience", incarnation=incarnation))
        served = ServedPolicy(policy, self.algorithm, weights=self.weights)
        replay = self.replay
        # One copy for each thread, because a client has the state of its current call.
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
    """The report of an endpoint, for `squall status` and for gateways.

    Attributes:
        pid: process id.
        node: host name of its machine.
        address: address that it listens on, `host:port`.
        services: full names of its services.
        status_message: summary for people.
        waiting_for: event that clients wait for, or None.
        finished: whether clients have been notified that the run has all its steps.
    """

    pid: int
    node: str
    address: str
    services: tuple[str, ...]
    status_message: str
    waiting_for: str | None = None
    finished: bool = False

    def plain(self) -> dict[str, Any]:
        """Return the values that a gateway needs, as JSON values."""
        return {"node": self.node, "address": self.address, "services": list(self.services)}


class Endpoint:
    """A gRPC server of some services, for use as a Ray actor."""

    def __init__(self, specs: Sequence[ServiceSpec], *, incarnation: int = 0, threads: int | None = None) -> None:
        """Build the services; `listen` starts the server.

        Args:
            specs: descriptions of the services.
            incarnation: number of restarts of this process.
            threads: number of PyTorch threads of this process; None keeps the default.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        self._services = [spec.build(incarnation) for spec in specs]
        self._server: ServerThread | None = None
        self._listen_error: ConfigurationError | None = None
        self._address = ""

    def listen(
        self, server_config: ServerConfig, *, advertised_host: str | None = None, previous_port: int | None = None
    ) -> None:
        """Start the server.

        Args:
            server_config: configuration of the server.
            advertised_host: host name that clients use if the server listens on all interfaces.
            previous_port: port of the previous incarnation. If the configuration asks for any free port, this port is
                tried first.

        Raises:
            ConfigurationError: the address cannot be used; `report` raises this error too.
        """
        try:
            self._server = _listen(self._services, server_config, previous_port)
        except ConfigurationError as error:
            self._listen_error = error
            raise
        self._address = reachable(self._server.address, advertised_host)

    def note_progress(self, env_steps: int) -> None:
        """Set the run's number of environment steps."""
        for service in self._services:
            service.note_progress(env_steps)

    def report(self) -> EndpointReport:
        """Return the address and the state of the services; raises the error of a failed `listen`."""
        if self._listen_error is not None:
            raise self._listen_error
        names = tuple(service.name for service in self._services)
        short_names = ", ".join(name.rpartition(".")[2] for name in names)
        messages = [service.status_message for service in self._services if service.status_message]
        return EndpointReport(
            os.getpid(),
            socket.gethostname(),
            self._address,
            names,
            status_message="; ".join([f"serves {short_names} on {self._address}", *messages]),
            waiting_for=next((service.waiting_for for service in self._services if service.waiting_for), None),
            finished=any(service.finished for service in self._services),
        )

    def finish(self) -> None:
        """Notify clients that the run accepts no more experience."""
        for service in self._services:
            service.finish()

    def close(self) -> None:
        """Notify clients that the run has ended, and stop the server after a grace period."""
        self.finish()
        if self._server is not None:
            self._server.close(GRACE_SECONDS)


def _listen(services: Sequence[Service], server_config: ServerConfig, previous_port: int | None) -> ServerThread:
    if previous_port is not None and server_config.address.endswith(":0"):
        with contextlib.suppress(ConfigurationError):  # another process uses the port now
            return ServerThread(
                services, replace(server_config, address=f"{server_config.address[:-1]}{previous_port}")
            )
    return ServerThread(services, server_config)


def reachable(address: str, advertised_host: str | None) -> str:
    """Return the address that clients use; `advertised_host` is the host of a server that listens on all interfaces."""
    host, port = split_address(address)
    return f"{advertised_host}:{port}" if advertised_host and host in _ALL_INTERFACES else address


EndpointActor = actor_class(Endpoint)
