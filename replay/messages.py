"""Messages between processes: frozen dataclasses, each with its shapes, dtypes and units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from replay.types import NO_MOMENTS, Array, EpisodeResult, Layout, Moments, Segment, Segments, StepArrays, Trajectory


@dataclass(frozen=True)
class Permit:
    """Leave to produce one unit of one batch of trajectories, with one version of the weights."""

    batch: int
    unit: int
    version: int


@dataclass(frozen=True)
class Push:
    """What a worker sends at once. (worker, incarnation, sequence) makes a repeat recognisable.

    Attributes:
        worker: index of the sending worker.
        incarnation: how often that worker was recreated.
        sequence: 0, 1, 2, ... within one incarnation.
        segments: off-policy experience; what a worker cuts at once are `Segments`.
        episodes: episodes that ended since the last push.
        trajectories: on-policy experience, each with the permit it was produced under.
        returns: of the discounted returns of the steps since the last push, see `VectorRunner`.
    """

    worker: int
    incarnation: int
    sequence: int
    segments: Sequence[Segment] = ()
    episodes: tuple[EpisodeResult, ...] = ()
    trajectories: tuple[tuple[Permit, Trajectory], ...] = ()
    returns: Moments = NO_MOMENTS

    @property
    def steps(self) -> int:
        """Environment steps in here."""
        return sum(part.steps for part in self._parts)

    @property
    def bytes(self) -> int:
        """Memory of its experience."""
        return sum(part.bytes for part in self._parts)

    @property
    def _parts(self) -> Iterator[StepArrays | Trajectory]:
        yield from (self.segments,) if isinstance(self.segments, Segments) else self.segments
        yield from (trajectory for _, trajectory in self.trajectories)


@dataclass(frozen=True)
class Batch:
    """k batches of B sampled transitions; observations may share memory with each other, so they are not written on.

    Attributes:
        observation: `[k, B, *observation_shape]`.
        action: `[k, B, *action_shape]`.
        reward: `[k, B]` float32, n-step.
        discount: `[k, B]` float32, n-step.
        next_observation: `[k, B, *observation_shape]`, the observation to bootstrap from.
        ids: `[k, B]` int64, to be handed back with new priorities.
        probability: `[k, B]` float64, with which each item was drawn.
        size: transitions in the table when the batch was drawn.
    """

    observation: Array
    action: Array
    reward: Array
    discount: Array
    next_observation: Array
    ids: Array
    probability: Array
    size: int


@dataclass(frozen=True)
class SharedMemoryHandle:
    """Where a table's frames lie, for processes of the same node; see `replay.frames`.

    Attributes:
        pid: of the process that holds them.
        descriptor: number of its open file.
        token: that is written there too, so that no other memory is taken for it.
        capacity: frames there is room for.
        layout: shape and dtype of a frame.
    """

    pid: int
    descriptor: int
    token: int
    capacity: int
    layout: Layout


@dataclass(frozen=True)
class SampleIndices:
    """k batches of B sampled transitions, with rows in place of observations; the rest as in `Batch`.

    Attributes:
        row: `[k, B]` int32, slot of the observation's newest frame.
        age: `[k, B]` uint8, see `Segment`.
        bootstrap_row: `[k, B]` int32, slot of the next observation's newest frame.
        bootstrap_age: `[k, B]` uint8.
        oldest_frame: counter of the oldest frame held when this was drawn.
        frames: where they lie, if processes of the same node may read them.
    """

    row: Array
    age: Array
    bootstrap_row: Array
    bootstrap_age: Array
    action: Array
    reward: Array
    discount: Array
    ids: Array
    probability: Array
    size: int
    oldest_frame: int
    frames: SharedMemoryHandle | None


@dataclass(frozen=True)
class InsertReply:
    """Answer to an insert. Exactly one of accepted, repeated, `wait` holds, unless the run is finished.

    Attributes:
        env_steps: environment steps accepted in this run so far, from all workers.
        accepted: the push is in the table.
        repeated: the push had been accepted before and was ignored.
        finished: the run has all the steps it wants; send nothing more.
        wait: why the insert may not proceed now, or None.
    """

    env_steps: int
    accepted: bool = False
    repeated: bool = False
    finished: bool = False
    wait: str | None = None


@dataclass(frozen=True)
class SampleReply:
    """Answer to a sample: a batch, or the reason to wait, or the word that nothing more will come.

    A caller that reads frames where they lie gets a `indices` in place of the batch.
    `returns` are the moments of all discounted returns that came with pushes.
    """

    batch: Batch | None = None
    indices: SampleIndices | None = None
    wait: str | None = None
    finished: bool = False
    returns: Moments = NO_MOMENTS


@dataclass(frozen=True)
class PermitReply:
    """Answer to a request for permits: some, or the reason to wait, or the word that the run is finished."""

    permits: tuple[Permit, ...] = ()
    wait: str | None = None
    finished: bool = False


@dataclass(frozen=True)
class TakeReply:
    """Answer to a take: one global batch of trajectories, or the reason to wait, or that nothing more will come.

    `returns` are the moments of all discounted returns that came with pushes.
    """

    trajectories: tuple[Trajectory, ...] | None = None
    wait: str | None = None
    finished: bool = False
    returns: Moments = NO_MOMENTS


@dataclass(frozen=True)
class ShardReport:
    """What one shard holds.

    Attributes:
        incarnation: of the shard.
        size: transitions.
        mass: what draws are in proportion to, the number of transitions, or the sum of their weights.
        highest_priority: highest priority it has seen.
        inserted: environment steps that this incarnation took, in all.
    """

    incarnation: int
    size: int
    mass: float
    highest_priority: float
    inserted: int


@dataclass(frozen=True)
class ReserveReply:
    """Answer to a worker that wants to send a push; it may unless one of the last three says otherwise.

    Attributes:
        env_steps: environment steps accepted in this run so far, from all workers.
        shards: those that take pushes now.
        highest_priority: highest priority that any shard has seen.
        repeated: the push had been accepted before.
        finished: the run has all the steps it wants.
        wait: why it may not proceed now, or None.
    """

    env_steps: int
    shards: tuple[int, ...] = ()
    highest_priority: float = 1.0
    repeated: bool = False
    finished: bool = False
    wait: str | None = None


@dataclass(frozen=True)
class SamplePlan:
    """Where in a replay of several shards to draw each of k x B items.

    Attributes:
        shard: `[k * B]` int64, which shard to draw from.
        place: `[k * B]` float64 in [0, 1), where in that shard's mass.
        share: shard -> its part of the whole mass.
        incarnations: shard -> incarnation that the places are for.
        size: transitions in all shards.
        returns: moments of all discounted returns that came with pushes.
    """

    shard: Array
    fraction: Array
    share: dict[int, float]
    incarnations: dict[int, int]
    size: int
    returns: Moments


@dataclass(frozen=True)
class SamplePlanReply:
    """Answer to a sample of a replay in shards: places, or the reason to wait, or that nothing more will come."""

    plan: SamplePlan | None = None
    wait: str | None = None
    finished: bool = False
