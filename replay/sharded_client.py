"""ShardedReplayClient: what workers and learner hold of a replay in shards; Teller: what a shard holds of the desk."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from ray.exceptions import ActorUnavailableError, GetTimeoutError

from replay.frames import NearFrames
from replay.remote import GONE, RemoteActor, argument, fetch, is_ready
from replay.server import ReplayClient
from replay.table import shards_of
from replay.types import (
    AdmitReply,
    Array,
    Batch,
    DeadlineExceeded,
    Draw,
    Holding,
    InsertReply,
    Places,
    PlacesReply,
    Push,
    SampleReply,
)

_PAUSE = 0.05
_SECONDS_FOR_A_DRAW = 1.0
_SECONDS_TO_TAKE_BACK = 5.0


class Teller:
    """Calls a desk in another process without waiting; what a desk did not answer is told again, to the next."""

    def __init__(self, actor: RemoteActor) -> None:
        """Hold the desk's name."""
        self._actor = actor
        self._told: deque[tuple[tuple[Any, ...], Any]] = deque()
        self._untold: deque[tuple[Any, ...]] = deque()

    def settle(self, shard: int, holding: Holding, *push: Push) -> None:
        """See `ReplayDesk.settle`."""
        # What a shard holds is in its next word too; pushes are not.
        self._untold = deque(word for word in self._untold if word[2:])
        self._untold.append((shard, holding, *push))
        for _ in range(2):
            try:
                # A dead actor's handle takes calls without a word; only their answers tell.
                while self._told and is_ready(self._told[0][1]):
                    fetch(self._told[0][1], 1.0)
                    self._told.popleft()
                while self._untold:
                    self._told.append((self._untold[0], self._actor.later("settle", *self._untold[0])))
                    self._untold.popleft()
                return
            except (*GONE, ValueError):
                self._actor.forget()
                self._untold.extendleft(word for word, _ in reversed(self._told))
                self._told.clear()


class ShardedReplayClient(ReplayClient):
    """A `ReplayClient` of a desk and its shards."""

    def __init__(self, desk: RemoteActor, shards: Sequence[RemoteActor], *, deadline_seconds: float = 300.0) -> None:
        """Hold the names of the processes; every wait ends after `deadline_seconds`."""
        super().__init__(desk, deadline_seconds=deadline_seconds)
        self._shards = list(shards)
        self._near_shards = [NearFrames() for _ in self._shards]
        self._incarnations: dict[int, int] = {}
        for shard, near in zip(self._shards, self._near_shards, strict=True):
            shard.when_gone = near.forget

    def __reduce__(self) -> tuple[Any, ...]:
        """See `ReplayClient`."""
        return partial(type(self), deadline_seconds=self._deadline), (self._actor, self._shards)

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply | None:
        """See `ReplayClient.insert`."""
        which, reply = (push.worker, push.incarnation, push.sequence), None
        try:
            reply = self._insert(push, self._until_served("admit", *which, push.steps, stop=stop), stop)
            return reply
        finally:
            if reply is None:  # it may be admitted, and will not come
                with contextlib.suppress(DeadlineExceeded):
                    self._actor.call("revoke", *which, seconds=_SECONDS_TO_TAKE_BACK)

    def _insert(self, push: Push, admitted: AdmitReply | None, stop: threading.Event | None) -> InsertReply | None:
        if admitted is None:
            return None
        if admitted.finished or admitted.repeated:
            return InsertReply(admitted.env_steps, finished=admitted.finished, repeated=admitted.repeated)
        accepted = self._send(push, admitted, stop)
        return None if accepted is None else InsertReply(admitted.env_steps, accepted=accepted, repeated=not accepted)

    def _send(self, push: Push, admitted: AdmitReply, stop: threading.Event | None) -> bool | None:
        """Send a push to the shard whose turn it is, or if that is gone, with all it held, to the next."""
        sent = argument(push)
        end, turn = time.monotonic() + self._deadline, push.worker + push.sequence
        while True:
            shard = self._shards[admitted.shards[turn % len(admitted.shards)]]
            try:
                asked = shard.later("insert", sent, admitted.highest_priority)
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
        reply: PlacesReply | None = self._until_served("sample", k, batch_size, stop=stop, asked=asked)
        if ahead and reply is not None and not reply.finished:
            self._ask_ahead(k, batch_size)
        end, patience = time.monotonic() + self._deadline, _SECONDS_FOR_A_DRAW
        while reply is not None and reply.places is not None:
            places = reply.places
            parts, lost = self._draw(places, patience, stop)
            if stop is not None and stop.is_set():
                return None
            if sum(len(where) for where, _ in parts.values()) == len(places.shard):
                return SampleReply(batch=assemble(places, parts, (k, batch_size)), returns=places.returns)
            if time.monotonic() >= end:
                raise DeadlineExceeded(f"sample waited {self._deadline:.0f} s for the shards of the replay to answer")
            # A shard that is gone, or too slow: the desk knows by now, or hears from here, and names others.
            patience *= 2
            time.sleep(_PAUSE)
            reply = self._until_served("sample", k, batch_size, True, lost, stop=stop)
        return None if reply is None else SampleReply(finished=True)

    def _draw(
        self, places: Places, seconds: float, stop: threading.Event | None
    ) -> tuple[dict[int, tuple[Array, Batch]], list[tuple[int, int]]]:
        """Draw from all shards at once; return what came of each, and the shards that are gone."""
        for shard, incarnation in self._incarnations.items():
            if places.incarnations.get(shard) != incarnation:
                self._near_shards[shard].forget()
        self._incarnations = places.incarnations
        asked, lost = {}, []
        for shard in np.unique(places.shard).tolist():
            where, near = np.flatnonzero(places.shard == shard), self._near_shards[shard]
            try:
                asked[shard] = where, self._shards[shard].later("draw", places.place[where], near.wanted)
            except ValueError:
                lost.append((shard, places.incarnations[shard]))
        end, parts = time.monotonic() + seconds, {}
        for shard, (where, reference) in asked.items():
            try:
                drawn = fetch(reference, end - time.monotonic(), stop)
                batch = self._whole(shard, drawn, places.place[where], end, stop)
            except (*GONE, GetTimeoutError):
                self._shards[shard].forget()
                continue
            if batch is not None:
                parts[shard] = where, batch
        return parts, lost

    def _whole(
        self, shard: int, drawn: Batch | Draw | None, place: Array, end: float, stop: threading.Event | None
    ) -> Batch | None:
        """Return what a shard drew with its frames, which it sends itself where they cannot be read from here."""
        near, whole = self._near_shards[shard], drawn
        if isinstance(whole, Draw):
            batch = near.batch(whole)
            if batch is not None:
                return batch
            try:
                reference = self._shards[shard].later("draw", place)
            except ValueError:  # it is gone
                return None
            whole = fetch(reference, end - time.monotonic(), stop)
        if not isinstance(whole, Batch):
            return None
        near.copied()
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


def assemble(places: Places, parts: dict[int, tuple[Array, Batch]], shape: tuple[int, int]) -> Batch:
    """Put what the shards drew where it belongs, with the probabilities of the whole."""
    whole: dict[str, Array] = {}
    for shard, (where, batch) in parts.items():
        for name, values in vars(batch).items():
            if name == "size":
                continue
            if name not in whole:
                whole[name] = np.empty((shape[0] * shape[1], *values.shape[1:]), values.dtype)
            whole[name][where] = values * places.share[shard] if name == "probability" else values
    return Batch(
        **{name: values.reshape(*shape, *values.shape[1:]) for name, values in whole.items()}, size=places.size
    )
