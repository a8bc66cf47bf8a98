"""Items of the replay service's comparison, as both sides send them. NumPy only."""

from __future__ import annotations

from typing import Any

STACK, LENGTH, BATCH, K = 4, 64, 32, 8
VECTOR_LENGTH = 16
CAPACITY = {"atari": 20_000, "vector": 100_000}


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
