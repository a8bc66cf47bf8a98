"""Rollout workers, replay servers, and weight sources in the test's process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from actors.environments import specify
from actors.policies import PolicySpec
from actors.rollout import RolloutSpec, RolloutWorker, WorkerReport
from actors.weights import Weights, pack
from replay.messages import InsertReply, Push
from replay.server import ReplayServer, ReplaySpec
from replay.table import TableSpec
from tests.actors.toys import ConstantPolicy, Script

SHORT = specify("SquallShort-v0")
SCRIPTED = specify("SquallScripted-v0")
LONG = Script(length=10_000)


class Direct:
    """A `ReplayClient` without Ray; records the accepted pushes."""

    def __init__(self, server: ReplayServer) -> None:
        self.server = server
        self.waiting_for: str | None = None
        self.pushes: list[Push] = []

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply | None:
        while True:
            reply = self.server.insert(push)
            if reply.wait is None:
                self.waiting_for = None
                self.pushes.append(push)
                return reply
            self.waiting_for = reply.wait
            if stop is not None and stop.wait(0.002):
                return None


class Given:
    """A weight source that returns the weights of a list, one per poll."""

    def __init__(self, *weights: Weights | None) -> None:
        self.waiting = list(weights)
        self.version = -1

    pending = False

    def poll(self) -> Weights | None:
        weights = self.waiting.pop(0) if self.waiting else None
        if weights is not None:
            self.version = weights.version
        return weights


def make_spec(
    environment: Any = SCRIPTED,
    kind: str = "constant",
    *,
    lanes: int = 2,
    length: int = 4,
    n_steps: int = 1,
    clip: bool = False,
    seed: int = 0,
) -> RolloutSpec:
    return RolloutSpec(
        PolicySpec(kind, environment), lanes, length, n_steps, 0.97, clip, seed, track_return_statistics=True
    )


def make_server(
    spec: RolloutSpec, capacity: int = 10_000, max_env_steps: int | None = None, **rate: float
) -> ReplayServer:
    limits = {"samples_per_insert": float("inf"), "minimum_size": 1, **rate}
    replay = ReplaySpec(
        TableSpec(spec.layout, capacity),
        largest_push=spec.largest_push,
        batch_size=1,
        batches_per_sample=1,
        **limits,  # type: ignore[arg-type]
    )
    return ReplayServer(replay, run_seed=0, max_env_steps=max_env_steps)


def weights_for(spec: RolloutSpec, version: int = 0, action: int = 0) -> Weights:
    policy = spec.policy.build()
    if isinstance(policy, ConstantPolicy):
        policy.action.fill_(action)  # type: ignore[operator]
    return pack(policy, version)


def make_worker(spec: RolloutSpec, replay: Any, *weights: Weights | None, **identity: int) -> RolloutWorker:
    identity = {"worker": 0, "workers": 1, "incarnation": 0, **identity}
    return RolloutWorker(spec, replay=replay, weights=Given(*(weights or (weights_for(spec),))), **identity)


def constant_policy(worker: RolloutWorker) -> ConstantPolicy:
    assert isinstance(worker._policy, ConstantPolicy)
    return worker._policy


def run_vector_steps(worker: RolloutWorker, steps: int) -> WorkerReport:
    constant_policy(worker).after[steps] = worker.stop
    return worker.run()


@contextmanager
def running(worker: RolloutWorker) -> Iterator[Callable[[], WorkerReport]]:
    """Run a worker in a thread; yield a function that joins the thread and returns its report or raises its error."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(worker.run())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def end() -> WorkerReport:
        thread.join(20)
        assert not thread.is_alive()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        report: WorkerReport = outcome[0]
        return report

    try:
        yield end
    finally:
        worker.stop()
        thread.join(20)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
