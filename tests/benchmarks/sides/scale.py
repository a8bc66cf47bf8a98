"""How many emulated workers a replay bears before it falls behind, in one shard or in several.

An emulated worker is a thread that sleeps as long as a worker steps, then sends segments that were recorded: real
pushes over real Ray calls, without the environments that would need a cluster. The figure is the knee: so many workers
offer what the replay takes at the most.

Each process of the replay runs 15 % of the time: on a whole core one takes more than senders on the same two cores can
send, and the knee would be theirs.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from measure import arguments, report

parsed = arguments("shards")
os.environ.update(RAY_worker_niceness="0", RAY_USAGE_STATS_ENABLED="0")

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import ray  # noqa: E402
from pushes import layout_of, pushes_of  # noqa: E402

from replay.client import ReplayClient  # noqa: E402
from replay.messages import Push  # noqa: E402
from replay.remote import NAMESPACE, RemoteActor  # noqa: E402
from replay.server import ReplayActor, ReplaySpec  # noqa: E402
from replay.sharding.client import ShardedReplayClient  # noqa: E402
from replay.sharding.reporter import ShardReporter  # noqa: E402
from replay.sharding.router import ReplayRouterActor  # noqa: E402
from replay.sharding.shard import ReplayShardActor  # noqa: E402
from replay.table import TableSpec  # noqa: E402

WORKERS, IN_A_PROCESS = (8, 16, 32, 64, 128, 256), 64
RATE = 400.0  # transitions a second of one worker: Pong in 8 lanes, between flat out and held back by the limiter
CAPACITY, BATCH, LANES = 20_000, 512, 4
PERIOD_SECONDS, SHARE = 0.1, 0.15
NAME, SHARDS = "bench", int(parsed.shards)


def client() -> ReplayClient:
    """Return a client as workers and learner hold it."""
    if SHARDS == 1:
        return ReplayClient(RemoteActor(NAME))
    return ShardedReplayClient(RemoteActor(NAME), [RemoteActor(f"{NAME}-{shard}") for shard in range(SHARDS)])


@ray.remote(num_cpus=0, max_concurrency=2)  # type: ignore[untyped-decorator]
class Crowd:
    """Emulated workers of one process."""

    def __init__(self) -> None:
        self.pushes = pushes_of("atari", 2_000, LANES)
        self.done: dict[int, int] = {}
        self.sequence: dict[int, int] = {}

    def run(self, first: int, count: int, seconds: float) -> None:
        """Let workers numbered `first` and up send for so long."""
        crowd = [threading.Thread(target=self._work, args=(first + i, seconds)) for i in range(count)]
        for thread in crowd:
            thread.start()
        for thread in crowd:
            thread.join()

    def inserted(self) -> int:
        """Return how many transitions were taken so far."""
        return sum(self.done.values())

    def _work(self, worker: int, seconds: float) -> None:
        replay, begun = client(), time.perf_counter()
        every = self.pushes[0].steps / RATE
        at = begun + every * np.random.default_rng(worker).random()  # not all at once
        while (now := time.perf_counter()) < begun + seconds:
            if now < at:
                time.sleep(min(at - now, begun + seconds - now))
                continue
            sequence = self.sequence.get(worker, 0)
            push = Push(worker, 0, sequence, self.pushes[(worker + sequence) % len(self.pushes)])
            replay.insert(push)
            self.sequence[worker] = sequence + 1
            self.done[worker] = self.done.get(worker, 0) + push.steps
            at = max(at + every, time.perf_counter())  # what was not sent in time is not made up for


def start() -> list[Any]:
    """Start the replay; return the handles of its processes."""
    layout = layout_of("atari")
    spec = ReplaySpec(TableSpec(layout, CAPACITY, 0.6), float("inf"), 1, LANES * layout.segment_length, BATCH, 1)
    if SHARDS == 1:
        return [ReplayActor.options(name=NAME, namespace=NAMESPACE).remote(spec, run_seed=0)]
    router = ReplayRouterActor.options(name=NAME, namespace=NAMESPACE).remote(spec, shards=SHARDS, run_seed=0)
    shards = [
        ReplayShardActor.options(name=f"{NAME}-{shard}", namespace=NAMESPACE).remote(
            spec, shard=shard, shards=SHARDS, router=ShardReporter(RemoteActor(NAME)), run_seed=0
        )
        for shard in range(SHARDS)
    ]
    return [router, *shards]


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """Return what the processes have used since they began."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def hold_back(processes: list[psutil.Process], until: threading.Event) -> None:
    """Let the processes run for their share of each period, in turn."""
    while not until.is_set():
        for process in processes:
            process.resume()
            time.sleep(PERIOD_SECONDS * SHARE)
            process.suspend()
        time.sleep(max(PERIOD_SECONDS * (1.0 - SHARE * len(processes)), 0.0))
    for process in processes:
        process.resume()


def main() -> None:
    """Let more and more workers send, then draw."""
    window = max(parsed.seconds / 4.0, 1.0)
    ray.init(
        address="local", namespace=NAMESPACE, num_cpus=2, include_dashboard=False, log_to_driver=False,
        object_store_memory=1024 * 2**20,
    )  # fmt: skip
    handles = start()
    parts = [psutil.Process(ray.get(handle.stats.remote()).pid) for handle in handles]
    crowds = [Crowd.remote() for _ in range(-(-WORKERS[-1] // IN_A_PROCESS))]
    senders = len(crowds)
    ray.get([crowd.run.remote(i * IN_A_PROCESS, 8, parsed.warm_up) for i, crowd in enumerate(crowds)])
    taken, costs, enough = [], [], threading.Event()
    holding = threading.Thread(target=hold_back, args=(parts, enough))
    holding.start()
    for workers in WORKERS:
        share = [workers * (i + 1) // senders - workers * i // senders for i in range(senders)]
        running = [
            crowd.run.remote(i * IN_A_PROCESS, count, window + 1.5)
            for i, (crowd, count) in enumerate(zip(crowds, share, strict=True))
        ]
        time.sleep(1.0)
        begun, used = time.perf_counter(), cpu_seconds(parts)
        first = sum(ray.get([crowd.inserted.remote() for crowd in crowds]))
        time.sleep(window)
        took = sum(ray.get([crowd.inserted.remote() for crowd in crowds])) - first
        seconds = time.perf_counter() - begun
        taken.append(took / seconds)
        costs.append((cpu_seconds(parts) - used) / took * 1e6)
        ray.get(running)
    enough.set()
    holding.join()
    reader, drawn = client(), 0
    begun, used = time.perf_counter(), cpu_seconds(parts)
    while time.perf_counter() - begun < window:
        reply = reader.sample(1, BATCH)
        assert reply is not None
        assert reply.batch is not None
        reader.update_priorities(reply.batch.ids, np.ones(reply.batch.ids.shape, np.float32))
        drawn += BATCH
    sampling = (cpu_seconds(parts) - used) / drawn * 1e6
    ray.shutdown()
    report(
        max(taken) / RATE, rate=RATE, shards=SHARDS, workers=WORKERS, taken=taken, most=max(taken),
        cpu_seconds_per_million_inserted=costs[WORKERS.index(64)], cpu_seconds_per_million_drawn=sampling,
    )  # fmt: skip


if __name__ == "__main__":
    main()
