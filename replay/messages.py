"""Messages between processes: frozen dataclasses with their shapes, dtypes, and units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from replay.types import NO_MOMENTS, Array, EpisodeResult, Layout, Moments, Segment, Segments, StepArrays, Trajectory


@dataclass(frozen=True)
class Permit:
    """Permission to produce one unit of a global batch, that is, one trajectory, with one version of the weights.

    Attributes:
        batch: number of the global batch.
        unit: index of the unit in the batch.
        version: version of the weights to act with.
    """

    batch: int
    unit: int
    version: int


@dataclass(frozen=True)
class Push:
    """One message of experience from a worker.

    A push is identified by (worker, incarnation, sequence), so a server can recognize a repeated push.

    Attributes:
        worker: index of the sending worker.
        incarnation: number of times that worker was recreated.
        sequence: 0, 1, 2, ... within one incarnation.
        segments: off-policy experience; a worker sends segments that it cut at the same time as one `Segments`.
        episodes: episodes that ended since the last push.
        trajectories: on-policy experience, each trajectory with the permit under which it was produced.
        returns: moments of the discounted returns of the steps since the last push; see `VectorRunner`.
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
        """Number of environment steps in the push."""
        return sum(part.steps for part in self._parts)

    @property
    def bytes(self) -> int:
        """Size of the experience in bytes."""
        return sum(part.bytes for part in self._parts)

    @property
    def _parts(self) -> Iterator[StepArrays | Trajectory]:
        yield from (self.segments,) if isinstance(self.segments, Segments) else self.segments
        yield from (trajectory for _, trajectory in self.trajectories)


@dataclass(frozen=True)
class Batch:
    """k batches of B sampled transitions; the two observation arrays may share memory, so do not modify them in place.

    Attributes:
        observation: `[k, B, *observation_shape]`.
        action: `[k, B, *action_shape]`.
        reward: `[k, B]` float32, n-step.
        discount: `[k, B]` float32, n-step.
        next_observation: `[k, B, *observation_shape]`, the observation to bootstrap from.
        ids: `[k, B]` int64, the ids to pass to `update_priorities`.
        probability: `[k, B]` float64, the probability with which each item was sampled.
        size: number of transitions in the table when the batch was sampled.
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
    """Location of a table's frames in shared memory, for processes of the same node; see `replay.frames`.

    Attributes:
        pid: process ID of the owner.
        descriptor: file descriptor of the memory in the owner.
        token: random number that the memory's header contains too, so that a reader recognizes the right memory.
        capacity: number of frames that fit.
        layout: shape and dtype of a frame.
    """

    pid: int
    descriptor: int
    token: int
    capacity: int
    layout: Layout


@dataclass(frozen=True)
class SampleIndices:
    """k batches of B sampled transitions, with frame indices in place of observations; other fields as in `Batch`.

    Attributes:
        row: `[k, B]` int32, slot of the observation's newest frame in the ring of frames.
        age: `[k, B]` uint8, see `Segment`.
        bootstrap_row: `[k, B]` int32, slot of the next observation's newest frame.
        bootstrap_age: `[k, B]` uint8.
        oldest_frame: counter of the oldest frame in the table at the time of sampling.
        frames: location of the frames, or None if other processes cannot read them.
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
    """Reply to an insert. Unless the run is finished, exactly one of `accepted`, `repeated`, and `wait` is set.

    Attributes:
        env_steps: environment steps of all workers that the run has accepted so far.
        accepted: whether the push is now in the table.
        repeated: whether the push was accepted before, and therefore ignored.
        finished: whether the run has all its steps, so that the worker must send nothing more.
        wait: why the insert may not proceed now, or None.
    """

    env_steps: int
    accepted: bool = False
    repeated: bool = False
    finished: bool = False
    wait: str | None = None


@dataclass(frozen=True)
class SampleReply:
    """Reply to a sample call: the batches, the reason to wait, or the end of the run.

    Attributes:
        batch: the sampled batches.
        indices: replaces `batch` for a caller that reads the frames from shared memory.
        wait: why the call may not proceed now, or None.
        finished: whether no further batches will follow.
        returns: moments of all discounted returns in the pushes so far.
    """

    batch: Batch | None = None
    indices: SampleIndices | None = None
    wait: str | None = None
    finished: bool = False
    returns: Moments = NO_MOMENTS


@dataclass(frozen=True)
class PermitReply:
    """Reply to a request for permits: the permits, the reason to wait, or the end of the run."""

    permits: tuple[Permit, ...] = ()
    wait: str | None = None
    finished: bool = False


@dataclass(frozen=True)
class TakeReply:
    """Reply to a take call: one global batch of trajectories, the reason to wait, or the end of the run.

    Attributes:
        trajectories: the global batch.
        wait: why the call may not proceed now, or None.
        finished: whether no further batches will follow.
        returns: moments of all discounted returns in the pushes so far.
    """

    trajectories: tuple[Trajectory, ...] | None = None
    wait: str | None = None
    finished: bool = False
    returns: Moments = NO_MOMENTS


@dataclass(frozen=True)
class ShardReport:
    """The state of one shard's table.

    Attributes:
        incarnation: incarnation of the shard.
        size: number of transitions.
        mass: sum of the sampling weights: of the prioritized weights, or 1 for each transition of a uniform table.
        highest_priority: highest priority that the shard has seen.
        inserted: total environment steps inserted by this incarnation.
    """

    incarnation: int
    size: int
    mass: float
    highest_priority: float
    inserted: int


@dataclass(frozen=True)
class ReserveReply:
    """Reply to a worker's request to send a push.

    The worker may send the push unless `repeated`, `finished`, or `wait` is set.

    Attributes:
        env_steps: environment steps of all workers that the run has accepted so far.
        shards: shards that accept pushes now.
        highest_priority: highest priority that any shard has seen.
        repeated: whether the push was accepted before.
        finished: whether the run has all its steps.
        wait: why the push may not proceed now, or None.
    """

    env_steps: int
    shards: tuple[int, ...] = ()
    highest_priority: float = 1.0
    repeated: bool = False
    finished: bool = False
    wait: str | None = None


@dataclass(frozen=True)
class SamplePlan:
    """The shard, and the position in it, from which to sample each of k x B items of a sharded replay.

    Attributes:
        shard: `[k * B]` int64, shard of each item.
        fraction: `[k * B]` float64 in [0, 1), position of each item in its shard, as a fraction of the shard's mass.
        share: shard -> the shard's fraction of the total mass.
        incarnations: shard -> incarnation for which the plan was made.
        size: number of transitions in all shards.
        returns: moments of all discounted returns in the pushes so far.
    """

    shard: Array
    fraction: Array
    share: dict[int, float]
    incarnations: dict[int, int]
    size: int
    returns: Moments


@dataclass(frozen=True)
class SamplePlanReply:
    """Reply to a sample call to a replay router: the plan, the reason to wait, or the end of the run."""

    plan: SamplePlan | None = None
    wait: str | None = None
    finished: bool = False
