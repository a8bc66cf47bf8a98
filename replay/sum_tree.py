"""A sum tree of eight children a node: set many priorities, find many (Schaul et al. 2016, appendix B).

Eight float64 siblings fill one line of the cache, so a level costs one line, and 2^20 leaves have seven levels
where a binary tree has twenty. Many leaves are treated together, level by level: their loads do not wait for each
other. Each parent is summed anew from its children, never adjusted by a difference, so no rounding error accumulates.
"""

from __future__ import annotations

import numba
import numpy as np

from replay.errors import ConfigurationError
from replay.types import Array

_CHILDREN = 8
_LINE_BYTES = 64


class SumTree:
    """Non-negative weights of `capacity` leaves, with draws in proportion to them."""

    def __init__(self, capacity: int) -> None:
        """Make a tree of zeros.

        Args:
            capacity: number of leaves, positive.

        Raises:
            ConfigurationError: capacity is not positive.
        """
        if capacity < 1:
            raise ConfigurationError(f"a sum tree needs a positive capacity, got {capacity}")
        self.capacity = capacity
        sizes = _level_sizes(capacity)
        self._starts = np.cumsum([0, *sizes[:-1]])  # of each level, the root's first
        self._nodes = _zeros_on_a_line(sum(sizes))

    @staticmethod
    def bytes_for(capacity: int) -> int:
        """Return the memory that a tree of so many leaves takes."""
        return 8 * sum(_level_sizes(capacity))

    @property
    def total(self) -> float:
        """Sum of all weights."""
        return float(self._nodes[0])

    def get(self, leaves: Array) -> Array:
        """Return the weights of `leaves`, `[N]` integer -> `[N]` float64."""
        weights: Array = self._nodes[self._starts[-1] + np.asarray(leaves, np.int64)]
        return weights

    def set(self, leaves: Array, weights: Array) -> None:
        """Set weights; of a leaf named twice the last weight wins.

        Args:
            leaves: `[N]` integer in [0, capacity).
            weights: `[N]` finite and not negative.

        Raises:
            ValueError: a leaf out of range, or a weight negative, infinite or NaN.
        """
        leaves = np.ascontiguousarray(leaves, np.int64)
        weights = np.ascontiguousarray(weights, np.float64)
        if leaves.shape != weights.shape or leaves.ndim != 1:
            raise ValueError(f"leaves and weights must both be [N], got {leaves.shape} and {weights.shape}")
        if not len(leaves):
            return
        if leaves.min() < 0 or leaves.max() >= self.capacity:
            raise ValueError(f"leaves must lie in [0, {self.capacity}), got {leaves.min()}..{leaves.max()}")
        if not (np.isfinite(weights).all() and weights.min() >= 0.0):
            raise ValueError("weights must be finite and not negative")
        _set(self._nodes, self._starts, leaves, weights)

    def find(self, targets: Array) -> Array:
        """Return for each target the first leaf whose running sum of weights exceeds it.

        Args:
            targets: `[N]` float64 in [0, total).

        Returns:
            `[N]` int64 leaves; none of weight 0, whatever rounding does at an interval's edge.

        Raises:
            ValueError: the tree is empty, or a target is negative or NaN.
        """
        if self.total <= 0.0:
            raise ValueError("cannot draw from a sum tree whose weights are all zero")
        targets = np.ascontiguousarray(targets, np.float64)
        if len(targets) and not targets.min() >= 0.0:
            raise ValueError(f"targets must not be negative or NaN, got {targets.min()}")
        found: Array = _find(self._nodes, self._starts, targets)
        return found


def _level_sizes(capacity: int) -> list[int]:
    """Return the nodes of each level from the root to the leaves, each level a whole number of lines."""
    counts = [capacity]
    while counts[-1] > 1:
        counts.append(-(-counts[-1] // _CHILDREN))
    return [-(-count // _CHILDREN) * _CHILDREN for count in reversed(counts)]


def _zeros_on_a_line(count: int) -> Array:
    nodes = np.zeros(count + _CHILDREN, np.float64)
    skipped = -nodes.ctypes.data % _LINE_BYTES // nodes.itemsize
    aligned: Array = nodes[skipped : skipped + count]
    return aligned


@numba.njit(cache=True)
def _set(nodes: Array, starts: Array, leaves: Array, weights: Array) -> None:
    below = starts[-1]
    for i in range(len(leaves)):
        nodes[below + leaves[i]] = weights[i]
    changed, count = leaves.copy(), len(leaves)
    for level in range(len(starts) - 2, -1, -1):
        here, parents = starts[level], 0
        for i in range(count):
            parent = changed[i] // _CHILDREN
            if parents and changed[parents - 1] == parent:
                continue  # neighbours are often siblings
            first, total = below + parent * _CHILDREN, 0.0
            for child in range(_CHILDREN):
                total += nodes[first + child]
            nodes[here + parent] = total
            changed[parents] = parent
            parents += 1
        below, count = here, parents


@numba.njit(cache=True)
def _find(nodes: Array, starts: Array, targets: Array) -> Array:
    found, rest = np.zeros(len(targets), np.int64), targets.copy()
    for level in range(1, len(starts)):
        start = starts[level]
        for i in range(len(targets)):
            first, target, into = start + found[i] * _CHILDREN, rest[i], 0
            # Only into weight: rounding may leave a target at or beyond the sum of what is there.
            beyond = True
            for child in range(_CHILDREN):
                weight = nodes[first + child]
                if weight > 0.0:
                    into = child
                    if target < weight:
                        beyond = False
                        break
                    target -= weight
            found[i] = found[i] * _CHILDREN + into
            rest[i] = np.inf if beyond else target
    return found
