"""tianshou's prioritized cycle."""

from __future__ import annotations

import statistics

import numpy as np
from measure import arguments, quantile, report, times
from tianshou.data import Batch, PrioritizedReplayBuffer

parsed = arguments("batch", "inserts")
ITEMS = 2**20
batch, inserts = int(parsed.batch), int(parsed.inserts)
buffer = PrioritizedReplayBuffer(ITEMS, alpha=0.6, beta=0.4)
rng = np.random.default_rng(0)


def row() -> Batch:
    """Return one made-up transition."""
    return Batch(
        obs=rng.random(4, np.float32), act=rng.integers(2), rew=0.5, terminated=False, truncated=False,
        obs_next=rng.random(4, np.float32), info={},
    )  # fmt: skip


# Filling it row by row takes minutes: the first row makes the arrays, and the rest is written into them.
for _ in range(2):
    buffer.add(row())
for name, value in (
    ("obs", rng.random((ITEMS, 4), np.float32)),
    ("obs_next", rng.random((ITEMS, 4), np.float32)),
    ("act", rng.integers(2, size=ITEMS)),
):
    buffer._meta.__dict__[name][:] = value
buffer._size, buffer._index = ITEMS, 0
buffer.update_weight(np.arange(ITEMS), rng.random(ITEMS) + 0.01)
assert len(buffer) == ITEMS
fresh = [row() for _ in range(inserts)]
priorities = rng.random((64, batch)) + 0.01
turn = 0


def cycle() -> None:
    """Insert, draw with weights, set priorities."""
    global turn
    for one in fresh:
        buffer.add(one)
    _, indices = buffer.sample(batch)
    buffer.update_weight(indices, priorities[turn % 64])
    turn += 1


taken = times(cycle, parsed.warm_up, parsed.seconds)
report(statistics.median(taken) * 1e6, batch_size=batch, items=len(buffer), p99=quantile(taken, 0.99) * 1e6)
