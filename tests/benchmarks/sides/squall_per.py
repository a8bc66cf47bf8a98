"""Squall's prioritized cycle: `TransitionTable.sample`, importance weights, `update_priorities`."""

from __future__ import annotations

import statistics

import numpy as np
from measure import arguments, quantile, report, times

parsed = arguments("batch", "inserts")

import torch  # noqa: E402

from learner.value_learning import importance_weights  # noqa: E402
from replay.seeds import spawn_seed  # noqa: E402
from replay.table import TableSpec, TransitionTable  # noqa: E402
from replay.types import Layout, Segment, join_segments  # noqa: E402

ITEMS, LENGTH = 2**20, 16
batch, inserts = int(parsed.batch), int(parsed.inserts)
torch.set_num_threads(parsed.threads)
layout = Layout((4,), "float32", 1, (), "int64", LENGTH, 1)
table = TransitionTable(TableSpec(layout, ITEMS, 0.6), seed=spawn_seed(0, "bench"))
rng = np.random.default_rng(0)


def segment() -> Segment:
    """Return one segment of made-up vectors."""
    row = np.arange(LENGTH, dtype=np.int32)
    age = np.zeros(LENGTH, np.uint8)
    return Segment(
        rng.random((LENGTH + 1, 4), np.float32), row, age, row + 1, age, rng.integers(2, size=LENGTH),
        rng.random(LENGTH, np.float32), np.full(LENGTH, 0.99, np.float32),
    )  # fmt: skip


for _ in range(ITEMS // LENGTH):
    table.insert([segment()])
assert table.size == ITEMS
fresh = join_segments([segment() for _ in range(inserts // LENGTH)], layout)  # as a worker sends them
priorities = rng.random((64, batch)) + 0.01
turn = 0


def cycle() -> None:
    """Insert, draw, weigh, set priorities."""
    global turn
    if fresh:
        table.insert(fresh)
    drawn = table.sample(1, batch)
    importance_weights(torch.from_numpy(drawn.probability[0]).float(), drawn.size, 0.4)
    table.update_priorities(drawn.ids, priorities[turn % 64][None])
    turn += 1


taken = times(cycle, parsed.warm_up, parsed.seconds)
report(statistics.median(taken) * 1e6, batch_size=batch, items=table.size, p99=quantile(taken, 0.99) * 1e6)
