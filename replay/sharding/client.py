"""The client of a sharded replay, for workers and the learner; see `replay.sharding`."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from ray.exceptions import ActorUnavailableError, GetTimeoutError

from replay.client import ReplayClient
from replay.errors import DeadlineExceeded
from replay.frames import SharedFrames
from replay.messages import (
    Batch,
    InsertReply,
    Push,
    ReserveReply,
    SampleIndices,
    SamplePlan,
    SamplePlanReply,
    SampleReply,
)
from replay.remote import GONE, RemoteActor, argument, fetch
from replay.table import shards_of
from replay.types import Array

_RETRY_SECONDS = 0.05
_SAMPLE_SECONDS = 1.0
_REVOKE_SECONDS = 5.0


class ShardedReplayClient(ReplayClient):
    """Client of a replay router and its shards, with the interface of `ReplayClient`."""

    def __init__(self, router: RemoteActor, shards: Sequence[RemoteActor], *, deadline_seconds: float = 300.0) -> None:
        """Store the processes of the router and the shards; each call has a deadline of `deadline_seconds`."""
        super().__init__(router, deadline_seconds=deadline_seconds)
        self._shards = list(shards)
        self._shard_frames = [SharedFrames() for _ in self._shards]
        self._incarnations: dict[int, int] = {}
        for shard, shared in zip(self._shards, self._shard_frames, strict=True):
            shard.on_forget = shared.reset

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle only the constructor's arguments; see `ReplayClient`."""
        return partial(type(self), deadline_seconds=self._deadline), (self._actor, self._shards)

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply | None:
        """Insert a push through the router and one shard; see `ReplayClient.insert`."""
        key, reply = (push.worker, push.incarnation, push.sequence), None
        try:
            reply = self._insert(push, self._call_until_served("reserve", *key, push.steps, stop=stop), stop)
            return reply
        finally:
            if reply is None:  # the router may have admitted the push, which this client will not send
                with contextlib.suppress(DeadlineExceeded):
                    self._actor.call("revoke", *key, seconds=_REVOKE_SECONDS)

    def _insert(self, push: Push, reservation: ReserveReply | None, stop: threading.Event | None) -> InsertReply | None:
        if reservation is None:
            return None
        if reservation.finished or reservation.repeated:
            return InsertReply(reservation.env_steps, finished=reservation.finished, repeated=reservation.repeated)
        accepted = self._send(push, reservation, stop)
        return (
            None if accepted is None else InsertReply(reservation.env_steps, accepted=accepted, repeated=not accepted)
        )

    def _send(self, push: Push, reservation: ReserveReply, stop: threading.Event | None) -> bool | None:
        """Send a push to the shard whose turn it is, or to the next shard if that one has died.

        Return True if the shard inserted the push, False if the shard ignored a repeat, None if `stop` is set first.
        """
        sent = argument(push)
        end, turn = time.monotonic() + self._deadline, push.worker + push.sequence
        while True:
            shard = self._shards[reservation.shards[turn % len(reservation.shards)]]
            try:
                reference = shard.later("insert", sent, reservation.highest_priority)
            except ValueError:
                turn += 1
            else:
                try:
                    accepted: bool | None = fetch(reference, end - time.monotonic(), stop)
                    return accepted
                except (ActorUnavailableError, GetTimeoutError):
                    pass  # the shard may have inserted the push: send it to the same shard again, which detects repeats
                except GONE:
                    turn += 1
            shard.forget()
            if stop is not None and stop.is_set():
                return None
            if time.monotonic() >= end:
                raise DeadlineExceeded(f"insert waited {self._deadline:.0f} s for a shard of the replay to answer")
            time.sleep(_RETRY_SECONDS)

    def sample(
        self, k: int, batch_size: int, *, stop: threading.Event | None = None, ahead: bool = False
    ) -> SampleReply | None:
        """Sample by the router's plan from the shards; see `ReplayClient.sample`."""
        pending = self._prefetched.pop((k, batch_size), None)
        reply: SamplePlanReply | None = self._call_until_served("sample", k, batch_size, stop=stop, pending=pending)
        if ahead and reply is not None and not reply.finished:
            self._prefetch(k, batch_size)
        end, timeout = time.monotonic() + self._deadline, _SAMPLE_SECONDS
        while reply is not None and reply.plan is not None:
            plan = reply.plan
            parts, lost = self._sample_shards(plan, timeout, stop)
            if stop is not None and stop.is_set():
                return None
            if sum(len(positions) for positions, _ in parts.values()) == len(plan.shard):
                return SampleReply(batch=assemble(plan, parts, (k, batch_size)), returns=plan.returns)
            if time.monotonic() >= end:
                raise DeadlineExceeded(f"sample waited {self._deadline:.0f} s for the shards of the replay to answer")
            # A shard has died or is slow. The coordinator, or the next call with `lost`, notifies the router of a dead
            # shard, so that the next plan uses only the other shards.
            timeout *= 2
            time.sleep(_RETRY_SECONDS)
            reply = self._call_until_served("sample", k, batch_size, True, lost, stop=stop)
        return None if reply is None else SampleReply(finished=True)

    def _sample_shards(
        self, plan: SamplePlan, seconds: float, stop: threading.Event | None
    ) -> tuple[dict[int, tuple[Array, Batch]], list[tuple[int, int]]]:
        """Call all shards of a plan concurrently.

        Returns:
            A mapping and a list. The mapping contains, for each shard that replied within `seconds`, the positions of
            the shard's items in the plan, and the shard's batch. The list contains (shard, incarnation) of each shard
            that has no process.
        """
        for shard, incarnation in self._incarnations.items():
            if plan.incarnations.get(shard) != incarnation:
                self._shard_frames[shard].reset()
        self._incarnations = plan.incarnations
        pending, lost = {}, []
        for shard in np.unique(plan.shard).tolist():
            positions, shared = np.flatnonzero(plan.shard == shard), self._shard_frames[shard]
            try:
                reference = self._shards[shard].later("sample_at", plan.fraction[positions], shared.enabled)
                pending[shard] = positions, reference
            except ValueError:
                lost.append((shard, plan.incarnations[shard]))
        end, parts = time.monotonic() + seconds, {}
        for shard, (positions, reference) in pending.items():
            try:
                sampled = fetch(reference, end - time.monotonic(), stop)
                batch = self._with_observations(shard, sampled, plan.fraction[positions], end, stop)
            except (*GONE, GetTimeoutError):
                self._shards[shard].forget()
                continue
            if batch is not None:
                parts[shard] = positions, batch
        return parts, lost

    def _with_observations(
        self,
        shard: int,
        sampled: Batch | SampleIndices | None,
        fraction: Array,
        end: float,
        stop: threading.Event | None,
    ) -> Batch | None:
        """Return a shard's sample with observations; if its frames cannot be read from here, request a copy."""
        shared = self._shard_frames[shard]
        if isinstance(sampled, SampleIndices):
            batch = shared.batch(sampled)
            if batch is not None:
                return batch
            try:
                reference = self._shards[shard].later("sample_at", fraction)
            except ValueError:  # the shard has died
                return None
            sampled = fetch(reference, end - time.monotonic(), stop)
        if not isinstance(sampled, Batch):
            return None
        shared.count_copy()
        return sampled

    def update_priorities(self, ids: Array, priorities: Array) -> None:
        """Send each new priority to the shard that its id names; see `ReplayClient.update_priorities`."""
        ids, priorities = ids.ravel(), priorities.ravel()
        shards = shards_of(ids)
        for shard in np.unique(shards).tolist():
            try:
                self._shards[shard].later("update_priorities", ids[shards == shard], priorities[shards == shard])
            except (*GONE, ValueError):
                self._shards[shard].forget()


def assemble(plan: SamplePlan, parts: dict[int, tuple[Array, Batch]], shape: tuple[int, int]) -> Batch:
    """Merge the shards' batches into one in the order of the plan, with probabilities relative to the whole replay."""
    arrays: dict[str, Array] = {}
    for shard, (positions, batch) in parts.items():
        for name, values in vars(batch).items():
            if name == "size":
                continue
            if name not in arrays:
                arrays[name] = np.empty((shape[0] * shape[1], *values.shape[1:]), values.dtype)
            arrays[name][positions] = values * plan.share[shard] if name == "probability" else values
    return Batch(**{name: values.reshape(*shape, *values.shape[1:]) for name, values in arrays.items()}, size=plan.size)
