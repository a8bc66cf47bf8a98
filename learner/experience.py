"""Sized iterables of batches that feed a Trainer: generated in this process, or fetched from a server.

Each iterable has a length, because Lightning prefetches one more batch from an iterable without a length. That batch
would be stale.
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

_PREFETCHED_SAMPLES = 1  # sample calls whose batches are ready in advance; the client has one more in flight


class Experience(Generic[Item]):
    """An iterable of batches for a Trainer. Each epoch has the same length and continues where the last one ended.

    Attributes:
        returns: moments of the discounted return.
    """

    def __init__(self, length: int) -> None:
        """Set the number of items in an epoch to `length`."""
        self._length = length
        self.returns = Moments()

    def __len__(self) -> int:
        """Return the number of items in an epoch."""
        return self._length

    def on_publish(self, version: int) -> None:
        """Handle the publication of a version of the learner's weights."""

    def update_priorities(self, ids: Array, priorities: Array) -> None:
        """Set the priorities of transitions, `[B]` each. Trajectories have no priorities."""
        raise NotImplementedError

    # A stream has no position to restore. With these two methods Lightning can resume in the middle of an epoch.

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignore the state, which is empty."""


class LocalExperience(Experience[Item]):
    """Experience generated in this process, alternating with the updates.

    Attributes:
        env_steps: environment steps so far.
        episodes: results of the episodes that ended; the reader clears the list.
    """

    def __init__(self, policy: Policy, rollout: RolloutSpec, *, length: int) -> None:
        """Create the environments.

        Args:
            policy: acting module of the learner, so that the weights are never stale.
            rollout: specification of the rollout.
            length: number of items in an epoch.
        """
        super().__init__(length)
        self._policy = policy
        environment_seed, policy_seed = spawn_seed(rollout.run_seed, "worker").spawn(2)
        policy.begin(policy_seed)
        self._runner = rollout.make_runner(environment_seed)
        self.env_steps = 0
        self.episodes: list[EpisodeResult] = []

    def __iter__(self) -> Iterator[Item]:
        """Yield one epoch, which continues where the last one ended."""
        for _ in range(len(self)):
            yield self.next()

    def next(self) -> Item:
        """Step the environments as often as the next item needs, and return the item."""
        raise NotImplementedError

    def _step(self) -> VectorStep:
        step = self._runner.step(self._policy, step=self.env_steps)
        self.env_steps += step.steps
        self.episodes += (result for _, result in step.episodes)
        self.returns = self.returns.merged(self._runner.returns)
        self._runner.returns = Moments()
        return step


class LocalTransitions(LocalExperience[TransitionBatch]):
    """Transitions generated, stored, and sampled in this process, at the ratio of the rate limiter."""

    def __init__(self, policy: Policy, rollout: RolloutSpec, replay: ReplaySpec, *, length: int) -> None:
        """Create the environments and the replay table.

        Args:
            policy: acting module.
            rollout: specification of the rollout.
            replay: specification of the replay table and of the rate limiter.
            length: number of batches in an epoch.
        """
        super().__init__(policy, rollout, length=math.ceil(length / replay.batches_per_sample))
        self._replay = replay
        self._builder = SegmentBuilder(rollout.layout, rollout.num_envs, rollout.gamma)
        self._table = TransitionTable(replay.table, seed=spawn_seed(rollout.run_seed, "replay"))
        self._limiter = replay.limiter()
        self._was_reset = False

    def next(self) -> TransitionBatch:
        """Step the environments until the rate limiter admits a sample, and sample k batches."""
        k, batch_size = self._replay.batches_per_sample, self._replay.batch_size
        while self._limiter.sample_waits_for(k * batch_size) is not None:
            self._roll_out()
        self._limiter.record_sample(k * batch_size)
        return TransitionBatch.of(self._table.sample(k, batch_size))

    def _roll_out(self) -> None:
        if not self._was_reset:
            self._builder.begin(self._runner.reset())
            self._was_reset = True
        step = self._step()
        segments = self._builder.add(
            step.action, step.reward, step.terminated, step.truncated, step.observation, step.failed
        )
        if segments:
            self._table.insert(segments)
            self._limiter.record_insert(segments.steps)

    def update_priorities(self, ids: Array, priorities: Array) -> None:
        """See `TransitionTable.update_priorities`."""
        self._table.update_priorities(ids, priorities)


class LocalTrajectories(LocalExperience[TrajectoryBatch]):
    """Batches of trajectories generated in this process by the newest weights."""

    def __init__(self, policy: Policy, rollout: RolloutSpec, queue: QueueSpec, *, length: int) -> None:
        """Create the environments.

        Args:
            policy: acting module.
            rollout: specification of the rollout.
            queue: specification of the trajectory queue, which sets the number of trajectories in a batch.
            length: number of batches in an epoch.
        """
        # With more lanes than trajectories in a batch, the steps of the additional lanes would not be used.
        rollout = replace(rollout, num_envs=min(rollout.num_envs, queue.units_per_batch))
        super().__init__(policy, rollout, length=length)
        self._units = queue.units_per_batch
        self._whole_episodes = rollout.trajectory_rows is None
        self._builder = TrajectoryBuilder(rollout.num_envs, rollout.gamma, rows=rollout.trajectory_rows)
        self._batches = 0
        self._was_reset = False

    def next(self) -> TrajectoryBatch:
        """Generate and return one batch, whose number of trajectories is fixed in advance."""
        done: dict[int, Trajectory] = {}
        unissued = list(range(self._units))
        while len(done) < self._units:
            if not self._builder.busy:
                self._begin(unissued)
            step = self._step()
            for permit, trajectory in self._builder.add(
                step.action, step.log_probability, step.reward, step.terminated, step.truncated, step.observation,
                step.failed,
            ):  # fmt: skip
                done[permit.unit] = trajectory
        self._batches += 1
        return TrajectoryBatch.of([done[unit] for unit in range(self._units)])

    def _begin(self, unissued: list[int]) -> None:
        """Assign units of the batch, which are removed from `unissued`, to the idle lanes."""
        if not self._was_reset or self._whole_episodes:
            self._builder.begin(self._runner.reset())
            self._was_reset = True
        for lane in self._builder.idle[: len(unissued)]:
            self._builder.assign(lane, Permit(self._batches, unissued.pop(0), self._batches))


class RemoteExperience(Experience[Item]):
    """Batches from a server, fetched by a thread, until the server reports the end of the run.

    Attributes:
        while_waiting: called repeatedly by the iterating thread while no batch is ready.
        precompute_targets: called by the prefetch thread on each item, unless `pin_memory` is set.
        pin_memory: whether the prefetch thread copies items to page-locked memory.
        seconds_waited: time that the iterating thread waited for batches.
        finished: whether no more batches will come: the run has ended, or `interrupt` was called.
    """

    def __init__(self, client: ReplayClient | TrajectoryClient, *, length: int, prefetch: int) -> None:
        """Prepare the prefetch thread, which starts with the first iteration.

        Args:
            client: client of the server.
            length: number of items in an epoch.
            prefetch: number of items fetched before they are requested.
        """
        super().__init__(length)
        self._client = client
        # One slot for each item that the thread may fetch now: `prefetch` slots, and one more per requested item.
        self._fetch_slots = threading.Semaphore(prefetch)
        self._fetched: queue.SimpleQueue[Item | BaseException | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self.while_waiting: Callable[[], None] = lambda: None
        self.precompute_targets: Callable[[Item], Item] = lambda item: item
        self.pin_memory = False
        self.seconds_waited = 0.0
        self.finished = False

    @property
    def waiting_for(self) -> str | None:
        """The server's reason why the next batch must wait, or None."""
        return self._client.waiting_for

    def __iter__(self) -> Iterator[Item]:
        """Yield one epoch, or less if the run ends; call `while_waiting` while no batch is ready.

        Raises:
            Exception: the exception that ended the prefetch thread.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._fetch_all, name="prefetch", daemon=True)
            self._thread.start()
        for _ in range(len(self)):
            self._fetch_slots.release()
            item = self._next()
            if item is None:
                self.finished = True
                return
            yield item

    def _next(self) -> Item | None:
        while not self._stop.is_set() and not self.finished:
            start = time.monotonic()
            try:
                item = self._fetched.get(timeout=0.1)
            except queue.Empty:
                self.seconds_waited += time.monotonic() - start
                self.while_waiting()
                continue
            self.seconds_waited += time.monotonic() - start
            if isinstance(item, BaseException):
                raise item
            return item
        return None

    def _fetch_all(self) -> None:
        """Fetch items until the end of the run or `_stop`; then put None, or the exception that ended the thread."""
        item: Item | BaseException | None = None
        try:
            while not self._stop.is_set():
                if not self._fetch_slots.acquire(timeout=0.1):
                    continue
                item = self._fetch()
                if item is None:
                    break
                self._fetched.put(item.map(pin) if self.pin_memory else self.precompute_targets(item))
            item = None
        except BaseException as error:
            item = error
        self._fetched.put(item)

    def _fetch(self) -> Item | None:
        """Return the server's next item, or None if the run has ended or `_stop` was set."""
        raise NotImplementedError

    def interrupt(self) -> None:
        """End the iteration, and the wait for a batch if there is one."""
        self._stop.set()

    def close(self) -> None:
        """Stop the prefetch thread and drop the prefetched items."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5.0)


class RemoteTransitions(RemoteExperience[TransitionBatch]):
    """Batches of transitions prefetched from a replay server."""

    _client: ReplayClient

    def __init__(self, replay: ReplayClient, *, k: int, batch_size: int, length: int) -> None:
        """Prepare the prefetch thread, which starts with the first iteration.

        Args:
            replay: client of the replay server.
            k: number of batches per sample call.
            batch_size: transitions in a batch.
            length: number of batches in an epoch.
        """
        super().__init__(replay, length=math.ceil(length / k), prefetch=_PREFETCHED_SAMPLES)
        self._k, self._batch_size = k, batch_size

    def _fetch(self) -> TransitionBatch | None:
        reply = self._client.sample(self._k, self._batch_size, stop=self._stop, ahead=True)
        if reply is None or reply.batch is None:
            return None
        self.returns = reply.returns
        return TransitionBatch.of(reply.batch)

    def update_priorities(self, ids: Array, priorities: Array) -> None:
        """Send new priorities to the server without waiting for a reply."""
        self._client.update_priorities(ids, priorities)


class RemoteTrajectories(RemoteExperience[TrajectoryBatch]):
    """Batches of trajectories from a trajectory server, each fetched only when it is requested."""

    _client: TrajectoryClient

    def __init__(self, client: TrajectoryClient, *, max_policy_lag: int, length: int) -> None:
        """Prepare the fetching thread, which starts with the first iteration.

        Args:
            client: client of the trajectory server.
            max_policy_lag: maximum number of versions between a trajectory and the last published weights.
            length: number of batches in an epoch.
        """
        super().__init__(client, length=length, prefetch=0)
        self._max_policy_lag = max_policy_lag
        self._version = 0

    def on_publish(self, version: int) -> None:
        """Send the version to the server, which issues permits only for this version from now on."""
        self._version = version
        self._client.publish(version)

    def _fetch(self) -> TrajectoryBatch | None:
        # Read before the call: during the call, the same weights may be published again for a recreated store.
        published = self._version
        reply = self._client.take(stop=self._stop)
        if reply is None or reply.trajectories is None:
            return None
        self.returns = reply.returns
        batch = TrajectoryBatch.of(reply.trajectories)
        if batch.version < published - self._max_policy_lag:
            raise StalePolicy(
                f"a trajectory of weights version {batch.version} arrived after version {published} was published; "
                f"max_policy_lag is {self._max_policy_lag}"
            )
        return batch
