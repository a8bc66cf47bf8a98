"""The rate limiter: one inequality decides whether an insert or a sample may proceed.

Let `due = samples_per_insert * (inserts - minimum_size) - samples`, the number of items that the learner has yet to
sample. The rate limiter maintains

    -tolerance <= due <= tolerance

An insert may proceed if the upper bound still holds after it. A sample may proceed if the lower bound still holds after
it and at least `minimum_size` items have been inserted; until then, inserts are not limited. Inserts wait for a learner
that falls behind, and samples wait for workers that fall behind. Inserts and samples can wait at the same time only if
one insert and one sample together move `due` by more than twice the tolerance; `RateLimiter.for_calls` computes the
least tolerance that rules this out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from replay.errors import ConfigurationError


@dataclass
class RateLimiter:
    """Rate limiter that keeps samples / (inserts - minimum_size) at `samples_per_insert`, within a tolerance.

    Attributes:
        samples_per_insert: items sampled for each item inserted; with infinity, no call waits once `minimum_size` items
            have been inserted.
        minimum_size: items that must be inserted before the first sample.
        tolerance: maximum distance of `due` from 0, in samples.
        inserts: items inserted so far.
        samples: items sampled so far.
    """

    samples_per_insert: float
    minimum_size: int
    tolerance: float
    inserts: int = 0
    samples: int = 0

    def __post_init__(self) -> None:
        if not self.samples_per_insert > 0.0:
            raise ConfigurationError(f"samples_per_insert must be positive, got {self.samples_per_insert}")
        if self.minimum_size < 1:
            raise ConfigurationError(f"minimum_size must be at least 1, got {self.minimum_size}")
        if not self.tolerance > 0.0:
            raise ConfigurationError(f"the rate limiter's tolerance must be positive, got {self.tolerance}")

    @classmethod
    def for_calls(
        cls, samples_per_insert: float, minimum_size: int, largest_insert: int, largest_sample: int
    ) -> RateLimiter:
        """Return a rate limiter with the least tolerance under which calls of these sizes cannot deadlock.

        Args:
            samples_per_insert: see the class.
            minimum_size: see the class.
            largest_insert: items in the largest push.
            largest_sample: items in the largest sample call.
        """
        tolerance = float(max(largest_sample, 1))
        if math.isfinite(samples_per_insert):
            tolerance = max(tolerance, samples_per_insert * largest_insert)
        return cls(samples_per_insert, minimum_size, tolerance)

    @property
    def counted_inserts(self) -> int:
        """Number of inserts beyond the minimum size, the denominator of the ratio."""
        return max(0, self.inserts - self.minimum_size)

    @property
    def due(self) -> float:
        """Number of items that the learner has yet to sample; negative if the learner is ahead."""
        if math.isinf(self.samples_per_insert):
            return 0.0
        return self.samples_per_insert * (self.inserts - self.minimum_size) - self.samples

    def insert_waits_for(self, count: int) -> str | None:
        """Return why an insert of `count` items must wait, or None if it may proceed."""
        if math.isinf(self.samples_per_insert) or self.inserts < self.minimum_size:
            return None
        due = self.due + self.samples_per_insert * count
        if due <= self.tolerance:
            return None
        return (
            f"the learner: an insert of {count} would leave {due:.0f} samples due, "
            f"more than the tolerance of {self.tolerance:.0f}"
        )

    def sample_waits_for(self, count: int) -> str | None:
        """Return why a sample of `count` items must wait, or None if it may proceed."""
        if self.inserts < self.minimum_size:
            return f"experience: {self.inserts} of the first {self.minimum_size} items inserted"
        if math.isinf(self.samples_per_insert) or self.due - count >= -self.tolerance:
            return None
        return (
            f"experience: a sample of {count} would exceed the samples due after {self.inserts} inserts by "
            f"{count - self.due:.0f}, more than the tolerance of {self.tolerance:.0f}"
        )

    def record_insert(self, count: int) -> None:
        """Count an insert of `count` items that proceeded."""
        self.inserts += count

    def record_sample(self, count: int) -> None:
        """Count a sample of `count` items that proceeded."""
        self.samples += count
