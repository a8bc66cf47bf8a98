"""Sized iterables that feed a Trainer: from this process, or from a replay server with prefetch.

Both have a length, because Lightning prefetches from an iterable without one, and a prefetched batch is stale.
"""

from __future__ import annotations

import math
import operator
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from actors.policies import Policy
from actors.rollout import Lanes, RolloutSpec
from actors.segments import SegmentBuilder
from replay.seeds import spawn_seed
from replay.server import ReplayClient, ReplaySpec
from replay.table import TransitionTable
from replay.types import Array, Batch, EpisodeResult

_SAMPLES_AHEAD = 2


class TransitionBatch(NamedTuple):
    """A `Batch` as tensors, `[k, B, ...]` or `[B, ...]`; see there for the fields."""

    observation: Tensor
    action: Tensor
    reward: Tensor
    discount: Tensor
    next_observation: Tensor
    ids: Tensor
    probability: Tensor
    size: int

    @classmethod
    def of(cls, batch: Batch) -> TransitionBatch:
        """Copy a batch into tensors of their own: its arrays may be views that pin the object store."""
        return cls(
            observation=torch.tensor(batch.observation),
            action=torch.tensor(batch.action),
            reward=torch.tensor(batch.reward),
            discount=torch.tensor(batch.discount),
            next_observation=torch.tensor(batch.next_observation),
            ids=torch.tensor(batch.ids),
            probability=torch.tensor(batch.probability, dtype=torch.float32),
            size=batch.size,
        )

    def split(self) -> list[TransitionBatch]:
        """Return the k batches in here, each `[B, ...]`."""
        if self.reward.ndim == 1:
            return [self]
        return [self.map(operator.itemgetter(i)) for i in range(len(self.reward))]

    def map(self, function: Callable[[Tensor], Tensor]) -> TransitionBatch:
        """Return a batch with `function` applied to every tensor in it."""
        changed: dict[str, Any] = {k: v if k == "size" else function(v) for k, v in self._asdict().items()}
        return TransitionBatch(**changed)


class _Stream:
    """A stream has no place to go back to; with these two methods Lightning lets it go on in the middle of an epoch."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing back."""


class LocalExperience(_Stream):
    """Rolls out, stores and samples in this process, in turn, at the ratio of the rate limiter."""

    def __init__(self, policy: Policy, rollout: RolloutSpec, replay: ReplaySpec, *, length: int) -> None:
        """Make the environments and the table.

        Args:
            policy: acts; it is the learner's own, so its weights are never stale.
            rollout: how experience is made.
            replay: how it is kept and at which rate it is drawn.
            length: batches in an epoch.
        """
        self._policy, self._replay, self._rollout, self._length = policy, replay, rollout, length
        environment_seed, policy_seed = spawn_seed(rollout.run_seed, "worker").spawn(2)
        policy.begin(policy_seed)
        self._lanes = Lanes(policy.spec.environment, rollout.num_envs, environment_seed)
        self._builder = SegmentBuilder(rollout.layout, rollout.num_envs, rollout.gamma)
        self._table = TransitionTable(replay.table, seed=spawn_seed(rollout.run_seed, "replay"))
        self._limiter = replay.limiter()
        self.env_steps = 0
        self.episodes: list[EpisodeResult] = []
        self._begun = False

    def __len__(self) -> int:
        """Return the items in an epoch, each of k batches."""
        return math.ceil(self._length / self._replay.batches_per_sample)

    def __iter__(self) -> Iterator[TransitionBatch]:
        """Yield one epoch; the next goes on where this one ended."""
        for _ in range(len(self)):
            yield self.next()

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
        row = self._lanes.step(self._policy, step=self.env_steps)
        reward = self._rollout.learned_reward(row.reward)
        for segment in self._builder.add(
            row.action, reward, row.terminated, row.truncated, row.observation, row.failed
        ):
            self._table.insert(segment)
            self._limiter.record_insert(segment.steps)
        self.env_steps += row.steps
        self.episodes += (result for _, result in row.episodes)

    def update_priorities(self, ids: Array, priorities: Array) -> None:
        """See `TransitionTable.update_priorities`."""
        self._table.update_priorities(ids, priorities)


class RemoteExperience(_Stream):
    """Batches from a replay server, fetched ahead by a thread, until the server says that nothing more will come."""

    def __init__(self, replay: ReplayClient, *, k: int, batch_size: int, length: int) -> None:
        """Start nothing yet; the thread starts with the first batch.

        Args:
            replay: the server.
            k: batches in one call.
            batch_size: transitions in a batch.
            length: batches in an epoch.
        """
        self._replay, self._k, self._batch_size, self._length = replay, k, batch_size, length
        # One more waits in the thread's hand.
        self._ahead: queue.Queue[TransitionBatch | BaseException | None] = queue.Queue(_SAMPLES_AHEAD - 1)
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self.while_waiting: Callable[[], None] = lambda: None
        self.finished = False

    def __len__(self) -> int:
        """Return the items in an epoch, each of k batches."""
        return math.ceil(self._length / self._k)

    @property
    def waiting_for(self) -> str | None:
        """What the next batch waits for, or None."""
        return self._replay.waiting_for

    def __iter__(self) -> Iterator[TransitionBatch]:
        """Yield one epoch, or less if the server has nothing more; `while_waiting` is called while none is there.

        Raises:
            Exception: what the fetching thread met.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._fetch_ahead, name="prefetch", daemon=True)
            self._thread.start()
        for _ in range(len(self)):
            item = self._next()
            if item is None:
                self.finished = True
                return
            yield item

    def _next(self) -> TransitionBatch | None:
        while not self._stop.is_set() and not self.finished:
            try:
                item = self._ahead.get(timeout=0.1)
            except queue.Empty:
                self.while_waiting()
                continue
            if isinstance(item, BaseException):
                raise item
            return item
        return None

    def _fetch_ahead(self) -> None:
        item: TransitionBatch | BaseException | None = None
        try:
            while not self._stop.is_set():
                reply = self._replay.sample(self._k, self._batch_size, stop=self._stop)
                if reply is None or reply.batch is None:
                    break
                self._put(TransitionBatch.of(reply.batch))
        except BaseException as error:
            item = error
        self._put(item)

    def _put(self, item: TransitionBatch | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                self._ahead.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def update_priorities(self, ids: Array, priorities: Array) -> None:
        """Send new priorities to the server without waiting."""
        self._replay.update_priorities(ids, priorities)

    def interrupt(self) -> None:
        """End the wait for a batch, if there is one, and the iteration."""
        self._stop.set()

    def close(self) -> None:
        """End the thread; what it fetched ahead is dropped."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5.0)
