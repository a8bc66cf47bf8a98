"""The tests of Pearson and Kolmogorov, without scipy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

# Seeds are fixed; when one has to change, a right sampler fails a single test with this probability.
FALSE_ALARM = 1e-5


def chi_square_p(counts: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Return the probability that a right sampler strays at least as far as `counts` from `probabilities`.

    The upper tail of the chi-square distribution is that of a normal one after a cube root (Wilson & Hilferty
    1931). Every cell must expect at least 10 draws.
    """
    counts, probabilities = np.asarray(counts, np.float64), np.asarray(probabilities, np.float64)
    assert counts.shape == probabilities.shape
    assert abs(probabilities.sum() - 1.0) < 1e-9
    expected = counts.sum() * probabilities
    assert expected.min() >= 10.0
    freedom = len(counts) - 1
    return chi_square_tail(float(((counts - expected) ** 2 / expected).sum()), freedom)


def chi_square_tail(statistic: float, freedom: int) -> float:
    """Return the approximate upper tail of the chi-square distribution."""
    width = 2.0 / (9.0 * freedom)
    z = ((statistic / freedom) ** (1.0 / 3.0) - (1.0 - width)) / math.sqrt(width)
    return 0.5 * math.erfc(z / math.sqrt(2.0))


def kolmogorov_p(samples: npt.ArrayLike, distribution: Callable[[npt.NDArray[np.float64]], npt.ArrayLike]) -> float:
    """Return the probability that a right sampler of many numbers strays as far from its distribution function."""
    ordered = np.sort(np.asarray(samples, np.float64))
    count, expected = len(ordered), np.asarray(distribution(ordered))
    ranks = np.arange(count + 1) / count
    distance = max(np.abs(expected - ranks[:-1]).max(), np.abs(ranks[1:] - expected).max())
    terms = [(-1) ** (k - 1) * math.exp(-2.0 * count * (k * distance) ** 2) for k in range(1, 101)]
    return min(1.0, 2.0 * sum(terms))
