"""The limit of a prioritized cycle: `numpy.take` of the same rows, nothing else."""

from __future__ import annotations

import statistics

import numpy as np
from measure import arguments, report, times

parsed = arguments("batch", "inserts")
ITEMS = 2**20
batch = int(parsed.batch)
rng = np.random.default_rng(0)
frames = rng.random((ITEMS + 1, 4), np.float32)
action, reward, discount = rng.integers(2, size=ITEMS), rng.random(ITEMS, np.float32), rng.random(ITEMS, np.float32)
index = rng.integers(ITEMS, size=(64, batch))
turn = 0


def gather() -> None:
    """Take a batch's rows."""
    global turn
    rows = index[turn % 64]
    frames.take(rows, axis=0), frames.take(rows + 1, axis=0), action.take(rows), reward.take(rows), discount.take(rows)
    turn += 1


report(statistics.median(times(gather, parsed.warm_up, parsed.seconds)) * 1e6, batch_size=batch, items=ITEMS)
