"""Squall's replay service in Ray: a writer process pushes segments, this process samples batches of 8 x 32."""

from __future__ import annotations

import os
import time
from typing import Any

from items import BATCH, CAPACITY, LENGTH, STACK, VECTOR_LENGTH, K, frames_of, item_bytes
from measure import arguments, quantile, report

parsed = arguments("kind", "table", "what")
os.environ.update(RAY_worker_niceness="0", RAY_USAGE_STATS_ENABLED="0")

import numpy as np  # noqa: E402
import ray  # noqa: E402

from replay.remote import NAMESPACE, RemoteActor  # noqa: E402
from replay.server import ReplayActor, ReplayClient, ReplaySpec  # noqa: E402
from replay.table import TableSpec  # noqa: E402
from replay.types import Layout, Push, Segment  # noqa: E402

atari = parsed.kind == "atari"
length = LENGTH if atari else VECTOR_LENGTH
stack = STACK if atari else 1
layout = Layout((84, 84) if atari else (4,), "uint8" if atari else "float32", stack, (), "int64", length, 1)
LANES = 4


def segments(frames: Any) -> list[tuple[Segment, ...]]:
    """Return pushes of segments cut from a run of frames."""
    rows = layout.max_segment_frames
    row = np.arange(length, dtype=np.int32) + stack - 1
    age = np.full(length, stack - 1, np.uint8)
    zero, one = np.zeros(length, np.float32), np.ones(length, np.float32)

    def segment(at: int) -> Segment:
        return Segment(frames[at : at + rows].copy(), row, age, row + 1, age, np.zeros(length, np.int64), zero, one)

    starts = range(0, len(frames) - rows, length)
    cut = [segment(at) for at in starts]
    return [tuple(cut[i : i + LANES]) for i in range(0, len(cut) - LANES, LANES)]


@ray.remote(num_cpus=0)  # type: ignore[untyped-decorator]
class Writer:
    """Pushes without end; a few inserts are on their way at any time, as they are from several workers."""

    def run(self, seconds: float) -> float:
        """Return items inserted a second."""
        client, pushes = ReplayClient(RemoteActor("bench")), segments(frames_of(parsed.kind, 2_000))
        self.sequence = getattr(self, "sequence", 0)
        begun, done = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            push = Push(0, 0, self.sequence, pushes[self.sequence % len(pushes)])
            client.insert(push)
            self.sequence += 1
            done += push.steps
        return done / (time.perf_counter() - begun)


ray.init(
    address="local", namespace=NAMESPACE, num_cpus=2, include_dashboard=False, log_to_driver=False,
    object_store_memory=512 * 2**20,
)  # fmt: skip
table = TableSpec(layout, CAPACITY[parsed.kind], 0.6 if parsed.table == "prioritized" else None)
spec = ReplaySpec(table, float("inf"), 1, LANES * length, BATCH, K)
server = ReplayActor.options(name=RemoteActor("bench").name, namespace=NAMESPACE).remote(spec, run_seed=0)
writer, client = Writer.remote(), ReplayClient(RemoteActor("bench"))
filled = 0
while filled < CAPACITY[parsed.kind] // 2:
    ray.get(writer.run.remote(1.0))
    filled = ray.get(server.stats.remote()).size
writing = writer.run.remote(parsed.warm_up + parsed.seconds)
taken: list[float] = []
drawn, end = 0, time.perf_counter() + parsed.warm_up
asked = [client._actor.later("sample", K, BATCH) for _ in range(2)]  # two calls ahead, as the learner does
begun = None
last = time.perf_counter()
while True:
    reply = ray.get(asked.pop(0))
    asked.append(client._actor.later("sample", K, BATCH))
    np.add.reduce(reply.batch.reward, axis=None)
    now = time.perf_counter()
    if begun is None:
        if now >= end:
            begun = now
    else:
        taken.append(now - last)
        drawn += K * BATCH
        if now - begun >= parsed.seconds:
            break
    last = now
inserted, sampled = ray.get(writing), drawn / (time.perf_counter() - begun)
ray.shutdown()
taken.sort()
report(
    inserted if parsed.what == "inserted" else sampled, item_bytes=item_bytes(parsed.kind), inserted=inserted,
    sampled=sampled, p50_ms=quantile(taken, 0.5) * 1e3, p99_ms=quantile(taken, 0.99) * 1e3,
)  # fmt: skip
