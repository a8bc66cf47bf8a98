"""One inequality decides whether an insert or a sample may proceed.

With `due = samples_per_insert * (inserts - minimum_size) - samples`, the items that the learner has yet to draw:

    -tolerance <= due <= tolerance

An insert may proceed if the right side holds after it, a sample if the left side holds after it and at least
`minimum_size` items have been inserted; below that size inserts are free. The learner that falls behind makes
inserts wait; workers that fall behind make samples wait. Both can wait at once only if an insert and a sample
together move `due` by more than twice the tolerance, hence the least tolerance that the constructor accepts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from replay.errors import ConfigurationError


@dataclass
class RateLimiter:
    """Keeps samples / (inserts - minimum_size) at `samples_per_insert`, within a tolerance.

    Attributes:
        samples_per_insert: items drawn for each item inserted; infinite means "never make anyone wait".
        minimum_size: items inserted before the first sample.
        tolerance: by how many samples `due` may stray from 0.
        inserts: items inserted so far.
        samples: items drawn so far.
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
            raise ConfigurationError(f"the minimum size must be at least 1, got {self.minimum_size}")
        if not self.tolerance > 0.0:
            raise ConfigurationError(f"the limiter's tolerance must be positive, got {self.tolerance}")

    @classmethod
    def for_calls(
        cls, samples_per_insert: float, minimum_size: int, largest_insert: int, largest_sample: int
    ) -> RateLimiter:
        """Make a limiter with the least tolerance under which calls of these sizes can never lock each other out.

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
        """Inserts beyond the minimum size: those that the ratio is measured against."""
        return max(0, self.inserts - self.minimum_size)

    @property
    def due(self) -> float:
        """Samples that the learner has yet to draw; negative when it is ahead."""
        if math.isinf(self.samples_per_insert):
            return 0.0
        return self.samples_per_insert * (self.inserts - self.minimum_size) - self.samples

    def insert_waits_for(self, count: int) -> str | None:
        """Return why an insert of `count` items may not proceed now, or None if it may."""
        if math.isinf(self.samples_per_insert) or self.inserts < self.minimum_size:
            return None
        after = self.due + self.samples_per_insert * count
        if after <= self.tolerance:
            return None
        return (
            f"the learner: an insert of {count} would leave {after:.0f} samples due, "
            f"more than the tolerance of {self.tolerance:.0f}"
        )

    def sample_waits_for(self, count: int) -> str | None:
        """Return why a sample of `count` items may not proceed now, or None if it may."""
        if self.inserts < self.minimum_size:
            return f"experience: {self.inserts} of the first {self.minimum_size} items inserted"
        if math.isinf(self.samples_per_insert) or self.due - count >= -self.tolerance:
            return None
        return f"experience: a sample of {count} would run {count - self.due:.0f} ahead of {self.inserts} inserts"

    def record_insert(self, count: int) -> None:
        """Count an insert that proceeded."""
        self.inserts += count

    def record_sample(self, count: int) -> None:
        """Count a sample that proceeded."""
        self.samples += count
