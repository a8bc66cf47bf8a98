"""A sharded replay in separate processes: pushes alternate between shards, and one shard may die."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray

from replay.errors import LayoutMismatch
from replay.messages import Push
from replay.remote import RemoteActor
from replay.server import ReplayStats
from replay.sharding.client import ShardedReplayClient
from replay.sharding.reporter import ShardReporter
from replay.sharding.router import ReplayRouterActor, add_up
from replay.sharding.shard import ReplayShardActor
from replay.table import shards_of
from replay.types import EpisodeResult
from tests.replay.naive import make_segment
from tests.replay.sharding.local_replay import LAYOUT, PRIORITIZED

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
SPEC = replace(PRIORITIZED, samples_per_insert=float("inf"))


class Group:
    """A router and two shards, under unique names."""

    def __init__(self, test: str) -> None:
        self.name = f"{test}-{os.getpid()}"
        self.handles: dict[str, Any] = {}
        self.start_router()
        for shard in range(2):
            self.start_shard(shard)
        shards = [RemoteActor(f"{self.name}-{shard}") for shard in range(2)]
        self.client = ShardedReplayClient(RemoteActor(self.name), shards, deadline_seconds=60.0)

    def start_router(self, incarnation: int = 0) -> None:
        self._start("router", ReplayRouterActor, self.name, shards=2, incarnation=incarnation)

    def start_shard(self, shard: int, incarnation: int = 0) -> None:
        router = ShardReporter(RemoteActor(self.name))
        name = f"{self.name}-{shard}"
        options = {"shard": shard, "shards": 2, "router": router, "incarnation": incarnation}
        self._start(str(shard), ReplayShardActor, name, **options)

    def _start(self, key: str, actor: Any, name: str, **options: Any) -> None:
        end = time.monotonic() + 30.0
        while True:
            try:
                self.handles[key] = actor.options(name=name).remote(SPEC, run_seed=0, **options)
                return
            except ValueError:  # Ray keeps a dead actor's name for a second
                assert time.monotonic() < end
                time.sleep(0.1)

    def stats(self, *parts: str) -> ReplayStats:
        shards = [ray.get(self.handles[part].stats.remote(), timeout=60) for part in parts]
        return add_up(ray.get(self.handles["router"].stats.remote(), timeout=60), shards)

    def until(self, condition: Callable[[ReplayStats], bool]) -> ReplayStats:
        """Wait until the replay's statistics satisfy `condition`, and return them; reports arrive with a delay."""
        end = time.monotonic() + 30.0
        while not condition(stats := self.stats("0", "1")):
            assert time.monotonic() < end, stats
            time.sleep(0.02)
        return stats

    def push(self, sequence: int) -> bool:
        push = Push(0, 0, sequence, (make_segment(LAYOUT, 8, value=sequence),))
        reply = self.client.insert(push)
        assert reply is not None
        return reply.accepted


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    group = Group(request.node.name)
    yield group
    for handle in group.handles.values():
        ray.kill(handle)


def test_one_shard_may_die_and_the_others_go_on(group: Group) -> None:
    assert [group.push(sequence) for sequence in range(6)] == [True] * 6
    stats = group.until(lambda s: s.counters.env_steps == 48)
    assert (stats.size, stats.waiting) == (48, {})
    reply = group.client.sample(4, 4)
    assert reply is not None
    assert reply.batch is not None
    # Push n went to shard n % 2.
    shards, values = shards_of(reply.batch.ids), reply.batch.observation[..., 0]
    np.testing.assert_array_equal(shards, values % 2)
    assert set(shards.ravel().tolist()) == {0, 1}
    group.client.update_priorities(reply.batch.ids, np.where(shards == 0, 5.0, 9.0))
    assert group.until(lambda s: s.highest_priority == 9.0).stale_updates == 0

    ray.kill(group.handles["1"])
    assert [group.push(sequence) for sequence in (6, 7)] == [True, True]
    after = group.client.sample(4, 4)
    assert after is not None
    assert after.batch is not None
    assert (shards_of(after.batch.ids) == 0).all()
    assert after.batch.size == 40
    group.start_shard(1, incarnation=1)
    end = time.monotonic() + 30.0
    while ray.get(group.handles["router"].reserve.remote(5, 0, 0, 1)).shards != (0, 1):
        group.stats("1")
        assert time.monotonic() < end
    assert [group.push(sequence) for sequence in range(8, 12)] == [True] * 4
    stats = group.until(lambda s: s.counters.env_steps == 96)
    # The first shard is full, with 48 transitions.
    assert (stats.size, stats.counters.samples) == (48 + 16, 32)
    # Ids of the dead shard are stale in its successor; push 0, in the first shard, was evicted.
    group.client.update_priorities(reply.batch.ids, np.full((4, 4), 2.0))
    group.until(lambda s: s.stale_updates == int(((shards == 1) | (values == 0)).sum()))


def test_a_recreated_router_gets_reports_and_a_layout_mismatch_keeps_its_type(group: Group) -> None:
    for sequence in range(4):
        group.push(sequence)
    wrong = Push(1, 0, 0, (make_segment(replace(LAYOUT, frame_shape=(2,)), 8),))
    with pytest.raises(LayoutMismatch, match=r"frames must have shape \(9, 1\)"):
        group.client.insert(wrong)
    ray.kill(group.handles["router"])
    late = Push(0, 0, 4, (make_segment(LAYOUT, 8, value=4),), (EpisodeResult(3.0, 8),))
    assert ray.get(group.handles["0"].insert.remote(late))  # the shard reports the push, but no router runs
    group.start_router(incarnation=1)
    end = time.monotonic() + 30.0
    while ray.get(group.handles["router"].sample.remote(1, 1)).plan is None:
        group.stats("0", "1")  # as the coordinator does periodically
        assert time.monotonic() < end
    reply = group.client.sample(1, 4)
    assert reply is not None
    assert reply.batch is not None
    assert reply.batch.size == 40
    assert group.push(5)
    group.until(lambda s: s.counters.env_steps == 48)
    assert ray.get(group.handles["router"].drain_episodes.remote()) == (EpisodeResult(3.0, 8),)
