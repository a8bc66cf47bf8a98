"""Random seeds: one run seed determines the seed of each process, by role, index, and incarnation."""

from __future__ import annotations

import zlib

import numpy as np


def spawn_seed(run_seed: int, role: str, index: int = 0, incarnation: int = 0) -> np.random.SeedSequence:
    """Return the seed sequence of one process; different arguments give independent random streams.

    Args:
        run_seed: seed of the run, such as 0.
        role: role of the process, such as `"worker"`, `"learner"`, or `"evaluation"`.
        index: index of the process among those with the same role.
        incarnation: number of times the process was recreated; a recreated worker must not repeat the episodes of its
            predecessor.
    """
    return np.random.SeedSequence(run_seed, spawn_key=(zlib.crc32(role.encode()), index, incarnation))


def integer_seed(sequence: np.random.SeedSequence) -> int:
    """Return a non-negative 31-bit seed for libraries that expect an integer."""
    return int(sequence.generate_state(1)[0] & 0x7FFFFFFF)
