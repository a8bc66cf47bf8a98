"""The distribution of samples from a sharded replay is that of a single table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from replay.messages import Batch, Push
from replay.server import ReplaySpec
from replay.table import shards_of
from replay.types import Array
from tests.replay.naive import make_segment
from tests.replay.sharding.local_replay import (
    ALPHA,
    FREE,
    LAYOUT,
    PRIORITIZED,
    SPEC,
    LocalReplay,
)
from tests.replay.statistics import FALSE_ALARM, chi_square_p


def uneven(spec: ReplaySpec) -> LocalReplay:
    """Return a replay whose three shards have 8, 24, and 27 transitions."""
    replay = LocalReplay(replace(spec, **FREE))  # type: ignore[arg-type]
    for steps, shard in ((8, 0), (8, 1), (8, 1), (8, 1), (8, 2), (8, 2), (8, 2), (3, 2)):
        assert replay.insert(replay.push(steps), shard) is None
    return replay


def counts_of(batch: Batch, ids: list[int]) -> Array:
    found, counts = np.unique(batch.ids, return_counts=True)
    assert set(found.tolist()) <= set(ids)
    return np.array([dict(zip(found.tolist(), counts.tolist(), strict=True)).get(item, 0) for item in ids])


def test_prioritized_draws_over_all_shards_are_those_of_one_table() -> None:
    replay = uneven(PRIORITIZED)
    weights = replay.set_priorities(np.random.default_rng(0))
    assert len(weights) == 59
    batch = replay.sample(512, 64)
    probabilities = np.array(list(weights.values())) / sum(weights.values())
    right = dict(zip(weights, probabilities.tolist(), strict=True))
    np.testing.assert_allclose(batch.probability, np.vectorize(right.get)(batch.ids), rtol=1e-9)
    assert batch.size == 59
    counts = counts_of(batch, list(weights))
    assert chi_square_p(counts, probabilities) > FALSE_ALARM
    # The same test rejects a sampler that samples all shards equally often.
    shard = shards_of(np.array(list(weights)))
    equal = probabilities / np.array([probabilities[shard == s].sum() for s in range(3)])[shard] / 3
    assert chi_square_p(counts, equal) < FALSE_ALARM


def test_uniform_draws_over_all_shards_are_uniform_over_transitions() -> None:
    replay = uneven(SPEC)
    batch = replay.sample(512, 64)
    ids = np.unique(batch.ids).tolist()
    assert len(ids) == 59
    np.testing.assert_allclose(batch.probability, 1 / 59)
    assert chi_square_p(counts_of(batch, ids), np.full(59, 1 / 59)) > FALSE_ALARM
    # As in one table, a uniform sample is not stratified: the number of items from one shard is binomial.
    of_first = (shards_of(batch.ids) == 0).sum(1)
    assert of_first.var() == pytest.approx(64 * 8 / 59 * 51 / 59, rel=0.25)


def test_each_batch_is_stratified_over_the_whole() -> None:
    replay = uneven(PRIORITIZED)
    weights = replay.set_priorities(np.random.default_rng(1))
    ids = np.array(list(weights))
    probabilities = np.array(list(weights.values())) / sum(weights.values())
    batch = replay.sample(200, 64)
    for shard in range(3):
        expected = 64 * probabilities[shards_of(ids) == shard].sum()
        drawn = (shards_of(batch.ids) == shard).sum(1)
        assert np.abs(drawn - expected).max() < 2.0  # the standard deviation of a binomial would be 3 to 4
        assert len(np.unique(drawn)) > 1


def test_a_draw_brings_what_was_inserted() -> None:
    replay = LocalReplay(replace(SPEC, **FREE))  # type: ignore[arg-type]
    for value in range(6):
        push = Push(0, 0, value, (make_segment(LAYOUT, 8, value=value),))
        assert replay.insert(push) is None
    batch = replay.sample(4, 16)
    assert batch.observation.shape == batch.next_observation.shape == (4, 16, 1)
    assert batch.action.shape == (4, 16)
    # Push n of worker 0 went to shard n % 3, with consecutive transitions.
    sequence = batch.ids & (1 << 43) - 1
    np.testing.assert_array_equal(batch.observation[..., 0], shards_of(batch.ids) + 3 * (sequence // 8))


def test_new_items_get_the_highest_priority_of_any_shard() -> None:
    replay = LocalReplay(replace(PRIORITIZED, **FREE))  # type: ignore[arg-type]
    for shard in range(3):
        assert replay.insert(replay.push(), shard) is None
    ids = replay.tables[0].sample_at(np.zeros(1)).ids  # type: ignore[union-attr]
    replay.tables[0].update_priorities(ids, np.array([32.0]))
    before = replay.tables[2].stats()
    assert replay.insert(replay.push(1), 2) is None
    assert (before.highest_priority, replay.tables[2].stats().highest_priority) == (1.0, 32.0)
    batch = replay.sample(1, 64)
    assert batch.probability.max() == pytest.approx(32**ALPHA / (23 + 2 * 32**ALPHA))
