"""Items of the replay service's comparison, as both sides send them. NumPy only."""

from __future__ import annotations

from typing import Any

STACK = 4
CAPACITY = {"atari": 20_000, "vector": 100_000}
# Lanes as in Pong's preset, and for vectors as in the row `collect`; batches as in the presets for Pong and CartPole.
LANES = {"atari": 4, "vector": 64}
LENGTH = {"atari": 64, "vector": 16}
K = {"atari": 8, "vector": 32}
BATCH = {"atari": 32, "vector": 64}


def frames_of(kind: str, rows: int) -> Any:
    """Return `[rows, ...]` frames: of a game that was played, or made-up vectors of CartPole's size."""
    import numpy as np

    if kind == "atari":
        from frames import recorded

        return recorded(rows)
    return np.random.default_rng(0).random((rows, 4), np.float32)


def item_bytes(kind: str) -> int:
    """Return what one item carries: the observation, the next one's newest frame, action, reward, discount."""
    return (STACK + 1) * 84 * 84 + 16 if kind == "atari" else 2 * 16 + 16
