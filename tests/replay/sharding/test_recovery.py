"""A sharded replay after the exit of a shard or of the router."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from replay.server import Counters
from replay.sharding.reporter import ShardReporter
from replay.sharding.router import ReplayRouter, add_up
from replay.sharding.shard import ReplayShard
from replay.table import shards_of
from replay.types import EpisodeResult
from tests.replay.sharding.local_replay import (
    PRIORITIZED,
    SPEC,
    DeadActor,
    InProcessActor,
    LocalReplay,
)


def test_the_other_shards_go_on_and_nothing_is_owed_for_the_dead_one() -> None:
    replay = LocalReplay(PRIORITIZED)
    for _ in range(12):
        while replay.insert(replay.push()) is not None:
            replay.sample(4, 4)
            replay.sequences[0] -= 1
    before = replay.router.stats()
    replay.router.lost(1, 0)
    assert replay.router.stats() == replace(before, resident_bytes=replay.router.stats().resident_bytes)
    plan = replay.router.sample(1, 4, retry=True).plan
    assert plan is not None
    assert set(plan.share) == {0, 2}
    assert sum(plan.share.values()) == pytest.approx(1.0)
    assert replay.router.stats().counters == before.counters
    assert replay.router.reserve(7, 0, 0, 1).shards in ((0, 2), ())
    replay.router.revoke(7, 0)
    # A report from before the exit arrives late; then the empty successor reports.
    replay.tables[1].stats()
    assert set(replay.router.sample(1, 4, retry=True).plan.share) == {0, 2}  # type: ignore[union-attr]
    replay.tables[1] = replay.start(1, 1)
    assert set(replay.router.sample(1, 4, retry=True).plan.share) == {0, 2}  # type: ignore[union-attr]
    while replay.insert(replay.push(), 1) is not None:
        replay.router.sample(4, 4)
        replay.sequences[0] -= 1
    assert set(replay.router.sample(1, 4, retry=True).plan.share) == {0, 1, 2}  # type: ignore[union-attr]


@pytest.mark.parametrize("dies", ["in the middle", "before the first sample"])
def test_the_limiter_begins_anew_when_too_little_is_left(dies: str) -> None:
    replay = LocalReplay(SPEC, 2)
    assert replay.insert(replay.push(8), 0) is None
    assert replay.insert(replay.push(4), 1) is None
    if dies == "in the middle":
        assert replay.insert(replay.push(8), 0) is None
        replay.sample(1, 4)
    before = replay.router.stats()
    replay.router.lost(0, 0)
    counters = replay.router.stats().counters
    assert counters == before.counters
    wait = replay.router.sample(4, 4).wait
    assert wait == "experience: 4 of the first 16 items inserted"
    replay.tables[0] = replay.start(0, 1)
    assert replay.insert(replay.push(8)) is None
    assert replay.insert(replay.push(4)) is None
    assert replay.router.stats().due == 0.0
    assert replay.router.stats().counters == replace(counters, env_steps=counters.env_steps + 12)
    # One call may run ahead, as at the start of a run, but no burst follows.
    assert replay.router.sample(4, 4).plan is not None
    assert replay.router.sample(1, 4).wait is not None


def test_a_recreated_router_continues_with_the_experience_of_the_shards() -> None:
    replay = LocalReplay(PRIORITIZED)
    for _ in range(3):
        assert replay.insert(replay.push()) is None
    ids = replay.sample(1, 4).ids
    replay.tables[shards_of(ids)[0, 0]].update_priorities(ids[:, 0], np.array([7.0]))
    stats_before = replay.router.stats()
    # The statistics do not include the following push.
    assert replay.insert(replay.push(2)) is None
    carried = replace(stats_before.counters, env_steps=24 + 2)
    replay.router = ReplayRouter(
        PRIORITIZED, shards=3, run_seed=0, incarnation=1, carried=stats_before.counters, counted=stats_before.counted
    )
    assert replay.router.sample(1, 4).wait == "a report from every shard of the replay"
    assert replay.router.reserve(0, 0, 4, 8).wait == "a report from every shard of the replay"
    for _ in range(2):
        parts = [table.stats() for table in replay.tables]
    stats = add_up(replay.router.stats(), parts)
    assert (stats.size, stats.counters) == (26, carried)
    assert replay.router.stats().due == 0.0
    assert replay.router.stats().highest_priority == 7.0
    assert replay.sample(1, 4).size == 26
    assert replay.insert(replay.push()) is None
    assert replay.router.stats().counters == Counters(carried.env_steps + 8, carried.samples + 4, 8 + 8)


def test_a_push_is_reported_again_until_a_router_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(answer: object, _: float) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("replay.sharding.reporter.is_ready", lambda answer: True)
    monkeypatch.setattr("replay.sharding.reporter.fetch", fetch)
    replay = LocalReplay(SPEC, 1)
    router = InProcessActor(replay)
    [shard] = replay.tables = [
        ReplayShard(SPEC, shard=0, shards=1, router=ShardReporter(router), run_seed=0)  # type: ignore[arg-type]
    ]
    pushes = [replay.push(4, episodes=(EpisodeResult(float(n), 4),)) for n in range(4)]
    shard.insert(pushes[0])
    stats_before = replay.router.stats()
    router.actor = DeadActor()  # the calls succeed, but their results raise
    shard.insert(pushes[1])
    router.actor = None
    shard.insert(pushes[2])
    replay.router = ReplayRouter(
        SPEC, shards=1, run_seed=0, carried=stats_before.counters, counted=stats_before.counted
    )
    router.actor = replay
    shard.insert(pushes[3])
    assert replay.router.stats().counters.env_steps == 16
    assert [episode.episode_return for episode in replay.router.drain_episodes()] == [1.0, 2.0, 3.0]
    assert replay.router.reserve(0, 0, 2, 4).repeated
