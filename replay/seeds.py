"""One run seed spawns every other seed, by role, index and incarnation."""

from __future__ import annotations

import zlib

import numpy as np


def spawn_seed(run_seed: int, role: str, index: int = 0, incarnation: int = 0) -> np.random.SeedSequence:
    """Return the seed sequence of one process; any two different addresses give independent streams.

    Args:
        run_seed: the run's seed; 0 is a seed like any other.
        role: such as `"worker"`, `"learner"`, `"evaluation"`.
        index: which of that role.
        incarnation: how often it was recreated; a recreated worker must not replay its predecessor's episodes.
    """
    return np.random.SeedSequence(run_seed, spawn_key=(zlib.crc32(role.encode()), index, incarnation))


def integer_seed(sequence: np.random.SeedSequence) -> int:
    """Return a non-negative 31-bit seed for libraries that take an int."""
    return int(sequence.generate_state(1)[0] & 0x7FFFFFFF)
