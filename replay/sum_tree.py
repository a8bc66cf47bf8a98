"""A sum tree with eight children per node, for prioritized sampling (Schaul et al. 2016, appendix B).

Eight float64 siblings fill one cache line, so each level costs one cache line. 2^20 leaves need seven levels below the
root; in a binary tree they need twenty. `set` and `find` process many leaves together, level by level, so that the
memory accesses of different leaves overlap. Each parent is recomputed as the sum of its children, never adjusted by a
difference, so that no rounding error accumulates.
"""

from __future__ import annotations

import numba
import numpy as np

from replay.errors import ConfigurationError
from replay.types import Array

_CHILDREN = 8
_LINE_BYTES = 64


class SumTree:
    """Sum tree over the non-negative weights of `capacity` leaves, for sampling in proportion to the weights."""

    def __init__(self, capacity: int) -> None:
        """Create a tree whose weights are all zero.

        Args:
            capacity: number of leaves, must be positive.

        Raises:
            ConfigurationError: capacity is not positive.
        """
        if capacity < 1:
            raise ConfigurationError(f"a sum tree must have a positive capacity, got {capacity}")
        self.capacity = capacity
        sizes = _level_sizes(capacity)
        self._starts = np.cumsum([0, *sizes[:-1]])  # index of each level's first node, root first
        self._nodes = _aligned_zeros(sum(sizes))

    @staticmethod
    def bytes_for(capacity: int) -> int:
        """Return the size of a tree of `capacity` leaves in bytes."""
        return 8 * sum(_level_sizes(capacity))

    @property
    def total(self) -> float:
        """Sum of all weights."""
        return float(self._nodes[0])

    def get(self, leaves: Array) -> Array:
        """Return the weights, `[N]` float64, of `leaves`, `[N]` integer."""
        weights: Array = self._nodes[self._starts[-1] + np.asarray(leaves, np.int64)]
        return weights

    def set(self, leaves: Array, weights: Array) -> None:
        """Set the weights of leaves; if a leaf occurs twice, the last weight wins.

        Args:
            leaves: `[N]` integer in [0, capacity).
            weights: `[N]`, finite and non-negative.

        Raises:
            ValueError: a leaf is out of range, or a weight is negative, infinite, or NaN.
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
        """Return for each target the first leaf whose cumulative weight exceeds the target.

        Args:
            targets: `[N]` float64 in [0, total).

        Returns:
            `[N]` int64 leaves; never a leaf of weight 0, even if a target is rounded at the edge of an interval.

        Raises:
            ValueError: all weights are zero, or a target is negative or NaN.
        """
        if self.total <= 0.0:
            raise ValueError("cannot sample from a sum tree whose weights are all zero")
        targets = np.ascontiguousarray(targets, np.float64)
        if len(targets) and not targets.min() >= 0.0:
            raise ValueError(f"targets must not be negative or NaN, got {targets.min()}")
        leaves: Array = _find(self._nodes, self._starts, targets)
        return leaves


def _level_sizes(capacity: int) -> list[int]:
    """Return the number of nodes per level, root first, padded to whole cache lines."""
    counts = [capacity]
    while counts[-1] > 1:
        counts.append(-(-counts[-1] // _CHILDREN))
    return [-(-count // _CHILDREN) * _CHILDREN for count in reversed(counts)]


def _aligned_zeros(count: int) -> Array:
    nodes = np.zeros(count + _CHILDREN, np.float64)
    start = -nodes.ctypes.data % _LINE_BYTES // nodes.itemsize
    aligned: Array = nodes[start : start + count]
    return aligned


@numba.njit(cache=True)
def _set(nodes: Array, starts: Array, leaves: Array, weights: Array) -> None:
    child_start = starts[-1]
    for i in range(len(leaves)):
        nodes[child_start + leaves[i]] = weights[i]
    changed, count = leaves.copy(), len(leaves)
    for level in range(len(starts) - 2, -1, -1):
        start, parents = starts[level], 0
        for i in range(count):
            parent = changed[i] // _CHILDREN
            if parents and changed[parents - 1] == parent:
                continue  # adjacent leaves are often siblings
            first, total = child_start + parent * _CHILDREN, 0.0
            for child in range(_CHILDREN):
                total += nodes[first + child]
            nodes[start + parent] = total
            changed[parents] = parent
            parents += 1
        child_start, count = start, parents


@numba.njit(cache=True)
def _find(nodes: Array, starts: Array, targets: Array) -> Array:
    indices, remaining = np.zeros(len(targets), np.int64), targets.copy()
    for level in range(1, len(starts)):
        start = starts[level]
        for i in range(len(targets)):
            first, target, chosen = start + indices[i] * _CHILDREN, remaining[i], 0
            # Choose only a child with a positive weight. By rounding, a target may reach or exceed the sum of the
            # children; then choose the last child with a positive weight, on this level and on all levels below.
            beyond = True
            for child in range(_CHILDREN):
                weight = nodes[first + child]
                if weight > 0.0:
                    chosen = child
                    if target < weight:
                        beyond = False
                        break
                    target -= weight
            indices[i] = indices[i] * _CHILDREN + chosen
            remaining[i] = np.inf if beyond else target
    return indices
