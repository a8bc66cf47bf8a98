"""The trajectory queue of on-policy algorithms: first in, first out, and each trajectory is used once.

A global batch has a fixed number of units and is opened for one version of the weights. A unit is one trajectory: T
steps of one lane, or one whole episode. Workers request permits, one per unit, and the queue accepts only trajectories
with a permit. A batch of the trajectories that finish first would favor short episodes; with permits, learning curves
do not depend on the number of workers. Batches leave the queue in the order in which they were opened, with their units
in permit order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import takewhile

from replay.errors import ConfigurationError
from replay.messages import Permit
from replay.types import Trajectory


@dataclass
class _OpenBatch:
    """A global batch in the queue.

    Attributes:
        number: number of the batch, in the order of opening.
        version: version of the weights for which the batch was opened.
        units: trajectory of each unit, or None until the queue has received it.
        unissued: units without a permit.
        holders: unit -> (worker, incarnation, version) of its permit, until the queue has received the trajectory.
    """

    number: int
    version: int
    units: list[Trajectory | None]
    unissued: deque[int]
    holders: dict[int, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether the queue has received all trajectories of the batch."""
        return all(unit is not None for unit in self.units)

    @property
    def started(self) -> bool:
        """Whether a permit of the batch is in use or was used."""
        return len(self.unissued) < len(self.units)


class TrajectoryQueue:
    """Bounded queue of global batches; not thread-safe.

    The queue contains at most `1 + max_policy_lag` batches and issues permits only for the newest published version.
    Therefore the weights that train on a trajectory are at most `max_policy_lag` versions newer than the weights that
    produced the trajectory. With a lag of 0, both are the same version.

    Attributes:
        units_per_batch: number of trajectories in a global batch.
        max_policy_lag: maximum number of versions between a trajectory and the weights that train on it.
        version: newest published version of the weights.
        discarded_steps: environment steps of the trajectories that were discarded.
    """

    def __init__(self, units_per_batch: int, *, max_policy_lag: int = 0, version: int = 0) -> None:
        """Open the first batches, for `version` of the weights.

        Raises:
            ConfigurationError: units_per_batch is not positive, or max_policy_lag is negative.
        """
        if units_per_batch < 1:
            raise ConfigurationError(f"units_per_batch must be positive, got {units_per_batch}")
        if max_policy_lag < 0:
            raise ConfigurationError(f"max_policy_lag must not be negative, got {max_policy_lag}")
        self.units_per_batch = units_per_batch
        self.max_policy_lag = max_policy_lag
        self.version = version
        self.discarded_steps = 0
        self._opened = 0
        self._batches: deque[_OpenBatch] = deque()
        self._open_batches()

    def _open_batches(self) -> None:
        while len(self._batches) < 1 + self.max_policy_lag:
            unissued = deque(range(self.units_per_batch))
            self._batches.append(_OpenBatch(self._opened, self.version, [None] * self.units_per_batch, unissued))
            self._opened += 1

    @property
    def complete_batches(self) -> int:
        """Number of batches that `take` can return now."""
        return sum(1 for _ in takewhile(lambda batch: batch.complete, self._batches))

    @property
    def _started_batches(self) -> list[_OpenBatch]:
        """The newest started batch and all older batches, which must leave the queue before it."""
        batches = list(self._batches)
        while batches and not batches[-1].started:
            batches.pop()
        return batches

    @property
    def started(self) -> bool:
        """Whether the queue contains a started batch."""
        return bool(self._started_batches)

    @property
    def incomplete(self) -> bool:
        """Whether a started batch, or an older one, still lacks units."""
        return any(not batch.complete for batch in self._started_batches)

    def __len__(self) -> int:
        """Return the number of trajectories in the queue."""
        return sum(unit is not None for batch in self._batches for unit in batch.units)

    @property
    def bytes(self) -> int:
        """Size of the trajectories in the queue, in bytes."""
        return sum(unit.bytes for batch in self._batches for unit in batch.units if unit is not None)

    def revoke_earlier(self, worker: int, incarnation: int) -> None:
        """Revoke the unused permits of a worker's earlier incarnations."""
        for batch in self._batches:
            for holder in set(batch.holders.values()):
                if holder[0] == worker and holder[1] < incarnation:
                    self.revoke(worker, holder[1])

    def request_permits(
        self, worker: int, incarnation: int, count: int, *, may_start: bool = True
    ) -> tuple[Permit, ...] | str:
        """Issue up to `count` permits of the oldest batch that has any, or return why no permit is available.

        If `may_start` is false, issue only permits of started batches and of older ones.
        """
        for batch in self._batches if may_start else self._started_batches:
            if batch.unissued:
                units = [batch.unissued.popleft() for _ in range(min(count, len(batch.unissued)))]
                for unit in units:
                    batch.holders[unit] = (worker, incarnation, self.version)
                return tuple(Permit(batch.number, unit, self.version) for unit in units)
        return f"the learner: permits for all units of version {self.version} are issued"

    def revoke(self, worker: int, incarnation: int) -> int:
        """Revoke the unused permits of a worker, so that they can be issued again; return their number."""
        revoked = 0
        for batch in self._batches:
            for unit, holder in list(batch.holders.items()):
                if holder[:2] == (worker, incarnation):
                    del batch.holders[unit]
                    batch.unissued.appendleft(unit)
                    revoked += 1
        return revoked

    def put(self, permit: Permit, worker: int, incarnation: int, trajectory: Trajectory) -> bool:
        """Store a trajectory as the unit of its permit, or discard the trajectory and count its steps.

        Returns:
            True if the trajectory was stored. False if the permit was used before or revoked, if its batch was
            discarded, or if the versions of trajectory and permit differ.
        """
        for batch in self._batches:
            if batch.number != permit.batch:
                continue
            valid = batch.holders.get(permit.unit) == (worker, incarnation, permit.version)
            if valid and trajectory.version == permit.version:
                del batch.holders[permit.unit]
                batch.units[permit.unit] = trajectory
                return True
        self.discarded_steps += trajectory.steps
        return False

    def take(self) -> tuple[Trajectory, ...] | str:
        """Remove the oldest batch and return its units in permit order, or return why it is not available."""
        if not self._batches:
            return f"the learner: no weights published since the batch of version {self.version} was taken"
        oldest = self._batches[0]
        if not oldest.complete:
            received = sum(unit is not None for unit in oldest.units)
            return f"trajectories: {received} of {self.units_per_batch} units of version {oldest.version} received"
        self._batches.popleft()
        return tuple(unit for unit in oldest.units if unit is not None)

    def publish(self, version: int) -> None:
        """Record that the learner published `version`: discard batches that are now too old, and open new ones.

        Raises:
            ValueError: `version` is lower than the newest published version.
        """
        if version < self.version:
            raise ValueError(f"the version must be at least {self.version}, got {version}")
        self.version = version
        for batch in [batch for batch in self._batches if batch.version < version - self.max_policy_lag]:
            self.discarded_steps += sum(unit.steps for unit in batch.units if unit is not None)
            self._batches.remove(batch)
        self._open_batches()
