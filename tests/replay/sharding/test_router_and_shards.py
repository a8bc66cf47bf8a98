"""A replay in shards, as the plain objects it is made of: one table's distribution, one limiter, deaths, repeats."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError

from replay.errors import ConfigurationError, LayoutMismatch, NotEnoughMemory
from replay.messages import Batch, Push
from replay.push_ledger import PushLedger
from replay.server import Counters, ReplaySpec
from replay.sharding.client import ShardedReplayClient, assemble
from replay.sharding.reporter import ShardReporter
from replay.sharding.router import ReplayRouter, add_up
from replay.sharding.shard import ReplayShard
from replay.table import TableSpec, shards_of
from replay.types import Array, EpisodeResult, Layout, Moments
from tests.replay.naive import make_segment
from tests.replay.statistics import FALSE_ALARM, chi_square_p

LAYOUT = Layout((1,), "float32", 1, (), "int64", 8, 1)
SPEC = ReplaySpec(
    TableSpec(LAYOUT, 96), samples_per_insert=2.0, minimum_size=16, largest_push=8, batch_size=4, batches_per_sample=4
)
ALPHA = 0.6
PRIORITIZED = replace(SPEC, table=TableSpec(LAYOUT, 96, ALPHA))
FREE = {"samples_per_insert": float("inf"), "minimum_size": 1, "batch_size": 64, "batches_per_sample": 512}


class Whole:
    """A desk and its shards in this process; pushes and draws go the way that `ShardedReplayClient` sends them."""

    def __init__(self, spec: ReplaySpec, shards: int = 3, **router: object) -> None:
        self.spec, self.shards = spec, shards
        self.router = ReplayRouter(spec, shards=shards, run_seed=0, **router)  # type: ignore[arg-type]
        self.tables = [self.start(shard, 0) for shard in range(shards)]
        self.sequences: dict[int, int] = {}

    def report(self, *word: object) -> None:
        self.router.report(*word)  # type: ignore[arg-type]

    def start(self, shard: int, incarnation: int) -> ReplayShard:
        return ReplayShard(self.spec, shard=shard, shards=self.shards, router=self, run_seed=0, incarnation=incarnation)

    def push(self, steps: int = 8, worker: int = 0, **content: object) -> Push:
        sequence = self.sequences[worker] = self.sequences.get(worker, -1) + 1
        return Push(worker, 0, sequence, (make_segment(LAYOUT, steps),), **content)  # type: ignore[arg-type]

    def insert(self, push: Push, shard: int | None = None) -> str | None:
        """Insert and return None, or the reason to wait."""
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
            where = np.flatnonzero(plan.shard == shard)
            batch = self.tables[shard].draw(plan.fraction[where])
            assert batch is not None
            parts[shard] = where, batch
        return assemble(plan, parts, (k, batch_size))

    def set_priorities(self, rng: np.random.Generator) -> dict[int, float]:
        """Give every item a priority between 0.1 and 10; return id -> weight."""
        weights = {}
        for table in self.tables:
            batch = table.draw((np.arange(10_000) + 0.5) / 10_000)
            assert batch is not None
            ids = np.unique(batch.ids)
            priorities = 10.0 ** rng.uniform(-1.0, 1.0, len(ids))
            assert table.update_priorities(ids, priorities) == 0
            weights |= dict(zip(ids.tolist(), (priorities**ALPHA).tolist(), strict=True))
        return weights


def uneven(spec: ReplaySpec) -> Whole:
    """Three shards with 8, 24 and 27 transitions."""
    whole = Whole(replace(spec, **FREE))  # type: ignore[arg-type]
    for steps, shard in ((8, 0), (8, 1), (8, 1), (8, 1), (8, 2), (8, 2), (8, 2), (3, 2)):
        assert whole.insert(whole.push(steps), shard) is None
    return whole


def counts_of(batch: Batch, ids: list[int]) -> Array:
    found, counts = np.unique(batch.ids, return_counts=True)
    assert set(found.tolist()) <= set(ids)
    return np.array([dict(zip(found.tolist(), counts.tolist(), strict=True)).get(item, 0) for item in ids])


# The distribution


def test_prioritized_draws_over_all_shards_are_those_of_one_table() -> None:
    whole = uneven(PRIORITIZED)
    weights = whole.set_priorities(np.random.default_rng(0))
    assert len(weights) == 59
    batch = whole.sample(512, 64)
    probabilities = np.array(list(weights.values())) / sum(weights.values())
    right = dict(zip(weights, probabilities.tolist(), strict=True))
    np.testing.assert_allclose(batch.probability, np.vectorize(right.get)(batch.ids), rtol=1e-9)
    assert batch.size == 59
    counts = counts_of(batch, list(weights))
    assert chi_square_p(counts, probabilities) > FALSE_ALARM
    # The same test turns away a sampler that gives every shard an equal part.
    shard = shards_of(np.array(list(weights)))
    equal = probabilities / np.array([probabilities[shard == s].sum() for s in range(3)])[shard] / 3
    assert chi_square_p(counts, equal) < FALSE_ALARM


def test_uniform_draws_over_all_shards_are_uniform_over_transitions() -> None:
    whole = uneven(SPEC)
    batch = whole.sample(512, 64)
    ids = np.unique(batch.ids).tolist()
    assert len(ids) == 59
    np.testing.assert_allclose(batch.probability, 1 / 59)
    assert chi_square_p(counts_of(batch, ids), np.full(59, 1 / 59)) > FALSE_ALARM
    # Not stratified, as in one table: the number that one shard gets of a batch varies as a binomial does.
    of_first = (shards_of(batch.ids) == 0).sum(1)
    assert of_first.var() == pytest.approx(64 * 8 / 59 * 51 / 59, rel=0.25)


def test_each_batch_is_stratified_over_the_whole() -> None:
    whole = uneven(PRIORITIZED)
    weights = whole.set_priorities(np.random.default_rng(1))
    ids = np.array(list(weights))
    probabilities = np.array(list(weights.values())) / sum(weights.values())
    batch = whole.sample(200, 64)
    for shard in range(3):
        expected = 64 * probabilities[shards_of(ids) == shard].sum()
        drawn = (shards_of(batch.ids) == shard).sum(1)
        assert np.abs(drawn - expected).max() < 2.0  # a binomial's deviation is 3 to 4
        assert len(np.unique(drawn)) > 1


def test_a_draw_brings_what_was_inserted() -> None:
    whole = Whole(replace(SPEC, **FREE))  # type: ignore[arg-type]
    for value in range(6):
        push = Push(0, 0, value, (make_segment(LAYOUT, 8, value=value),))
        assert whole.insert(push) is None
    batch = whole.sample(4, 16)
    assert batch.observation.shape == batch.next_observation.shape == (4, 16, 1)
    assert batch.action.shape == (4, 16)
    # Push n of worker 0 went to shard n % 3, its transitions one after the other.
    sequence = batch.ids & (1 << 43) - 1
    np.testing.assert_array_equal(batch.observation[..., 0], shards_of(batch.ids) + 3 * (sequence // 8))


def test_new_items_get_the_highest_priority_of_any_shard() -> None:
    whole = Whole(replace(PRIORITIZED, **FREE))  # type: ignore[arg-type]
    for shard in range(3):
        assert whole.insert(whole.push(), shard) is None
    ids = whole.tables[0].draw(np.zeros(1)).ids  # type: ignore[union-attr]
    whole.tables[0].update_priorities(ids, np.array([32.0]))
    before = whole.tables[2].stats()
    assert whole.insert(whole.push(1), 2) is None
    assert (before.highest_priority, whole.tables[2].stats().highest_priority) == (1.0, 32.0)
    batch = whole.sample(1, 64)
    assert batch.probability.max() == pytest.approx(32**ALPHA / (23 + 2 * 32**ALPHA))


# One limiter, whoever comes when


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 6))
def test_the_ratio_is_that_of_one_limiter_however_pushes_overtake_each_other(
    seed: int, shards: int, workers: int
) -> None:
    rng = np.random.default_rng(seed)
    whole = Whole(SPEC, shards, max_env_steps=400)
    tolerance = SPEC.limiter().tolerance
    under_way: dict[int, tuple[Push, int]] = {}
    for _ in range(4_000):
        who = int(rng.integers(workers + 1))
        if who == workers:
            reply = whole.router.sample(4, 4)
            if reply.finished:
                break
        elif who in under_way:
            push, shard = under_way.pop(who)
            assert whole.tables[shard].insert(push)
        else:
            push = Push(who, 0, whole.sequences.get(who, 0), (make_segment(LAYOUT, int(rng.integers(1, 9))),))
            reservation = whole.router.reserve(who, 0, push.sequence, push.steps)
            if reservation.shards:
                whole.sequences[who] = push.sequence + 1
                under_way[who] = push, int(rng.integers(shards))
        stats = whole.router.stats()
        assert stats.due <= tolerance
        if stats.counters.counted_inserts:
            assert stats.due >= -tolerance
    else:
        pytest.fail("the run never ended")
    counters = whole.router.stats().counters
    assert 400 <= counters.env_steps < 408
    assert counters.counted_inserts == counters.env_steps - 16
    assert abs(counters.samples - 2 * counters.counted_inserts) <= tolerance


def test_a_push_counts_once_whatever_is_said_twice() -> None:
    whole = Whole(SPEC)
    push = whole.push(5, episodes=(EpisodeResult(3.0, 5),), returns=Moments.of(np.arange(5.0)))
    reservation = [whole.router.reserve(0, 0, 0, 5) for _ in range(2)]
    assert reservation[0] == reservation[1]
    assert [whole.tables[1].insert(push), whole.tables[1].insert(push)] == [True, False]
    assert whole.router.reserve(0, 0, 0, 5).repeated
    # Another shard has it too: the first was thought dead.
    assert whole.tables[2].insert(push)
    stats = add_up(whole.router.stats(), [table.stats() for table in whole.tables])
    assert stats.counters == Counters(env_steps=5)
    assert stats.repeated_pushes == 3
    assert whole.router.drain_episodes() == (EpisodeResult(3.0, 5),)
    assert whole.router.drain_episodes() == ()


class Slow:
    """Stands between shards and their desk, and keeps what they say until it is passed on."""

    def __init__(self) -> None:
        self.kept: list[tuple[object, ...]] = []

    def report(self, *word: object) -> None:
        self.kept.append(word)


def slowed() -> tuple[Whole, list[Slow]]:
    """Three shards that say nothing to the desk themselves."""
    whole, slow = Whole(SPEC), [Slow(), Slow(), Slow()]
    for table, between in zip(whole.tables, slow, strict=True):
        table._to = between
    return whole, slow


@pytest.mark.parametrize("desk_dies", [False, True])
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_the_words_of_shards_may_overtake_each_other(order: tuple[int, ...], desk_dies: bool) -> None:
    whole, slow = slowed()
    for number in range(3):
        content = {"episodes": (EpisodeResult(float(number), 8),), "returns": Moments.of(np.full(8, float(number)))}
        assert whole.insert(whole.push(**content), number) is None
    if desk_dies:
        told = whole.router.stats()
        whole.router = ReplayRouter(SPEC, shards=3, run_seed=0, carried=told.counters, counted=told.counted)
    for number in (*order, *order):  # a word that got no answer is said again
        whole.report(*slow[number].kept[0])
    stats = whole.router.stats()
    assert stats.counters.env_steps == 24
    assert stats.repeated_pushes == 3
    assert whole.router.reserve(0, 0, 2, 8).repeated
    assert whole.router._ledger.returns.count == 24
    assert sorted(episode.episode_return for episode in whole.router.drain_episodes()) == [0.0, 1.0, 2.0]


def test_the_word_of_a_senders_last_push_may_come_after_that_of_its_successors_first() -> None:
    whole, slow = slowed()
    assert whole.insert(whole.push(4), 0) is None
    successor = Push(0, 1, 0, (make_segment(LAYOUT, 8),), (EpisodeResult(3.0, 8),))
    assert whole.insert(successor, 1) is None
    whole.report(*slow[1].kept[0])
    whole.report(*slow[0].kept[0])
    assert whole.router.stats().counters.env_steps == 12
    assert whole.router.reserve(0, 1, 0, 8).repeated


def test_of_a_long_silence_what_comes_too_late_to_be_told_from_a_repeat_does_not_count() -> None:
    router = PushLedger()
    for sequence in range(1, 65):
        assert not router.has_accepted(Push(0, 0, sequence))
        router.accept(Push(0, 0, sequence))
    assert [router.has_accepted(Push(0, 0, sequence)) for sequence in (0, 1, 64, 65)] == [True, True, True, False]
    assert not router.has_accepted(Push(1, 0, 0))
    assert router.repeated_pushes == 3


def test_what_a_dead_worker_was_admitted_with_is_given_back() -> None:
    whole = Whole(SPEC)
    for _ in range(2):
        assert whole.insert(whole.push()) is None
    assert whole.router.reserve(1, 0, 0, 8).shards
    assert "of 8 would leave 32 samples due" in (whole.insert(whole.push()) or "")
    whole.router.revoke(1, 0)
    # A call of the dead one that is served only now sets nothing aside.
    assert whole.router.reserve(1, 0, 1, 8).repeated
    assert whole.insert(Push(0, 0, 2, (make_segment(LAYOUT, 8),))) is None
    assert whole.router.stats().waiting == {}
    whole.sample(4, 4)
    assert whole.router.reserve(1, 1, 0, 8).shards


def test_a_push_that_will_not_come_is_given_back_and_the_next_is_admitted() -> None:
    whole = Whole(SPEC)
    for _ in range(2):
        assert whole.insert(whole.push()) is None
    assert whole.router.reserve(1, 0, 5, 8).shards
    whole.router.revoke(1, 0, 4)
    assert "of 8 would leave 32 samples due" in (whole.insert(whole.push()) or "")
    whole.router.revoke(1, 0, 5)
    assert whole.router.reserve(1, 0, 6, 8).shards


def test_what_was_admitted_for_a_process_of_many_senders_is_given_back_together() -> None:
    whole = Whole(SPEC)
    for _ in range(2):
        assert whole.insert(whole.push()) is None
    assert whole.router.reserve(1_000_007, 0, 0, 8).shards
    whole.router.revoke_from(1_000_008, 4)
    assert "of 8 would leave 32 samples due" in (whole.insert(whole.push()) or "")
    whole.router.revoke_from(1_000_000, 4)
    # Calls of that process that are served only now set nothing aside.
    assert whole.router.reserve(1_000_001, 4, 0, 8).repeated
    assert whole.insert(Push(0, 0, 2, (make_segment(LAYOUT, 8),))) is None
    whole.sample(4, 4)
    assert whole.router.reserve(1_000_001, 5, 0, 8).shards


class Here:
    """Stands in for a `RemoteActor`: an object of this process, or if it is None nobody."""

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


class Dead:
    """Answers every call with its own death, as Ray does."""

    def report(self, *_: object) -> Exception:
        return ActorDiedError()


def test_what_a_stopped_worker_was_admitted_with_is_given_back() -> None:
    whole = Whole(SPEC, 2, max_env_steps=8)
    client = ShardedReplayClient(Here(whole.router), [Here(None), Here(None)])  # type: ignore[arg-type, list-item]
    stop = threading.Event()
    stop.set()
    assert client.insert(whole.push(), stop=stop) is None
    assert whole.router.reserve(1, 0, 0, 8).wait is None


def test_a_push_that_does_not_fit_is_refused_whole() -> None:
    whole = Whole(SPEC)
    segments = (make_segment(LAYOUT, 4), make_segment(replace(LAYOUT, frame_shape=(2,)), 4))
    with pytest.raises(LayoutMismatch, match=r"frames must have shape \(5, 1\)"):
        whole.tables[0].insert(Push(0, 0, 0, segments))
    with pytest.raises(ValueError, match="a push holds at most 8 transitions, got 9"):
        whole.router.reserve(0, 0, 0, 9)
    with pytest.raises(ValueError, match="a sample call draws 1 to 16 transitions, got 5 x 4"):
        whole.router.sample(5, 4)
    assert add_up(whole.router.stats(), [table.stats() for table in whole.tables]).size == 0


# Deaths


def test_the_other_shards_go_on_and_nothing_is_owed_for_the_dead_one() -> None:
    whole = Whole(PRIORITIZED)
    for _ in range(12):
        while whole.insert(whole.push()) is not None:
            whole.sample(4, 4)
            whole.sequences[0] -= 1
    before = whole.router.stats()
    whole.router.lost(1, 0)
    assert whole.router.stats() == replace(before, resident_bytes=whole.router.stats().resident_bytes)
    plan = whole.router.sample(1, 4, again=True).plan
    assert plan is not None
    assert set(plan.share) == {0, 2}
    assert sum(plan.share.values()) == pytest.approx(1.0)
    assert whole.router.stats().counters == before.counters
    assert whole.router.reserve(7, 0, 0, 1).shards in ((0, 2), ())
    whole.router.revoke(7, 0)
    # What it said before it died comes late; then its successor speaks, with nothing in it.
    whole.tables[1].stats()
    assert set(whole.router.sample(1, 4, again=True).plan.share) == {0, 2}  # type: ignore[union-attr]
    whole.tables[1] = whole.start(1, 1)
    assert set(whole.router.sample(1, 4, again=True).plan.share) == {0, 2}  # type: ignore[union-attr]
    while whole.insert(whole.push(), 1) is not None:
        whole.router.sample(4, 4)
        whole.sequences[0] -= 1
    assert set(whole.router.sample(1, 4, again=True).plan.share) == {0, 1, 2}  # type: ignore[union-attr]


@pytest.mark.parametrize("dies", ["in the middle", "before the first sample"])
def test_the_limiter_begins_anew_when_too_little_is_left(dies: str) -> None:
    whole = Whole(SPEC, 2)
    assert whole.insert(whole.push(8), 0) is None
    assert whole.insert(whole.push(4), 1) is None
    if dies == "in the middle":
        assert whole.insert(whole.push(8), 0) is None
        whole.sample(1, 4)
    before = whole.router.stats()
    whole.router.lost(0, 0)
    counters = whole.router.stats().counters
    assert counters == before.counters
    wait = whole.router.sample(4, 4).wait
    assert wait == "experience: 4 of the first 16 items inserted"
    whole.tables[0] = whole.start(0, 1)
    assert whole.insert(whole.push(8)) is None
    assert whole.insert(whole.push(4)) is None
    assert whole.router.stats().due == 0.0
    assert whole.router.stats().counters == replace(counters, env_steps=counters.env_steps + 12)
    # One call may run ahead, as at the start of a run; no burst.
    assert whole.router.sample(4, 4).plan is not None
    assert whole.router.sample(1, 4).wait is not None


def test_a_recreated_desk_goes_on_with_what_the_shards_hold() -> None:
    whole = Whole(PRIORITIZED)
    for _ in range(3):
        assert whole.insert(whole.push()) is None
    ids = whole.sample(1, 4).ids
    whole.tables[shards_of(ids)[0, 0]].update_priorities(ids[:, 0], np.array([7.0]))
    told = whole.router.stats()
    # One more, of which no report tells.
    assert whole.insert(whole.push(2)) is None
    carried = replace(told.counters, env_steps=24 + 2)
    whole.router = ReplayRouter(
        PRIORITIZED, shards=3, run_seed=0, incarnation=1, carried=told.counters, counted=told.counted
    )
    assert whole.router.sample(1, 4).wait == "word from every shard of the replay"
    assert whole.router.reserve(0, 0, 4, 8).wait == "word from every shard of the replay"
    for _ in range(2):
        parts = [table.stats() for table in whole.tables]
    stats = add_up(whole.router.stats(), parts)
    assert (stats.size, stats.counters) == (26, carried)
    assert whole.router.stats().due == 0.0
    assert whole.router.stats().highest_priority == 7.0
    assert whole.sample(1, 4).size == 26
    assert whole.insert(whole.push()) is None
    assert whole.router.stats().counters == Counters(carried.env_steps + 8, carried.samples + 4, 8 + 8)


def test_a_push_is_told_again_until_a_desk_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(answer: object, _: float) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("replay.sharding.client.is_ready", lambda answer: True)
    monkeypatch.setattr("replay.sharding.client.fetch", fetch)
    whole = Whole(SPEC, 1)
    router = Here(whole)
    [shard] = whole.tables = [
        ReplayShard(SPEC, shard=0, shards=1, router=ShardReporter(router), run_seed=0)  # type: ignore[arg-type]
    ]
    pushes = [whole.push(4, episodes=(EpisodeResult(float(n), 4),)) for n in range(4)]
    shard.insert(pushes[0])
    told = whole.router.stats()
    router.actor = Dead()  # which takes calls, and does not say so
    shard.insert(pushes[1])
    router.actor = None
    shard.insert(pushes[2])
    whole.router = ReplayRouter(SPEC, shards=1, run_seed=0, carried=told.counters, counted=told.counted)
    router.actor = whole
    shard.insert(pushes[3])
    assert whole.router.stats().counters.env_steps == 16
    assert [episode.episode_return for episode in whole.router.drain_episodes()] == [1.0, 2.0, 3.0]
    assert whole.router.reserve(0, 0, 2, 4).repeated


def test_the_run_ends_when_its_steps_are_accepted() -> None:
    whole = Whole(replace(SPEC, minimum_size=8), max_env_steps=16)
    assert whole.router.reserve(1, 0, 0, 8).shards
    assert whole.router.reserve(2, 0, 0, 8).shards
    assert whole.router.reserve(3, 0, 0, 8).wait == "pushes under way, which bring the run's last steps"
    for worker in (1, 2):
        assert whole.tables[worker].insert(whole.push(worker=worker))
    assert whole.router.reserve(3, 0, 0, 8).finished
    whole.sample(4, 4)
    assert whole.router.sample(1, 4).finished


# What they say of themselves


def test_stats_add_up_and_capacity_is_divided() -> None:
    spec = replace(PRIORITIZED, table=replace(PRIORITIZED.table, capacity=98))
    assert [spec.table.shard(index, 4).capacity for index in range(4)] == [25, 25, 24, 24]
    whole = Whole(spec)
    whole.insert(whole.push())
    whole.insert(whole.push())
    whole.sample(1, 4)
    parts = [table.stats() for table in whole.tables]
    stats = add_up(whole.router.stats(), parts)
    assert (stats.capacity, stats.size, stats.counters) == (98, 16, Counters(16, 4, 0))
    assert stats.bytes == sum(part.bytes for part in parts) > 0
    ages = [part.sample_age for part in parts if part.sample_age is not None]
    assert stats.sample_age == pytest.approx(3 * sum(ages) / len(ages))
    assert 1.0 <= ages[0] <= 8.0


def test_shards_that_begin_together_need_memory_for_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replay.table.available_memory", lambda: SPEC.table.expected_bytes - 1)
    whole = Whole(SPEC)  # each by itself fits
    with pytest.raises(NotEnoughMemory, match="a replay of 96 transitions needs"):
        ReplayShard(SPEC, shard=0, shards=3, router=whole, run_seed=0, with_others=True)


def test_what_cannot_be_divided_is_refused() -> None:
    SPEC.check_shards(12)
    with pytest.raises(ConfigurationError, match=r"96 transitions has shards of 7 with replay_shards 13.*push of 8"):
        SPEC.check_shards(13)
    with pytest.raises(ConfigurationError, match=r"replay_shards must lie in \[1, 256\], got 257"):
        SPEC.check_shards(257)
