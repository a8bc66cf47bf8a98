"""cpprb's prioritized cycle, its data and weights included."""

from __future__ import annotations

import statistics

import numpy as np
from cpprb import PrioritizedReplayBuffer
from measure import arguments, quantile, report, times

parsed = arguments("batch", "inserts")
ITEMS = 2**20
batch, inserts = int(parsed.batch), int(parsed.inserts)
fields = {
    "obs": {"shape": 4, "dtype": np.float32},
    "act": {"dtype": np.int64},
    "rew": {"dtype": np.float32},
    "next_obs": {"shape": 4, "dtype": np.float32},
    "done": {"dtype": np.float32},
}
buffer = PrioritizedReplayBuffer(ITEMS, fields, alpha=0.6)
rng = np.random.default_rng(0)


def rows(count: int) -> dict[str, np.ndarray]:
    """Return made-up transitions."""
    return {
        "obs": rng.random((count, 4), np.float32),
        "act": rng.integers(2, size=count),
        "rew": rng.random(count, np.float32),
        "next_obs": rng.random((count, 4), np.float32),
        "done": np.zeros(count, np.float32),
    }


for _ in range(ITEMS // 1024):
    buffer.add(**rows(1024))
fresh = rows(inserts) if inserts else None
priorities = rng.random((64, batch)) + 0.01
turn = 0


def cycle() -> None:
    """Insert, draw with weights, set priorities."""
    global turn
    if fresh is not None:
        buffer.add(**fresh)
    drawn = buffer.sample(batch, beta=0.4)
    buffer.update_priorities(drawn["indexes"], priorities[turn % 64])
    turn += 1


taken = times(cycle, parsed.warm_up, parsed.seconds)
size = buffer.get_stored_size()
report(statistics.median(taken) * 1e6, batch_size=batch, items=size, p99=quantile(taken, 0.99) * 1e6)
