"""Real servers on loopback, and records of runs that the store lists as live."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from actors.environments import ContinuousActions, DiscreteActions, EnvironmentSpec
from actors.policies import EpsilonSchedule, PolicySpec
from services.rpc.auth import ServerConfig
from services.rpc.policy import PolicyService, ServedPolicy
from services.rpc.server import ServerThread, Service
from services.store.base import RunStore
from services.store.records import RunRecord, this_process
from services.store.redis import RedisRunStore
from services.store.sqlite import SQLiteRunStore
from tests.services.redis_server import RedisServer

TOKEN_FOR_TESTS = "a-token-that-only-tests-know"
CARTPOLE = EnvironmentSpec("CartPole-v1", (4,), "float32", 1, DiscreteActions(2))
PENDULUM = EnvironmentSpec("Pendulum-v1", (3,), "float32", 1, ContinuousActions((1,), (-2.0,), (2.0,)))
CORRIDOR = EnvironmentSpec("Corridor-v0", (), "int64", 1, DiscreteActions(3), observation_count=5)


@contextmanager
def serving(*services: Service, token: str | None = None, **tls: Path) -> Iterator[str]:
    """Serve on a free port and yield the address."""
    server = ServerThread(services, ServerConfig(token=token, **tls))
    try:
        yield server.address
    finally:
        server.close()


def make_policy(environment: EnvironmentSpec = CARTPOLE, *, version: int = 7) -> ServedPolicy:
    """Return a small policy; an epsilon-greedy one explores with epsilon 1."""
    kind = "epsilon_greedy" if isinstance(environment.actions, DiscreteActions) else "squashed_gaussian"
    spec = PolicySpec(kind, environment, (8,), exploration=EpsilonSchedule(1.0, 1.0))
    policy = spec.build()
    policy.begin(np.random.SeedSequence(1))
    return ServedPolicy(policy, "dqn", version=version)


def policy_service(run: str = "mine", environment: EnvironmentSpec = CARTPOLE, **options: Any) -> PolicyService:
    return PolicyService(make_policy(environment), run, **options)


@contextmanager
def open_backend(kind: str, folder: Path) -> Iterator[RunStore]:
    """Open an empty store of a kind, "sqlite" or "redis"."""
    if kind == "sqlite":
        with SQLiteRunStore(folder / "squall.db") as store:
            yield store
        return
    with RedisServer(folder) as server, RedisRunStore(server.url) as store:
        yield store


def register(store: RunStore, name: str, state: str = "running", snapshot: Mapping[str, Any] | None = None) -> None:
    """Register a run of this process, which exists, so that the store lists the run as live."""
    now, me = time.time(), this_process()
    store.register(RunRecord(name, now, "dqn", "CartPole-v1", 3, *me, state, now, None, {"serve": "auto"}))
    if snapshot is not None:
        store.write_snapshot(name, snapshot, time.time())
