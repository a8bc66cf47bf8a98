"""A sum tree in one flat array: set many priorities, find many, in O(log n) each (Schaul et al. 2016, appendix B).

Node i has children 2i and 2i + 1; node 1 is the root; leaf j is node `leaves + j`. Sums are float64 and each
parent is recomputed from its two children, never adjusted by a difference, so no rounding error accumulates.
"""

from __future__ import annotations

import numba
import numpy as np

from replay.types import Array, ConfigurationError


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
        self._leaves = 1 << (capacity - 1).bit_length()
        self._nodes = np.zeros(2 * self._leaves, np.float64)

    @property
    def total(self) -> float:
        """Sum of all weights."""
        return float(self._nodes[1])

    def get(self, leaves: Array) -> Array:
        """Return the weights of `leaves`, `[N]` integer -> `[N]` float64."""
        weights: Array = self._nodes[self._leaves + np.asarray(leaves, np.int64)]
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
        _set(self._nodes, self._leaves, leaves, weights)

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
        found: Array = _find(self._nodes, self._leaves, targets)
        return found


@numba.njit(cache=True)
def _set(nodes: Array, first: int, leaves: Array, weights: Array) -> None:
    for i in range(len(leaves)):
        node = first + leaves[i]
        nodes[node] = weights[i]
        node >>= 1
        while node:
            nodes[node] = nodes[2 * node] + nodes[2 * node + 1]
            node >>= 1


@numba.njit(cache=True)
def _find(nodes: Array, first: int, targets: Array) -> Array:
    found = np.empty(len(targets), np.int64)
    for i in range(len(targets)):
        target, node = targets[i], 1
        while node < first:
            node *= 2
            left = nodes[node]
            # Go right only into weight: rounding may leave a target at or beyond the sum of what is there.
            if target >= left and nodes[node + 1] > 0.0:
                target -= left
                node += 1
        found[i] = node - first
    return found
