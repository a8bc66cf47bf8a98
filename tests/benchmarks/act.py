"""How fast Act answers many at once, batched beside unbatched: p50, p99 and requests a second.

    python -m tests.benchmarks.act [--requests 1000] [--rounds 20] [--policy vector|image]

The server is a process of its own, on loopback; the client sends all requests at the same time and waits for all
answers, round after round. Unbatched is the same server with one request a forward pass.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import grpc
import numpy as np
import torch

from actors.environments import DiscreteActions, EnvironmentSpec
from actors.policies import PolicySpec
from replay.types import Array
from services.rpc import squall_pb2 as pb
from services.rpc import squall_pb2_grpc
from services.rpc.auth import ServerConfig
from services.rpc.codec import encode_array
from services.rpc.policy import MAX_BATCH_SIZE, PolicyService, ServedPolicy
from services.rpc.server import CHANNEL_OPTIONS, ServerThread

ENVIRONMENTS = {
    "vector": EnvironmentSpec("CartPole-v1", (4,), "float32", 1, DiscreteActions(2)),
    "image": EnvironmentSpec("PongNoFrameskip-v4", (4, 84, 84), "uint8", 4, DiscreteActions(6)),
}
CALL_SECONDS = 120.0


def serve(kind: str, most_rows: int, threads: int, pipe: Connection) -> None:
    """Serve a policy with fresh weights until the other end of `pipe` says so."""
    torch.set_num_threads(threads)
    policy = PolicySpec("epsilon_greedy", ENVIRONMENTS[kind], (256, 256)).build()
    service = PolicyService(ServedPolicy(policy, "dqn", version=0), "benchmark", max_batch_size=most_rows)
    server = ServerThread([service], ServerConfig())
    pipe.send(server.address)
    pipe.recv()
    pipe.send((service.batcher.requests, service.batcher.passes))
    server.close()


@contextmanager
def server(kind: str, most_rows: int, threads: int) -> Iterator[tuple[str, Connection]]:
    """Yield the address of a server in a process of its own, and the pipe to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(kind, most_rows, threads, theirs))
    process.start()
    try:
        yield ours.recv(), ours
    finally:
        process.terminate()
        process.join()


async def measure(address: str, requests: int, rounds: int, observations: Array) -> tuple[Array, float]:
    """Return the seconds that each request took, and those that all rounds took."""
    messages = [pb.ActRequest(observations=encode_array(each[None])) for each in observations]
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        act = squall_pb2_grpc.PolicyStub(channel).Act

        async def one(number: int) -> float:
            begun = time.perf_counter()
            await act(messages[number % len(messages)], timeout=CALL_SECONDS)
            return time.perf_counter() - begun

        await asyncio.gather(*(one(number) for number in range(requests)))  # connects, and warms up
        begun = time.perf_counter()
        taken = [await asyncio.gather(*(one(number) for number in range(requests))) for _ in range(rounds)]
        return np.concatenate(taken), time.perf_counter() - begun


def main() -> None:
    """Measure both ways and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, help="at the same time; default 1000")
    parser.add_argument("--rounds", type=int, default=20, help="default 20")
    parser.add_argument("--policy", choices=ENVIRONMENTS, default="vector", help="default vector")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch threads of the server; default 1")
    arguments = parser.parse_args()
    environment = ENVIRONMENTS[arguments.policy]
    rng = np.random.default_rng(0)
    observations = rng.integers(0, 200, (100, *environment.observation_shape)).astype(environment.observation_dtype)
    print(f"{'':10} {'p50 ms':>8} {'p99 ms':>8} {'requests/s':>11} {'requests a pass':>16}")
    for name, most_rows in (("batched", MAX_BATCH_SIZE), ("unbatched", 1)):
        with server(arguments.policy, most_rows, arguments.threads) as (address, pipe):
            taken, seconds = asyncio.run(measure(address, arguments.requests, arguments.rounds, observations))
            pipe.send("enough")
            asked, passes = pipe.recv()
        p50, p99 = np.percentile(taken, [50, 99]) * 1000
        print(f"{name:10} {p50:8.1f} {p99:8.1f} {len(taken) / seconds:11.0f} {asked / passes:16.1f}")


if __name__ == "__main__":
    main()
