"""Sized iterables that feed a Trainer: from this process, or from a replay server with prefetch.

Both have a length, because Lightning prefetches from an iterable without one, and a prefetched batch is stale.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Generic

from actors.policies import Policy
from actors.rollout import RolloutSpec
from actors.segments import SegmentBuilder, TrajectoryBuilder
from actors.vector_runner import VectorStep
from learner.batches import Item, TrajectoryBatch, TransitionBatch, pin
from replay.client import ReplayClient, TrajectoryClient
from replay.errors import StalePolicy
from replay.messages import Permit
from replay.seeds import spawn_seed
from replay.server import ReplaySpec
from replay.table import TransitionTable
from replay.trajectory_server import QueueSpec
from replay.types import Array, EpisodeResult, Moments, Trajectory

_SAMPLES_AHEAD = 1  # fetched; and one more is asked for


class Experience(Generic[Item]):
    """What feeds a Trainer: an iterable of batches, of a known length, that goes on where the last epoch ended."""

    def __init__(self, length: int) -> None:
        """Yield `length` items an epoch."""
        self._length = length
        self.returns = Moments()

    def __len__(self) -> int:
        """Return the items in an epoch."""
        return self._length

    def published(self, version: int) -> None:
        """Take note that the learner published a version of its weights."""

    def update_priorities(self, ids: Array, priorities: Array) -> None:
        """Say how much is to be learned from transitions, `[B]` each; trajectories have no priorities."""
        raise NotImplementedError

    # A stream has no place to go back to; with these two Lightning lets it go on in the middle of an epoch.

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing back."""


class LocalExperience(Experience[Item]):
    """Rolls out in this process, in turn with the updates."""

    def __init__(self, policy: Policy, rollout: RolloutSpec, *, length: int) -> None:
        """Make the environments.

        Args:
            policy: acts; it is the learner's own, so its weights are never stale.
            rollout: how experience is made.
            length: items in an epoch.
        """
        super().__init__(length)
        self._policy = policy
        environment_seed, policy_seed = spawn_seed(rollout.run_seed, "worker").spawn(2)
        policy.begin(policy_seed)
        self._lanes = rollout.make_runner(environment_seed)
        self.env_steps = 0
        self.episodes: list[EpisodeResult] = []

    def __iter__(self) -> Iterator[Item]:
        """Yield one epoch; the next goes on where this one ended."""
        for _ in range(len(self)):
            yield self.next()

    def next(self) -> Item:
        """Roll out as far as the next batch asks for, and return it."""
        raise NotImplementedError

    def _step(self) -> VectorStep:
        row = self._lanes.step(self._policy, step=self.env_steps)
        self.env_steps += row.steps
        self.episodes += (result for _, result in row.episodes)
        self.returns = self.returns.merged(self._lanes.returns)
        self._lanes.returns = Moments()
        return row


class LocalTransitions(LocalExperience[TransitionBatch]):
    """Stores and samples in this process too, at the ratio of the rate limiter."""

    def __init__(self, policy: Policy, rollout: RolloutSpec, replay: ReplaySpec, *, length: int) -> None:
        """Make the environments and the table.

        Args:
            policy: acts.
            rollout: how experience is made.
            replay: how it is kept and at which rate it is drawn.
            length: batches in an epoch.
        """
        super().__init__(policy, rollout, length=math.ceil(length / replay.batches_per_sample))
        self._replay = replay
        self._builder = SegmentBuilder(rollout.layout, rollout.num_envs, rollout.gamma)
        self._table = TransitionTable(replay.table, seed=spawn_seed(rollout.run_seed, "replay"))
        self._limiter = replay.limiter()
        self._begun = False

    def next(self) -> TransitionBatch:
        """Roll out as far as the limiter asks for, and draw k batches."""
        k, batch_size = self._replay.batches_per_sample, self._replay.batch_size
        while self._limiter.sample_waits_for(k * batch_size) is not None:
            self._roll_out()
        self._limiter.record_sample(k * batch_size)
        return TransitionBatch.of(self._table.sample(k, batch_size))

    def _roll_out(self) -> None:
        if not self._begun:
            self._builder.begin(self._lanes.reset())
            self._begun = True
        row = self._step()
        segments = self._builder.add(row.action, row.reward, row.terminated, row.truncated, row.observation, row.failed)
        if segments:
            self._table.insert(segments)
            self._limiter.record_insert(segments.steps)

    def update_priorities(self, ids: Array, priorities: Array) -> None:
        """See `TransitionTable.update_priorities`."""
        self._table.update_priorities(ids, priorities)


class LocalTrajectories(LocalExperience[TrajectoryBatch]):
    """Whole batches of trajectories under the newest weights, which are those of this very process."""

    def __init__(self, policy: Policy, rollout: RolloutSpec, queue: QueueSpec, *, length: int) -> None:
        """Make the environments.

        Args:
            policy: acts.
            rollout: how experience is made.
            queue: how many trajectories make a batch.
            length: batches in an epoch.
        """
        # A lane without a share in the batch would step for nothing.
        rollout = replace(rollout, num_envs=min(rollout.num_envs, queue.units_per_batch))
        super().__init__(policy, rollout, length=length)
        self._units = queue.units_per_batch
        self._whole_episodes = rollout.trajectory_rows is None
        self._builder = TrajectoryBuilder(rollout.num_envs, rollout.gamma, rows=rollout.trajectory_rows)
        self._batches = 0
        self._begun = False

    def next(self) -> TrajectoryBatch:
        """Roll out one batch, its size in trajectories fixed in advance."""
        done: dict[int, Trajectory] = {}
        unissued = list(range(self._units))
        while len(done) < self._units:
            if not self._builder.busy:
                self._begin(unissued)
            row = self._step()
            for permit, trajectory in self._builder.add(
                row.action, row.log_probability, row.reward, row.terminated, row.truncated, row.observation, row.failed
            ):
                done[permit.unit] = trajectory
        self._batches += 1
        return TrajectoryBatch.of([done[unit] for unit in range(self._units)])

    def _begin(self, unissued: list[int]) -> None:
        if not self._begun or self._whole_episodes:
            self._builder.begin(self._lanes.reset())
            self._begun = True
        for lane in self._builder.idle[: len(unissued)]:
            self._builder.assign(lane, Permit(self._batches, unissued.pop(0), self._batches))


class RemoteExperience(Experience[Item]):
    """Batches from a server, fetched by a thread, until the server says that nothing more will come."""

    def __init__(self, client: ReplayClient | TrajectoryClient, *, length: int, ahead: int) -> None:
        """Start nothing yet; the thread starts with the first batch.

        Args:
            client: of the server.
            length: items in an epoch.
            ahead: items fetched before they are asked for.
        """
        super().__init__(length)
        self._client = client
        # What may be fetched now: `ahead` items, and one more for each that is asked for.
        self._wanted = threading.Semaphore(ahead)
        self._fetched: queue.SimpleQueue[Item | BaseException | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self.while_waiting: Callable[[], None] = lambda: None
        self.precompute_targets: Callable[[Item], Item] = lambda item: item  # called by the thread, on what it fetched
        self.for_gpu = False  # whether items are put where a GPU can fetch them by itself
        self.seconds_waited = 0.0
        self.finished = False

    @property
    def waiting_for(self) -> str | None:
        """What the next batch waits for, or None."""
        return self._client.waiting_for

    def __iter__(self) -> Iterator[Item]:
        """Yield one epoch, or less if the server has nothing more; `while_waiting` is called while none is there.

        Raises:
            Exception: what the fetching thread met.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._fetch_all, name="prefetch", daemon=True)
            self._thread.start()
        for _ in range(len(self)):
            self._wanted.release()
            item = self._next()
            if item is None:
                self.finished = True
                return
            yield item

    def _next(self) -> Item | None:
        while not self._stop.is_set() and not self.finished:
            begun = time.monotonic()
            try:
                item = self._fetched.get(timeout=0.1)
            except queue.Empty:
                self.seconds_waited += time.monotonic() - begun
                self.while_waiting()
                continue
            self.seconds_waited += time.monotonic() - begun
            if isinstance(item, BaseException):
                raise item
            return item
        return None

    def _fetch_all(self) -> None:
        item: Item | BaseException | None = None
        try:
            while not self._stop.is_set():
                if not self._wanted.acquire(timeout=0.1):
                    continue
                item = self._fetch()
                if item is None:
                    break
                self._fetched.put(item.map(pin) if self.for_gpu else self.precompute_targets(item))
            item = None
        except BaseException as error:
            item = error
        self._fetched.put(item)

    def _fetch(self) -> Item | None:
        """Return the server's next item, or None if there is nothing more or `_stop` was set."""
        raise NotImplementedError

    def interrupt(self) -> None:
        """End the wait for a batch, if there is one, and the iteration."""
        self._stop.set()

    def close(self) -> None:
        """End the thread; what it fetched ahead is dropped."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5.0)


class RemoteTransitions(RemoteExperience[TransitionBatch]):
    """Batches from a replay server, fetched ahead."""

    _client: ReplayClient

    def __init__(self, replay: ReplayClient, *, k: int, batch_size: int, length: int) -> None:
        """Start nothing yet.

        Args:
            replay: the server.
            k: batches in one call.
            batch_size: transitions in a batch.
            length: batches in an epoch.
        """
        super().__init__(replay, length=math.ceil(length / k), ahead=_SAMPLES_AHEAD)
        self._k, self._batch_size = k, batch_size

    def _fetch(self) -> TransitionBatch | None:
        reply = self._client.sample(self._k, self._batch_size, stop=self._stop, ahead=True)
        if reply is None or reply.batch is None:
            return None
        self.returns = reply.returns
        return TransitionBatch.of(reply.batch)

    def update_priorities(self, ids: Array, priorities: Array) -> None:
        """Send new priorities to the server without waiting."""
        self._client.update_priorities(ids, priorities)


class RemoteTrajectories(RemoteExperience[TrajectoryBatch]):
    """Batches from a trajectory server, each fetched only when it is asked for."""

    _client: TrajectoryClient

    def __init__(self, client: TrajectoryClient, *, max_policy_lag: int, length: int) -> None:
        """Start nothing yet.

        Args:
            client: of the server.
            max_policy_lag: versions that a trajectory may be older than the newest published one.
            length: batches in an epoch.
        """
        super().__init__(client, length=length, ahead=0)
        self._max_policy_lag = max_policy_lag
        self._version = 0

    def published(self, version: int) -> None:
        """Tell the server, which issues permits for this version from now on."""
        self._version = version
        self._client.publish(version)

    def _fetch(self) -> TrajectoryBatch | None:
        published = self._version
        reply = self._client.take(stop=self._stop)
        if reply is None or reply.trajectories is None:
            return None
        self.returns = reply.returns
        batch = TrajectoryBatch.of(reply.trajectories)
        # Meanwhile the same weights may have been published anew, for a store that was recreated.
        if batch.version < published - self._max_policy_lag:
            raise StalePolicy(f"a trajectory of version {batch.version} came when {published} was published")
        return batch
