"""Pearson's chi-square test and the Kolmogorov-Smirnov test, without scipy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

# Seeds are fixed. After a change of a seed, a correct sampler fails a single test with this probability.
FALSE_ALARM = 1e-5


def chi_square_p(counts: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Return the p-value of `counts` under `probabilities`: how likely a correct sampler deviates at least as much.

    The upper tail of the chi-square distribution is approximated by that of a normal distribution after a cube root
    (Wilson & Hilferty 1931). Each cell must have an expectation of at least 10 samples.
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
    """Return the p-value of many samples under a distribution function."""
    ordered = np.sort(np.asarray(samples, np.float64))
    count, expected = len(ordered), np.asarray(distribution(ordered))
    ranks = np.arange(count + 1) / count
    distance = max(np.abs(expected - ranks[:-1]).max(), np.abs(ranks[1:] - expected).max())
    terms = [(-1) ** (k - 1) * math.exp(-2.0 * count * (k * distance) ** 2) for k in range(1, 101)]
    return min(1.0, 2.0 * sum(terms))
