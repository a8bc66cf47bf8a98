"""The replay router: one rate limiter for all shards, reservations, reports, statistics, and invalid input."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.errors import ConfigurationError, LayoutMismatch, NotEnoughMemory
from replay.messages import Push
from replay.push_ledger import PushLedger
from replay.server import Counters
from replay.sharding.client import ShardedReplayClient
from replay.sharding.router import ReplayRouter, add_up
from replay.sharding.shard import ReplayShard
from replay.types import EpisodeResult, Moments
from tests.replay.naive import make_segment
from tests.replay.sharding.local_replay import (
    LAYOUT,
    PRIORITIZED,
    SPEC,
    InProcessActor,
    LocalReplay,
)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 6))
def test_the_ratio_is_that_of_one_limiter_however_pushes_overtake_each_other(
    seed: int, shards: int, workers: int
) -> None:
    rng = np.random.default_rng(seed)
    replay = LocalReplay(SPEC, shards, max_env_steps=400)
    tolerance = SPEC.limiter().tolerance
    in_transit: dict[int, tuple[Push, int]] = {}
    for _ in range(4_000):
        caller = int(rng.integers(workers + 1))
        if caller == workers:
            reply = replay.router.sample(4, 4)
            if reply.finished:
                break
        elif caller in in_transit:
            push, shard = in_transit.pop(caller)
            assert replay.tables[shard].insert(push)
        else:
            push = Push(caller, 0, replay.sequences.get(caller, 0), (make_segment(LAYOUT, int(rng.integers(1, 9))),))
            reservation = replay.router.reserve(caller, 0, push.sequence, push.steps)
            if reservation.shards:
                replay.sequences[caller] = push.sequence + 1
                in_transit[caller] = push, int(rng.integers(shards))
        stats = replay.router.stats()
        assert stats.due <= tolerance
        if stats.counters.counted_inserts:
            assert stats.due >= -tolerance
    else:
        pytest.fail("the run never ended")
    counters = replay.router.stats().counters
    assert 400 <= counters.env_steps < 408
    assert counters.counted_inserts == counters.env_steps - 16
    assert abs(counters.samples - 2 * counters.counted_inserts) <= tolerance


def test_a_push_counts_once_whatever_is_said_twice() -> None:
    replay = LocalReplay(SPEC)
    push = replay.push(5, episodes=(EpisodeResult(3.0, 5),), returns=Moments.of(np.arange(5.0)))
    reservation = [replay.router.reserve(0, 0, 0, 5) for _ in range(2)]
    assert reservation[0] == reservation[1]
    assert [replay.tables[1].insert(push), replay.tables[1].insert(push)] == [True, False]
    assert replay.router.reserve(0, 0, 0, 5).repeated
    # A second shard inserts the push too, because the worker assumed that the first one had died.
    assert replay.tables[2].insert(push)
    stats = add_up(replay.router.stats(), [table.stats() for table in replay.tables])
    assert stats.counters == Counters(env_steps=5)
    assert stats.repeated_pushes == 3
    assert replay.router.drain_episodes() == (EpisodeResult(3.0, 5),)
    assert replay.router.drain_episodes() == ()


class DelayedReports:
    """Receives the reports of a shard, and keeps them instead of sending them to the router."""

    def __init__(self) -> None:
        self.reports: list[tuple[object, ...]] = []

    def report(self, *arguments: object) -> None:
        self.reports.append(arguments)


def delayed() -> tuple[LocalReplay, list[DelayedReports]]:
    """Return a replay of three shards whose reports do not reach the router."""
    replay, delayed_reports = LocalReplay(SPEC), [DelayedReports() for _ in range(3)]
    for table, reports in zip(replay.tables, delayed_reports, strict=True):
        table._router = reports
    return replay, delayed_reports


@pytest.mark.parametrize("router_dies", [False, True])
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_the_reports_of_shards_may_overtake_each_other(order: tuple[int, ...], router_dies: bool) -> None:
    replay, delayed_reports = delayed()
    for number in range(3):
        content = {"episodes": (EpisodeResult(float(number), 8),), "returns": Moments.of(np.full(8, float(number)))}
        assert replay.insert(replay.push(**content), number) is None
    if router_dies:
        stats_before = replay.router.stats()
        replay.router = ReplayRouter(
            SPEC, shards=3, run_seed=0, carried=stats_before.counters, counted=stats_before.counted
        )
    for number in (*order, *order):  # the reporter sends an unconfirmed report again
        replay.report(*delayed_reports[number].reports[0])
    stats = replay.router.stats()
    assert stats.counters.env_steps == 24
    assert stats.repeated_pushes == 3
    assert replay.router.reserve(0, 0, 2, 8).repeated
    assert replay.router._ledger.returns.count == 24
    assert sorted(episode.episode_return for episode in replay.router.drain_episodes()) == [0.0, 1.0, 2.0]


def test_the_report_of_a_workers_last_push_may_arrive_after_that_of_its_successors_first() -> None:
    replay, delayed_reports = delayed()
    assert replay.insert(replay.push(4), 0) is None
    successor = Push(0, 1, 0, (make_segment(LAYOUT, 8),), (EpisodeResult(3.0, 8),))
    assert replay.insert(successor, 1) is None
    replay.report(*delayed_reports[1].reports[0])
    replay.report(*delayed_reports[0].reports[0])
    assert replay.router.stats().counters.env_steps == 12
    assert replay.router.reserve(0, 1, 0, 8).repeated


def test_of_a_long_silence_what_comes_too_late_to_be_told_from_a_repeat_does_not_count() -> None:
    ledger = PushLedger()
    for sequence in range(1, 65):
        assert not ledger.has_accepted(Push(0, 0, sequence))
        ledger.accept(Push(0, 0, sequence))
    assert [ledger.has_accepted(Push(0, 0, sequence)) for sequence in (0, 1, 64, 65)] == [True, True, True, False]
    assert not ledger.has_accepted(Push(1, 0, 0))
    assert ledger.repeated_pushes == 3


def test_the_reservation_of_a_dead_worker_is_released() -> None:
    replay = LocalReplay(SPEC)
    for _ in range(2):
        assert replay.insert(replay.push()) is None
    assert replay.router.reserve(1, 0, 0, 8).shards
    assert "of 8 would leave 32 samples due" in (replay.insert(replay.push()) or "")
    replay.router.revoke(1, 0)
    # A call of the dead worker that the router serves only now reserves no steps.
    assert replay.router.reserve(1, 0, 1, 8).repeated
    assert replay.insert(Push(0, 0, 2, (make_segment(LAYOUT, 8),))) is None
    assert replay.router.stats().waiting == {}
    replay.sample(4, 4)
    assert replay.router.reserve(1, 1, 0, 8).shards


def test_the_reservation_of_an_unsent_push_is_released_and_the_next_push_is_reserved() -> None:
    replay = LocalReplay(SPEC)
    for _ in range(2):
        assert replay.insert(replay.push()) is None
    assert replay.router.reserve(1, 0, 5, 8).shards
    replay.router.revoke(1, 0, 4)
    assert "of 8 would leave 32 samples due" in (replay.insert(replay.push()) or "")
    replay.router.revoke(1, 0, 5)
    assert replay.router.reserve(1, 0, 6, 8).shards


def test_the_reservations_of_a_process_with_many_workers_are_released_together() -> None:
    replay = LocalReplay(SPEC)
    for _ in range(2):
        assert replay.insert(replay.push()) is None
    assert replay.router.reserve(1_000_007, 0, 0, 8).shards
    replay.router.revoke_from(1_000_008, 4)
    assert "of 8 would leave 32 samples due" in (replay.insert(replay.push()) or "")
    replay.router.revoke_from(1_000_000, 4)
    # Calls of that process that the router serves only now reserve no steps.
    assert replay.router.reserve(1_000_001, 4, 0, 8).repeated
    assert replay.insert(Push(0, 0, 2, (make_segment(LAYOUT, 8),))) is None
    replay.sample(4, 4)
    assert replay.router.reserve(1_000_001, 5, 0, 8).shards


def test_the_reservation_of_a_stopped_worker_is_released() -> None:
    replay = LocalReplay(SPEC, 2, max_env_steps=8)
    client = ShardedReplayClient(InProcessActor(replay.router), [InProcessActor(None), InProcessActor(None)])  # type: ignore[arg-type, list-item]
    stop = threading.Event()
    stop.set()
    assert client.insert(replay.push(), stop=stop) is None
    assert replay.router.reserve(1, 0, 0, 8).wait is None


def test_a_push_that_does_not_fit_is_refused_whole() -> None:
    replay = LocalReplay(SPEC)
    segments = (make_segment(LAYOUT, 4), make_segment(replace(LAYOUT, frame_shape=(2,)), 4))
    with pytest.raises(LayoutMismatch, match=r"frames must have shape \(5, 1\)"):
        replay.tables[0].insert(Push(0, 0, 0, segments))
    with pytest.raises(ValueError, match="a push must have at most 8 transitions, got 9"):
        replay.router.reserve(0, 0, 0, 9)
    with pytest.raises(ValueError, match="a sample call must sample 1 to 16 transitions, got 5 x 4"):
        replay.router.sample(5, 4)
    assert add_up(replay.router.stats(), [table.stats() for table in replay.tables]).size == 0


def test_the_run_ends_when_its_steps_are_accepted() -> None:
    replay = LocalReplay(replace(SPEC, minimum_size=8), max_env_steps=16)
    assert replay.router.reserve(1, 0, 0, 8).shards
    assert replay.router.reserve(2, 0, 0, 8).shards
    assert replay.router.reserve(3, 0, 0, 8).wait == "reserved pushes, which contain the run's last steps"
    for worker in (1, 2):
        assert replay.tables[worker].insert(replay.push(worker=worker))
    assert replay.router.reserve(3, 0, 0, 8).finished
    replay.sample(4, 4)
    assert replay.router.sample(1, 4).finished


def test_stats_add_up_and_capacity_is_divided() -> None:
    spec = replace(PRIORITIZED, table=replace(PRIORITIZED.table, capacity=98))
    assert [spec.table.shard(index, 4).capacity for index in range(4)] == [25, 25, 24, 24]
    replay = LocalReplay(spec)
    replay.insert(replay.push())
    replay.insert(replay.push())
    replay.sample(1, 4)
    parts = [table.stats() for table in replay.tables]
    stats = add_up(replay.router.stats(), parts)
    assert (stats.capacity, stats.size, stats.counters) == (98, 16, Counters(16, 4, 0))
    assert stats.bytes == sum(part.bytes for part in parts) > 0
    ages = [part.sample_age for part in parts if part.sample_age is not None]
    assert stats.sample_age == pytest.approx(3 * sum(ages) / len(ages))
    assert 1.0 <= ages[0] <= 8.0


def test_shards_that_begin_together_need_memory_for_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replay.table.available_memory", lambda: SPEC.table.expected_bytes - 1)
    replay = LocalReplay(SPEC)  # each shard alone fits
    with pytest.raises(NotEnoughMemory, match="a replay of 96 transitions needs"):
        ReplayShard(SPEC, shard=0, shards=3, router=replay, run_seed=0, with_others=True)


def test_what_cannot_be_divided_is_refused() -> None:
    SPEC.check_shards(12)
    with pytest.raises(ConfigurationError, match=r"96 transitions has shards of 7 with replay_shards 13.*push of 8"):
        SPEC.check_shards(13)
    with pytest.raises(ConfigurationError, match=r"replay_shards must lie in \[1, 256\], got 257"):
        SPEC.check_shards(257)
