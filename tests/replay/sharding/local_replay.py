"""A sharded replay in one process, for tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from ray.exceptions import ActorDiedError

from replay.messages import Batch, Push
from replay.server import ReplaySpec
from replay.sharding.client import assemble
from replay.sharding.router import ReplayRouter
from replay.sharding.shard import ReplayShard
from replay.table import TableSpec
from replay.types import Layout
from tests.replay.naive import make_segment

LAYOUT = Layout((1,), "float32", 1, (), "int64", 8, 1)
SPEC = ReplaySpec(
    TableSpec(LAYOUT, 96), samples_per_insert=2.0, minimum_size=16, largest_push=8, batch_size=4, batches_per_sample=4
)
ALPHA = 0.6
PRIORITIZED = replace(SPEC, table=TableSpec(LAYOUT, 96, ALPHA))
FREE = {"samples_per_insert": float("inf"), "minimum_size": 1, "batch_size": 64, "batches_per_sample": 512}


class LocalReplay:
    """A router and its shards in this process, called in the same way as by `ShardedReplayClient`."""

    def __init__(self, spec: ReplaySpec, shards: int = 3, **router: object) -> None:
        self.spec, self.shards = spec, shards
        self.router = ReplayRouter(spec, shards=shards, run_seed=0, **router)  # type: ignore[arg-type]
        self.tables = [self.start(shard, 0) for shard in range(shards)]
        self.sequences: dict[int, int] = {}

    def report(self, *arguments: object) -> None:
        self.router.report(*arguments)  # type: ignore[arg-type]

    def start(self, shard: int, incarnation: int) -> ReplayShard:
        return ReplayShard(self.spec, shard=shard, shards=self.shards, router=self, run_seed=0, incarnation=incarnation)

    def push(self, steps: int = 8, worker: int = 0, **content: object) -> Push:
        sequence = self.sequences[worker] = self.sequences.get(worker, -1) + 1
        return Push(worker, 0, sequence, (make_segment(LAYOUT, steps),), **content)  # type: ignore[arg-type]

    def insert(self, push: Push, shard: int | None = None) -> str | None:
        """Insert a push and return None, or return the reason to wait."""
        reply = self.router.reserve(push.worker, push.incarnation, push.sequence, push.steps)
        if reply.wait is not None or reply.finished:
            return reply.wait or "finished"
        turn = reply.shards[(push.worker + push.sequence) % len(reply.shards)] if shard is None else shard
        assert self.tables[turn].insert(push, reply.highest_priority)
        return None

    def sample(self, k: int, batch_size: int) -> Batch:
        plan = self.router.sample(k, batch_size).plan
        assert plan is not None
        parts = {}
        for shard in np.unique(plan.shard).tolist():
            positions = np.flatnonzero(plan.shard == shard)
            batch = self.tables[shard].sample_at(plan.fraction[positions])
            assert batch is not None
            parts[shard] = positions, batch
        return assemble(plan, parts, (k, batch_size))

    def set_priorities(self, rng: np.random.Generator) -> dict[int, float]:
        """Set a priority between 0.1 and 10 for each item; return id -> weight."""
        weights = {}
        for table in self.tables:
            batch = table.sample_at((np.arange(10_000) + 0.5) / 10_000)
            assert batch is not None
            ids = np.unique(batch.ids)
            priorities = 10.0 ** rng.uniform(-1.0, 1.0, len(ids))
            assert table.update_priorities(ids, priorities) == 0
            weights |= dict(zip(ids.tolist(), (priorities**ALPHA).tolist(), strict=True))
        return weights


class InProcessActor:
    """Replacement of a `RemoteActor`: an object in this process, or None if the actor does not exist."""

    def __init__(self, actor: object | None) -> None:
        self.actor = actor

    def call(self, method: str, *arguments: object, **_: object) -> object:
        return getattr(self.actor, method)(*arguments)

    def later(self, method: str, *arguments: object) -> object:
        if self.actor is None:
            raise ValueError("no such actor")
        return self.call(method, *arguments)

    def forget(self) -> None:
        pass


class DeadActor:
    """A dead actor: the result of each call is `ActorDiedError`, as in Ray."""

    def report(self, *_: object) -> Exception:
        return ActorDiedError()
