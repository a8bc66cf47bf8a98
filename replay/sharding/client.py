"""ShardedReplayClient: the client of a replay in shards, for workers and learner."""

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

_PAUSE = 0.05
_SECONDS_FOR_A_DRAW = 1.0
_SECONDS_TO_RELEASE = 5.0


class ShardedReplayClient(ReplayClient):
    """A `ReplayClient` of a desk and its shards."""

    def __init__(self, router: RemoteActor, shards: Sequence[RemoteActor], *, deadline_seconds: float = 300.0) -> None:
        """Hold the names of the processes; every wait ends after `deadline_seconds`."""
        super().__init__(router, deadline_seconds=deadline_seconds)
        self._shards = list(shards)
        self._shard_frames = [SharedFrames() for _ in self._shards]
        self._incarnations: dict[int, int] = {}
        for shard, shared in zip(self._shards, self._shard_frames, strict=True):
            shard.when_gone = shared.forget

    def __reduce__(self) -> tuple[Any, ...]:
        """See `ReplayClient`."""
        return partial(type(self), deadline_seconds=self._deadline), (self._actor, self._shards)

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply | None:
        """See `ReplayClient.insert`."""
        which, reply = (push.worker, push.incarnation, push.sequence), None
        try:
            reply = self._insert(push, self._until_served("reserve", *which, push.steps, stop=stop), stop)
            return reply
        finally:
            if reply is None:  # it may be admitted, and will not come
                with contextlib.suppress(DeadlineExceeded):
                    self._actor.call("revoke", *which, seconds=_SECONDS_TO_RELEASE)

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
        """Send a push to the shard whose turn it is, or if that is gone, with all it held, to the next."""
        sent = argument(push)
        end, turn = time.monotonic() + self._deadline, push.worker + push.sequence
        while True:
            shard = self._shards[reservation.shards[turn % len(reservation.shards)]]
            try:
                asked = shard.later("insert", sent, reservation.highest_priority)
            except ValueError:
                turn += 1
            else:
                try:
                    accepted: bool | None = fetch(asked, end - time.monotonic(), stop)
                    return accepted
                except (ActorUnavailableError, GetTimeoutError):
                    pass  # it may have the push, so it is the one to ask again: it recognises a repeat
                except GONE:
                    turn += 1
            shard.forget()
            if stop is not None and stop.is_set():
                return None
            if time.monotonic() >= end:
                raise DeadlineExceeded(f"insert waited {self._deadline:.0f} s for a shard of the replay to answer")
            time.sleep(_PAUSE)

    def sample(
        self, k: int, batch_size: int, *, stop: threading.Event | None = None, ahead: bool = False
    ) -> SampleReply | None:
        """See `ReplayClient.sample`."""
        asked = self._asked.pop((k, batch_size), None)
        reply: SamplePlanReply | None = self._until_served("sample", k, batch_size, stop=stop, asked=asked)
        if ahead and reply is not None and not reply.finished:
            self._ask_ahead(k, batch_size)
        end, patience = time.monotonic() + self._deadline, _SECONDS_FOR_A_DRAW
        while reply is not None and reply.plan is not None:
            plan = reply.plan
            parts, lost = self._draw(plan, patience, stop)
            if stop is not None and stop.is_set():
                return None
            if sum(len(where) for where, _ in parts.values()) == len(plan.shard):
                return SampleReply(batch=assemble(plan, parts, (k, batch_size)), returns=plan.returns)
            if time.monotonic() >= end:
                raise DeadlineExceeded(f"sample waited {self._deadline:.0f} s for the shards of the replay to answer")
            # A shard that is gone, or too slow: the desk knows by now, or hears from here, and names others.
            patience *= 2
            time.sleep(_PAUSE)
            reply = self._until_served("sample", k, batch_size, True, lost, stop=stop)
        return None if reply is None else SampleReply(finished=True)

    def _draw(
        self, plan: SamplePlan, seconds: float, stop: threading.Event | None
    ) -> tuple[dict[int, tuple[Array, Batch]], list[tuple[int, int]]]:
        """SampleIndices from all shards at once; return what came of each, and the shards that are gone."""
        for shard, incarnation in self._incarnations.items():
            if plan.incarnations.get(shard) != incarnation:
                self._shard_frames[shard].forget()
        self._incarnations = plan.incarnations
        asked, lost = {}, []
        for shard in np.unique(plan.shard).tolist():
            where, shared = np.flatnonzero(plan.shard == shard), self._shard_frames[shard]
            try:
                asked[shard] = where, self._shards[shard].later("sample_at", plan.fraction[where], shared.wanted)
            except ValueError:
                lost.append((shard, plan.incarnations[shard]))
        end, parts = time.monotonic() + seconds, {}
        for shard, (where, reference) in asked.items():
            try:
                drawn = fetch(reference, end - time.monotonic(), stop)
                batch = self._whole(shard, drawn, plan.fraction[where], end, stop)
            except (*GONE, GetTimeoutError):
                self._shards[shard].forget()
                continue
            if batch is not None:
                parts[shard] = where, batch
        return parts, lost

    def _whole(
        self, shard: int, drawn: Batch | SampleIndices | None, fraction: Array, end: float, stop: threading.Event | None
    ) -> Batch | None:
        """Return what a shard drew with its frames, which it sends itself where they cannot be read from here."""
        shared, whole = self._shard_frames[shard], drawn
        if isinstance(whole, SampleIndices):
            batch = shared.batch(whole)
            if batch is not None:
                return batch
            try:
                reference = self._shards[shard].later("sample_at", fraction)
            except ValueError:  # it is gone
                return None
            whole = fetch(reference, end - time.monotonic(), stop)
        if not isinstance(whole, Batch):
            return None
        shared.copied()
        return whole

    def update_priorities(self, ids: Array, priorities: Array) -> None:
        """See `ReplayClient.update_priorities`; each goes to the shard that its id names."""
        ids, priorities = ids.ravel(), priorities.ravel()
        of = shards_of(ids)
        for shard in np.unique(of).tolist():
            try:
                self._shards[shard].later("update_priorities", ids[of == shard], priorities[of == shard])
            except (*GONE, ValueError):
                self._shards[shard].forget()


def assemble(plan: SamplePlan, parts: dict[int, tuple[Array, Batch]], shape: tuple[int, int]) -> Batch:
    """Put what the shards drew where it belongs, with the probabilities of the whole."""
    whole: dict[str, Array] = {}
    for shard, (where, batch) in parts.items():
        for name, values in vars(batch).items():
            if name == "size":
                continue
            if name not in whole:
                whole[name] = np.empty((shape[0] * shape[1], *values.shape[1:]), values.dtype)
            whole[name][where] = values * plan.share[shard] if name == "probability" else values
    return Batch(**{name: values.reshape(*shape, *values.shape[1:]) for name, values in whole.items()}, size=plan.size)
