"""A run that receives experience over gRPC: real servers and clients on loopback and a real replay, in one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from gymnasium import spaces

from actors.environments import DiscreteActions, EnvironmentSpec, specify
from actors.rollout import RolloutSpec
from replay.errors import DeadlineExceeded
from replay.messages import InsertReply, Push
from replay.server import ReplayServer
from services.client.experience_client import ExperienceClient, ExperienceSession
from services.rpc import squall_pb2 as pb
from services.rpc import squall_pb2_grpc
from services.rpc.auth import ServerConfig
from services.rpc.codec import encode_array, spaces_of
from services.rpc.errors import from_status
from services.rpc.experience import ExperienceService
from services.rpc.policy import ServedPolicy
from services.rpc.server import ServerThread
from services.supervision.topology import FIRST_SESSION_WORKER
from tests.actors.workers import Direct, Given, make_server, make_spec, weights_for

ROOT = Path(__file__).parents[3]
SHORT = specify("SquallShort-v0")
STACKS = replace(specify("SquallStacks-v0"), frame_stack=4)
CARTPOLE = EnvironmentSpec("CartPole-v1", (4,), "float32", 1, DiscreteActions(2))
CORRIDOR = EnvironmentSpec("Corridor-v0", (), "int64", 1, DiscreteActions(3), observation_count=5)
VECTOR = spaces.Box(-np.inf, np.inf, (4,), np.float32)
TWO = spaces.Discrete(2)


class SharedReplayClient(Direct):
    """A thread-safe replay client whose inserts have a deadline."""

    def __init__(self, server: ReplayServer, seconds: float = 30.0) -> None:
        super().__init__(server)
        self._lock, self._seconds = threading.Lock(), seconds

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply | None:
        end = time.monotonic() + self._seconds
        while True:
            with self._lock:
                reply = self.server.insert(push)
                if reply.wait is None:
                    self.waiting_for = None
                    self.pushes.append(push)
                    return reply
                self.waiting_for = reply.wait
            if stop is not None and stop.wait(0.002):
                return None
            if time.monotonic() > end:
                raise DeadlineExceeded(f"insert waited {self._seconds:g} s for {reply.wait}")


class ServedRun:
    """A run with an Experience service, and the address of the service."""

    def __init__(self, spec: RolloutSpec, replay: SharedReplayClient, service: ExperienceService, address: str) -> None:
        self.spec, self.replay, self.service, self.address = spec, replay, service, address

    def client(self, **options: Any) -> ExperienceClient:
        return ExperienceClient(self.address, run="mine", answer_seconds=30.0, **options)

    def opening(self) -> pb.Open:
        environment = self.spec.policy.environment
        observations, actions = spaces_of(environment)
        if environment.frame_stack > 1:
            observations.box.shape[:] = environment.observation_shape[1:]
        return pb.Open(run="mine", observation_space=observations, action_space=actions)

    def open(self) -> ExperienceSession:
        return ExperienceSession(self.client()._client, self.opening(), seconds=30.0)

    def wait_until_drained(self) -> None:
        """Wait until all sessions have ended and have pushed their remaining steps."""
        wait_for(lambda: not self.service._calls)

    @property
    def env_steps(self) -> int:
        return self.replay.server.stats().counters.env_steps


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s"
        time.sleep(0.01)


def make_service(
    spec: RolloutSpec, replay: SharedReplayClient, weights: Any = None, **options: Any
) -> ExperienceService:
    policy = spec.policy.build()
    policy.begin(np.random.SeedSequence(5))
    served = ServedPolicy(policy, "dqn", weights=weights or Given(weights_for(spec)))
    options.setdefault("first_worker", FIRST_SESSION_WORKER)
    return ExperienceService("mine", spec, served, lambda: replay, **options)


@contextmanager
def serve_run(
    spec: RolloutSpec | None = None,
    *,
    weights: Any = None,
    seconds: float = 30.0,
    max_steps: int | None = None,
    rate: dict[str, float] | None = None,
    **options: Any,
) -> Iterator[ServedRun]:
    spec = spec or make_spec(CARTPOLE, "random", lanes=1, n_steps=2)
    replay = SharedReplayClient(make_server(spec, max_env_steps=max_steps, **(rate or {})), seconds)
    service = make_service(spec, replay, weights, **options)
    server = ServerThread([service], ServerConfig())
    try:
        yield ServedRun(spec, replay, service, server.address)
    finally:
        server.close()


def exchange(address: str, *messages: pb.PlayRequest) -> list[pb.PlayResponse]:
    """Send messages without further checks, and return the answers."""
    with grpc.insecure_channel(address) as channel:
        call: Any = squall_pb2_grpc.ExperienceStub(channel).Play(iter(messages), timeout=30.0)
        try:
            return list(call)
        except grpc.RpcError:
            raise from_status(call.code(), call.details(), call.trailing_metadata(), address) from None


def reset(observation: Any) -> pb.PlayRequest:
    return pb.PlayRequest(reset=pb.Reset(observation=encode_array(np.asarray(observation, np.float32))))


def step(number: int, observation: Any = (0, 0, 0, 0), reward: float = 1.0, **ends: bool) -> pb.PlayRequest:
    array = encode_array(np.asarray(observation, np.float32))
    return pb.PlayRequest(step=pb.Step(number=number, reward=reward, observation=array, **ends))


CLOSE = pb.PlayRequest(close=pb.Close())

ZEROS = (0.0, 0.0, 0.0, 0.0)
