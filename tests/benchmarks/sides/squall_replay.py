"""Squall's replay service in Ray: a writer process pushes segments, this process samples k batches."""

from __future__ import annotations

import time

from items import BATCH, CAPACITY, LANES, K, item_bytes
from measure import arguments, quantile, report

parsed = arguments("kind", "table")
from services.supervision.ray_environment import set_ray_defaults  # noqa: E402

set_ray_defaults()

import ray  # noqa: E402
from pushes import layout_of, pushes_of  # noqa: E402

from learner.experience import RemoteTransitions  # noqa: E402
from replay.client import ReplayClient  # noqa: E402
from replay.messages import Push  # noqa: E402
from replay.remote import NAMESPACE, RemoteActor  # noqa: E402
from replay.server import ReplayActor, ReplaySpec  # noqa: E402
from replay.table import TableSpec  # noqa: E402


@ray.remote(num_cpus=0)  # type: ignore[untyped-decorator]
class Writer:
    """Pushes without end, one after the other, as a worker does that waits for nothing else."""

    def run(self, seconds: float) -> float:
        """Return items inserted a second."""
        client, pushes = ReplayClient(RemoteActor("bench")), pushes_of(parsed.kind, 4_000, LANES[parsed.kind])
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
layout, k, batch_size = layout_of(parsed.kind), K[parsed.kind], BATCH[parsed.kind]
table = TableSpec(layout, CAPACITY[parsed.kind], 0.6 if parsed.table == "prioritized" else None)
spec = ReplaySpec(table, float("inf"), 1, LANES[parsed.kind] * layout.segment_length, batch_size, k)
server = ReplayActor.options(name=RemoteActor("bench").name, namespace=NAMESPACE).remote(spec, run_seed=0)
writer, client = Writer.remote(), ReplayClient(RemoteActor("bench"))
filled = 0
while filled < CAPACITY[parsed.kind] // 2:
    ray.get(writer.run.remote(1.0))
    filled = ray.get(server.stats.remote()).size
writing = writer.run.remote(parsed.warm_up + parsed.seconds)
taken: list[float] = []
drawn, end = 0, time.perf_counter() + parsed.warm_up
begun = None
last = time.perf_counter()
experience = RemoteTransitions(
    client, k=k, batch_size=batch_size, length=2**40
)  # as the learner does, tensors included
for batch in experience:
    batch.reward.sum()
    now = time.perf_counter()
    if begun is None:
        if now >= end:
            begun = now
    else:
        taken.append(now - last)
        drawn += k * batch_size
        if now - begun >= parsed.seconds:
            break
    last = now
inserted, sampled = ray.get(writing), drawn / (time.perf_counter() - begun)
experience.close()
ray.shutdown()
taken.sort()
p50, p99 = quantile(taken, 0.5), quantile(taken, 0.99)
report(
    sampled, item_bytes=item_bytes(parsed.kind), inserted=inserted, sampled=sampled,
    p50_ms=p50 * 1e3, p99_ms=p99 * 1e3, p99_by_p50=p99 / p50,
)  # fmt: skip
