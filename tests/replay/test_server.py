"""`ReplayServer` as a plain object: replies, counters, the end of a run, and waiting callers."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace

import numpy as np
import pytest

from replay import push_ledger
from replay.errors import ConfigurationError, LayoutMismatch, NotEnoughMemory
from replay.messages import Batch, InsertReply, Push, SampleReply
from replay.server import Counters, ReplayServer, ReplaySpec, ReplayStats
from replay.table import TableSpec
from replay.types import EpisodeResult, Layout, Segment
from tests.replay.naive import make_segment

LAYOUT = Layout((3,), "float32", 1, (), "int64", 8, 1)
# The limiter's tolerance is one largest push, and one largest sample call: 16 samples.
SPEC = ReplaySpec(
    TableSpec(LAYOUT, 64), samples_per_insert=2.0, minimum_size=8, largest_push=8, batch_size=4, batches_per_sample=4
)
PRIORITIZED = replace(SPEC, table=TableSpec(LAYOUT, 64, 0.6))


def push(sequence: int, steps: int = 8, *, worker: int = 0, incarnation: int = 0, value: int = 0) -> Push:
    return Push(worker, incarnation, sequence, (make_segment(LAYOUT, steps, value=value),))


def filled_server(pushes: int = 1, spec: ReplaySpec = SPEC, **options: object) -> ReplayServer:
    server = ReplayServer(spec, run_seed=0, **options)  # type: ignore[arg-type]
    for sequence in range(pushes):
        assert server.insert(push(sequence)).accepted
    return server


def batch_of(reply: SampleReply) -> Batch:
    assert reply.batch is not None, reply
    return reply.batch


# Inserts


def test_an_accepted_push_is_in_the_table_and_counted() -> None:
    server = ReplayServer(SPEC, run_seed=0)
    segments = (make_segment(LAYOUT, 3, value=1), make_segment(LAYOUT, 5, value=2))
    assert server.insert(Push(0, 0, 0, segments)) == InsertReply(env_steps=8, accepted=True)
    stats = server.stats()
    assert (stats.size, stats.counters) == (8, Counters(env_steps=8))
    assert set(batch_of(server.sample(4, 4)).observation.ravel().tolist()) == {1.0, 2.0}


def test_every_worker_hears_the_steps_of_all_workers() -> None:
    server = ReplayServer(SPEC, run_seed=0)
    replies = [server.insert(push(0, steps, worker=worker)) for worker, steps in enumerate((3, 1, 6))]
    assert [reply.env_steps for reply in replies] == [3, 4, 10]


def test_a_push_without_segments_delivers_its_episodes() -> None:
    server = filled_server(2)
    reply = server.insert(Push(0, 0, 2, episodes=(EpisodeResult(7.0, 70),)))
    assert reply == InsertReply(env_steps=16, accepted=True)
    assert server.drain_episodes() == (EpisodeResult(7.0, 70),)


def test_a_repeat_is_acknowledged_and_ignored() -> None:
    server = ReplayServer(SPEC, run_seed=0)
    first = replace(push(0, 4), episodes=(EpisodeResult(1.0, 4),))
    assert server.insert(first).accepted
    assert server.insert(first) == InsertReply(env_steps=4, repeated=True)
    assert server.insert(push(1, 2)).accepted
    assert server.insert(first).repeated  # later, too
    stats = server.stats()
    assert (stats.size, stats.counters.env_steps, stats.repeated_pushes) == (6, 6, 2)
    assert len(server.drain_episodes()) == 1


def test_the_same_sequence_of_another_worker_or_a_later_incarnation_is_no_repeat() -> None:
    server = ReplayServer(SPEC, run_seed=0)
    assert server.insert(push(3, 1)).accepted
    assert server.insert(push(3, 1, worker=1)).accepted
    assert server.insert(push(0, 1, incarnation=1)).accepted
    assert server.insert(push(4, 1, incarnation=0)).repeated  # of the predecessor, after a push of its successor
    assert server.stats().size == 3


def test_what_had_to_wait_or_did_not_fit_is_no_repeat_when_it_comes_again() -> None:
    server = filled_server(2)
    assert server.insert(push(2)).wait
    assert server.insert(push(2)).wait
    server.sample(4, 4)
    assert server.insert(push(2)).accepted
    server.sample(4, 4)
    with pytest.raises(LayoutMismatch):
        server.insert(replace(push(3), segments=(replace(push(3).segments[0], age=np.ones(8, np.uint8)),)))
    assert server.insert(push(3)).accepted


def test_a_push_with_one_segment_that_does_not_fit_is_refused_whole() -> None:
    server = ReplayServer(SPEC, run_seed=0)
    good, wrong = make_segment(LAYOUT, 4), make_segment(replace(LAYOUT, frame_dtype="float64"), 4)
    with pytest.raises(LayoutMismatch, match=r"frames must have shape \(5, 3\) and dtype float32"):
        server.insert(Push(0, 0, 0, (good, wrong), episodes=(EpisodeResult(1.0, 1),)))
    stats = server.stats()
    assert (stats.size, stats.counters.env_steps) == (0, 0)
    assert server.drain_episodes() == ()


def test_a_push_larger_than_declared_is_refused_because_it_might_wait_for_ever() -> None:
    server = ReplayServer(SPEC, run_seed=0)
    segments: tuple[Segment, ...] = (make_segment(LAYOUT, 8), make_segment(LAYOUT, 1))
    with pytest.raises(ValueError, match="a push must have at most 8 transitions, got 9"):
        server.insert(Push(0, 0, 0, segments))
    assert server.stats().size == 0


# Samples


@pytest.mark.parametrize(("k", "batch_size"), [(5, 4), (1, 17), (0, 4), (1, 0), (-1, -4)])
def test_a_sample_call_of_a_size_not_declared_is_refused(k: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"a sample call must sample 1 to 16 transitions, got {k} x {batch_size}"):
        filled_server().sample(k, batch_size)


def test_a_sample_is_counted_and_has_its_shape() -> None:
    server = filled_server()
    batch = batch_of(server.sample(2, 4))
    assert batch.observation.shape == (2, 4, 3)
    assert batch.size == 8
    stats = server.stats()
    assert (stats.counters.samples, stats.due) == (8, -8.0)


def test_new_priorities_reach_the_table_and_stale_ones_are_counted() -> None:
    server = filled_server(spec=PRIORITIZED)
    ids = batch_of(server.sample(1, 4)).ids
    assert server.update_priorities(ids, np.full((1, 4), 5.0)) == 0
    assert server.stats().highest_priority == 5.0
    assert server.update_priorities(ids + 1000, np.full((1, 4), 7.0)) == 4
    stats = server.stats()
    assert (stats.stale_updates, stats.highest_priority) == (4, 5.0)


def test_servers_of_another_incarnation_draw_otherwise_and_give_out_other_ids() -> None:
    batches = [
        batch_of(filled_server(spec=PRIORITIZED, incarnation=incarnation).sample(4, 4)) for incarnation in (0, 0, 1)
    ]
    assert batches[0].ids.tolist() == batches[1].ids.tolist()
    assert not set(batches[0].ids.ravel().tolist()) & set(batches[2].ids.ravel().tolist())
    server = filled_server(spec=PRIORITIZED, incarnation=1)
    assert server.update_priorities(batches[0].ids, np.ones((4, 4))) == 16


# Waiting


def test_both_sides_hear_whom_they_wait_for() -> None:
    server = ReplayServer(SPEC, run_seed=0)
    assert server.sample(1, 4) == SampleReply(wait="experience: 0 of the first 8 items inserted")
    assert server.insert(push(0)).accepted
    assert server.insert(push(1)).accepted
    assert server.insert(push(2)) == InsertReply(
        env_steps=16,
        wait="the learner: an insert of 8 would leave 32 samples due, more than the tolerance of 16",
    )
    for _ in range(2):
        assert server.sample(4, 4).batch is not None
    assert server.sample(1, 4).wait == (
        "experience: a sample of 4 would exceed the samples due after 16 inserts by 20, more than the tolerance of 16"
    )
    stats = server.stats()
    assert (stats.size, stats.counters) == (16, Counters(env_steps=16, samples=32, counted_inserts=8))


def test_stats_show_who_waits_until_they_proceed() -> None:
    server = ReplayServer(SPEC, run_seed=0)
    server.sample(1, 4)
    assert server.stats().waiting == {"learner": "experience: 0 of the first 8 items inserted"}
    for sequence in (0, 1):
        server.insert(push(sequence, worker=3))
    server.insert(push(2, worker=3))
    server.insert(push(0, worker=5))
    waiting = server.stats().waiting
    assert set(waiting) == {"learner", "worker-3", "worker-5"}
    assert waiting["worker-3"].startswith("the learner: an insert of 8")
    server.sample(4, 4)
    assert set(server.stats().waiting) == {"worker-3", "worker-5"}
    server.insert(push(2, worker=3))
    assert set(server.stats().waiting) == {"worker-5"}


def test_a_caller_that_gave_up_no_longer_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ReplayServer(SPEC, run_seed=0)
    server.sample(1, 4)
    monkeypatch.setattr(push_ledger, "_WAIT_EXPIRES_SECONDS", 0.0)
    assert server.stats().waiting == {}


# The end of a run


def test_a_run_is_finished_when_it_has_its_steps() -> None:
    server = ReplayServer(SPEC, run_seed=0, max_env_steps=12)
    assert server.insert(push(0)) == InsertReply(env_steps=8, accepted=True)
    assert server.insert(push(1)) == InsertReply(env_steps=16, accepted=True)  # a push is not split
    assert server.insert(push(2)) == InsertReply(env_steps=16, finished=True)
    assert server.insert(push(1)).finished
    assert server.stats().size == 16


def test_a_finished_run_hands_out_what_is_due_and_no_more() -> None:
    server = filled_server(2, max_env_steps=16)
    assert server.stats().due == 16.0
    sampled = 0
    while not (reply := server.sample(1, 4)).finished:
        sampled += batch_of(reply).ids.size
    assert sampled == 16
    assert reply == SampleReply(finished=True)
    assert server.stats().counters.samples_per_insert == SPEC.samples_per_insert


def test_a_finished_run_does_not_begin_a_sample_that_is_only_partly_due() -> None:
    server = filled_server(2, max_env_steps=16)
    assert server.sample(3, 4).batch is not None
    assert server.sample(2, 4).finished
    assert server.sample(1, 4).batch is not None
    assert server.sample(1, 4).finished


def test_finish_ends_a_run_early() -> None:
    server = filled_server(1)
    server.finish()
    assert server.insert(push(1)) == InsertReply(env_steps=8, finished=True)
    assert server.sample(1, 4).finished  # no inserts beyond the minimum size, so no samples are due
    assert ReplayServer(SPEC, run_seed=0, max_env_steps=0).sample(1, 4).finished


def test_a_finished_server_that_came_back_empty_does_not_keep_the_learner_waiting() -> None:
    server = ReplayServer(SPEC, run_seed=0, incarnation=1, carried=Counters(16, 4, 8), max_env_steps=16)
    assert server.sample(1, 4) == SampleReply(finished=True)
    assert server.insert(push(0)) == InsertReply(env_steps=16, finished=True)


def test_nobody_is_shown_waiting_for_a_finished_run() -> None:
    server = filled_server(2)
    server.insert(push(2))
    for _ in range(2):
        server.sample(4, 4)
    server.sample(4, 4)
    server.finish()
    server.insert(push(2))
    server.sample(4, 4)
    assert server.stats().waiting == {}


def test_with_an_infinite_ratio_nobody_waits_and_a_finished_run_owes_nothing() -> None:
    server = ReplayServer(replace(SPEC, samples_per_insert=float("inf")), run_seed=0, max_env_steps=800)
    for sequence in range(99):
        assert server.insert(push(sequence)).accepted
    for _ in range(100):
        assert server.sample(4, 4).batch is not None
    assert server.insert(push(99)).accepted
    assert server.sample(4, 4).finished


# Re-creation


def test_totals_are_carried_over_and_the_limiter_starts_anew_without_a_burst() -> None:
    carried = Counters(env_steps=1000, samples=1900, counted_inserts=992)
    server = ReplayServer(SPEC, run_seed=0, incarnation=1, carried=carried, highest_priority=3.0)
    assert server.stats().counters == carried
    assert server.stats().highest_priority == 3.0
    assert server.stats().due == -16.0  # the minimum size comes first
    assert server.sample(1, 4).wait == "experience: 0 of the first 8 items inserted"
    assert server.insert(push(0)).env_steps == 1008
    assert server.stats().counters == replace(carried, env_steps=1008)
    sampled = 0
    while server.sample(1, 4).wait is None:
        sampled += 4
    assert sampled == 16  # the tolerance, not the 84 that the run as a whole is behind
    inserted, sequence = 0, 1
    while server.insert(push(sequence)).wait is None:
        inserted, sequence = inserted + 8, sequence + 1
    assert inserted == 16
    assert server.stats().counters == Counters(1024, 1916, 1008)


def test_the_ratio_is_kept_through_many_deaths() -> None:
    counters = Counters()
    for incarnation in range(20):
        server = ReplayServer(SPEC, run_seed=0, incarnation=incarnation, carried=counters)
        for sequence in range(40):
            while server.insert(push(sequence)).wait is not None:
                assert server.sample(4, 4).batch is not None
        while server.stats().due >= 16:
            server.sample(4, 4)
        counters = server.stats().counters
    assert counters.env_steps == 20 * 40 * 8
    assert counters.samples_per_insert == pytest.approx(SPEC.samples_per_insert, rel=0.05)


def test_carried_steps_count_towards_the_end_of_the_run() -> None:
    server = ReplayServer(SPEC, run_seed=0, incarnation=1, carried=Counters(env_steps=90), max_env_steps=100)
    assert server.insert(push(0)).accepted
    assert server.insert(push(1)).accepted
    assert server.insert(push(2)).finished


def test_before_anything_counts_the_ratio_is_zero() -> None:
    assert Counters(env_steps=5).samples_per_insert == 0.0
    assert Counters(5, 6, 4).samples_per_insert == 1.5


# Episodes, stats, bad input


def test_episodes_are_drained_once_in_order_and_kept_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_ledger, "_MAX_EPISODES", 5)
    server = ReplayServer(SPEC, run_seed=0)
    results = tuple(EpisodeResult(float(i), i) for i in range(8))
    server.insert(Push(0, 0, 0, episodes=results[:2]))
    server.insert(Push(1, 0, 0, episodes=results[2:3]))
    assert server.drain_episodes() == results[:3]
    assert server.drain_episodes() == ()
    server.insert(Push(0, 0, 1, episodes=results))
    assert server.drain_episodes() == results[3:]


def test_stats_tell_the_truth() -> None:
    server = filled_server(2, spec=PRIORITIZED)
    for sequence in range(2, 12):
        server.sample(4, 4)
        assert server.insert(push(sequence)).accepted
    stats = server.stats()
    assert isinstance(stats, ReplayStats)
    assert (stats.size, stats.capacity, stats.evicted) == (64, 64, 32)
    assert stats.counters == Counters(env_steps=96, samples=160, counted_inserts=88)
    assert stats.due == 2.0 * 88 - 160
    assert stats.pid == os.getpid()
    assert stats.bytes == server._table.bytes > 64 * (3 * 4 + 26)
    assert 10 * 2**20 < stats.resident_bytes < 2**36


def test_stats_are_plain_json() -> None:
    server = filled_server(2)
    server.sample(3, 4)
    server.insert(push(2))
    plain = asdict(server.stats())
    assert json.loads(json.dumps(plain)) == plain | {"counted": []}, "only an empty tuple becomes a list"
    assert plain["counters"] == {"env_steps": 16, "samples": 12, "counted_inserts": 8}


@pytest.mark.parametrize("name", ["minimum_size", "largest_push", "batch_size", "batches_per_sample"])
def test_a_spec_names_the_count_that_is_not_positive(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} must be positive, got 0"):
        replace(SPEC, **{name: 0})


def test_a_spec_refuses_what_could_never_make_progress() -> None:
    with pytest.raises(ConfigurationError, match="a replay of 64 transitions is smaller than a batch of 65"):
        replace(SPEC, batch_size=65)
    with pytest.raises(ConfigurationError, match="a replay of 64 transitions is smaller than one push of 65"):
        replace(SPEC, largest_push=65)
    with pytest.raises(ConfigurationError, match=r"waits for 65 transitions.* holds only 64.*could never start"):
        replace(SPEC, minimum_size=65)
    with pytest.raises(ConfigurationError, match="samples_per_insert must be positive, got 0"):
        replace(SPEC, samples_per_insert=0.0)


def test_a_server_that_the_machine_cannot_hold_is_refused() -> None:
    with pytest.raises(NotEnoughMemory, match=r"needs .* GiB, but .* GiB are available"):
        ReplayServer(replace(SPEC, table=TableSpec(replace(LAYOUT, frame_shape=(10**6,)), 10**6)), run_seed=0)
