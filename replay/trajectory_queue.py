"""TrajectoryQueue: first in, first out, each item consumed once, for on-policy algorithms.

A global batch is a fixed number of units (a unit is one lane's T steps, or one whole episode), opened for one
version of the weights. Workers ask for permits, one a unit, and only experience that carries a permit is taken,
so no batch is "whatever finished first", which would favour short episodes, and curves do not depend on the
number of workers. Batches leave in the order they were opened; units lie in a batch in permit order.
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
    number: int
    version: int
    units: list[Trajectory | None]
    unissued: deque[int]
    holders: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # unit -> (worker, incarnation, version)

    @property
    def complete(self) -> bool:
        return all(unit is not None for unit in self.units)

    @property
    def begun(self) -> bool:
        return len(self.unissued) < len(self.units)


class TrajectoryQueue:
    """Bounded queue of global batches; a plain object, one caller at a time.

    At most `1 + max_policy_lag` batches are open or waiting at once, and permits are issued for the newest
    published version only, so no trajectory is ever trained on by weights more than `max_policy_lag` versions
    newer. With a lag of 0 every unit of a batch is of one version, the one that trains on it.
    """

    def __init__(self, units_per_batch: int, *, max_policy_lag: int = 0, version: int = 0) -> None:
        """Open the first batch for `version`.

        Raises:
            ConfigurationError: units_per_batch is not positive or max_policy_lag negative.
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
        self._fill()

    def _fill(self) -> None:
        while len(self._batches) < 1 + self.max_policy_lag:
            unissued = deque(range(self.units_per_batch))
            self._batches.append(_OpenBatch(self._opened, self.version, [None] * self.units_per_batch, unissued))
            self._opened += 1

    @property
    def complete_batches(self) -> int:
        """Batches that could be taken now."""
        return sum(1 for _ in takewhile(lambda batch: batch.complete, self._batches))

    @property
    def _under_way(self) -> list[_OpenBatch]:
        """The newest batch of which units are handed out or in, and those before it, which leave before it does."""
        batches = list(self._batches)
        while batches and not batches[-1].begun:
            batches.pop()
        return batches

    @property
    def begun(self) -> bool:
        """Whether a batch is under way."""
        return bool(self._under_way)

    @property
    def incomplete(self) -> bool:
        """Whether units of the batches under way are still to come."""
        return any(not batch.complete for batch in self._under_way)

    def __len__(self) -> int:
        """Return the trajectories held."""
        return sum(unit is not None for batch in self._batches for unit in batch.units)

    @property
    def bytes(self) -> int:
        """Memory of the trajectories held."""
        return sum(unit.bytes for batch in self._batches for unit in batch.units if unit is not None)

    def forget_earlier(self, worker: int, incarnation: int) -> None:
        """Take back what earlier incarnations of a worker hold, since it lives again."""
        for batch in self._batches:
            for holder in set(batch.holders.values()):
                if holder[0] == worker and holder[1] < incarnation:
                    self.revoke(worker, holder[1])

    def request_permits(
        self, worker: int, incarnation: int, count: int, *, may_begin: bool = True
    ) -> tuple[Permit, ...] | str:
        """Issue up to `count` permits of the oldest batch that has any; or say why there is none.

        Without `may_begin` only of batches under way.
        """
        for batch in self._batches if may_begin else self._under_way:
            if batch.unissued:
                units = [batch.unissued.popleft() for _ in range(min(count, len(batch.unissued)))]
                for unit in units:
                    batch.holders[unit] = (worker, incarnation, self.version)
                return tuple(Permit(batch.number, unit, self.version) for unit in units)
        return f"the learner: every unit for version {self.version} is handed out"

    def revoke(self, worker: int, incarnation: int) -> int:
        """Take back what a dead worker still holds, to be issued again; return how many permits."""
        revoked = 0
        for batch in self._batches:
            for unit, holder in list(batch.holders.items()):
                if holder[:2] == (worker, incarnation):
                    del batch.holders[unit]
                    batch.unissued.appendleft(unit)
                    revoked += 1
        return revoked

    def put(self, permit: Permit, worker: int, incarnation: int, trajectory: Trajectory) -> bool:
        """Accept a unit, or discard it and count its steps.

        Returns:
            False if the permit is spent or revoked, its batch is given up, or the trajectory's version is not
            the permit's.
        """
        for batch in self._batches:
            if batch.number != permit.batch:
                continue
            held = batch.holders.get(permit.unit) == (worker, incarnation, permit.version)
            if held and trajectory.version == permit.version:
                del batch.holders[permit.unit]
                batch.units[permit.unit] = trajectory
                return True
        self.discarded_steps += trajectory.steps
        return False

    def take(self) -> tuple[Trajectory, ...] | str:
        """Remove and return the oldest batch, units in permit order; or say what it waits for."""
        if not self._batches:
            return f"the learner: nothing is published since version {self.version} was taken"
        oldest = self._batches[0]
        if not oldest.complete:
            done = sum(unit is not None for unit in oldest.units)
            return f"trajectories: {done} of {self.units_per_batch} units for version {oldest.version} are in"
        self._batches.popleft()
        return tuple(unit for unit in oldest.units if unit is not None)

    def publish(self, version: int) -> None:
        """Say that the learner published `version`; opens batches for it and gives up those grown too old.

        Raises:
            ValueError: versions go backwards.
        """
        if version < self.version:
            raise ValueError(f"versions only grow: {version} comes after {self.version}")
        self.version = version
        for batch in [batch for batch in self._batches if batch.version < version - self.max_policy_lag]:
            self.discarded_steps += sum(unit.steps for unit in batch.units if unit is not None)
            self._batches.remove(batch)
        self._fill()
