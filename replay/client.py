"""WaitingClient: asks a server again while it answers "wait", until a deadline."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import replace
from functools import partial
from typing import Any

from replay.errors import DeadlineExceeded
from replay.frames import SharedFrames
from replay.messages import InsertReply, PermitReply, Push, SampleReply, TakeReply
from replay.remote import GONE, RemoteActor, argument
from replay.types import Array

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05
# Of what the waits of late took. Where a limiter holds a caller back, waits are much alike: a first pause of most of
# one saves calls that can only be told to wait again, and the rest is too short to be late by.
_FIRST_PAUSE, _NEXT_PAUSES, _WEIGHT_OF_THE_NEWEST = 0.7, 0.15, 0.25


class WaitingClient:
    """Base of the thin clients of experience servers; `waiting_for` says what the call under way waits for."""

    def __init__(self, actor: RemoteActor, *, deadline_seconds: float = 300.0) -> None:
        """Hold `actor`, the name of the server's process; every wait ends after `deadline_seconds`."""
        self._actor, self._deadline = actor, deadline_seconds
        self.waiting_for: str | None = None
        self.seconds_waited = 0.0  # from each first answer "wait" to the answer that was none
        self._usual_wait = 0.0

    def _until_served(self, method: str, *arguments: Any, stop: threading.Event | None, asked: Any = None) -> Any:
        """Return the server's first answer that is not "wait"; None if `stop` was set meanwhile.

        `asked` is the reference to the first answer, if this call was made before.

        Raises:
            DeadlineExceeded: it said "wait" until the deadline; the text has its last reason.
            Exception: what the server raised, as itself.
        """
        begun, waiting_since, again = time.monotonic(), None, False
        pause = _within(_FIRST_PAUSE * self._usual_wait)
        try:
            while True:
                remaining = begun + self._deadline - time.monotonic()
                reply = self._actor.call(method, *arguments, seconds=max(remaining, 0.1), stop=stop, asked=asked)
                early, asked = asked is not None, None
                if reply is None or reply.wait is None:
                    return reply
                if early:  # that was said before anybody waited for it
                    continue
                self.waiting_for = reply.wait
                waiting_since = waiting_since or time.monotonic()
                if remaining <= 0:
                    raise DeadlineExceeded(f"{method} waited {self._deadline:.0f} s for {reply.wait}")
                if stop is None:
                    time.sleep(pause)
                elif stop.wait(pause):
                    return None
                pause = _within(max(1.5 * pause if again else 0.0, _NEXT_PAUSES * self._usual_wait))
                again = True
        finally:
            self.waiting_for = None
            waited = 0.0 if waiting_since is None else time.monotonic() - waiting_since
            self.seconds_waited += waited
            self._usual_wait += _WEIGHT_OF_THE_NEWEST * (waited - self._usual_wait)


def _within(pause: float) -> float:
    return min(max(pause, _SHORTEST_PAUSE), _LONGEST_PAUSE)


class ReplayClient(WaitingClient):
    """Thin client of a replay actor. Every wait has a deadline and raises with the reason it waited for."""

    def __init__(self, actor: RemoteActor, *, deadline_seconds: float = 300.0) -> None:
        """Hold `actor`, the name of the server's process; every wait ends after `deadline_seconds`."""
        super().__init__(actor, deadline_seconds=deadline_seconds)
        self._shared_frames = SharedFrames()
        self._asked: dict[tuple[Any, ...], Any] = {}
        actor.when_gone = self._let_go

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what it was made from: what it holds of a server is of this process."""
        return partial(type(self), deadline_seconds=self._deadline), (self._actor,)

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply | None:
        """Insert, waiting as long as the limiter says so; None if `stop` was set meanwhile.

        Raises:
            DeadlineExceeded: the limiter did not let the push in before the deadline.
            LayoutMismatch: the push does not fit the table.
        """
        reply: InsertReply | None = self._until_served("insert", argument(push), stop=stop)
        return reply

    def sample(
        self, k: int, batch_size: int, *, stop: threading.Event | None = None, ahead: bool = False
    ) -> SampleReply | None:
        """Sample, waiting as long as the limiter says so; None if `stop` was set meanwhile.

        Args:
            k: batches.
            batch_size: transitions in each.
            stop: an event that ends the wait.
            ahead: whether the server may go on with the same call again, because it will come.

        Raises:
            DeadlineExceeded: no batch could be drawn before the deadline.
        """
        instead_of, asked = None, self._asked.pop((k, batch_size), None)
        while True:
            reply: SampleReply | None = self._until_served(
                "sample", k, batch_size, self._shared_frames.wanted, instead_of, stop=stop, asked=asked
            )
            if reply is None or reply.finished:
                return reply
            if reply.indices is None:
                self._shared_frames.copied()
            if ahead:
                self._ask_ahead(k, batch_size, self._shared_frames.wanted)
            if reply.indices is None:
                return reply
            batch = self._shared_frames.batch(reply.indices)
            if batch is not None:
                return replace(reply, batch=batch, indices=None)
            assert reply.indices.frames is not None
            instead_of, asked = reply.indices.frames.token, None

    def _ask_ahead(self, *call: Any) -> None:
        if call[:2] not in self._asked:
            with contextlib.suppress(*GONE, ValueError):
                self._asked[call[:2]] = self._actor.later("sample", *call)

    def _let_go(self) -> None:
        """Forget what came of a server that is gone."""
        self._shared_frames.forget()
        self._asked.clear()

    def update_priorities(self, ids: Array, priorities: Array) -> None:
        """Send new priorities without waiting; a server that is gone has nothing left to prioritize."""
        try:
            self._actor.later("update_priorities", ids, priorities)
        except (*GONE, ValueError):
            self._actor.forget()


class TrajectoryClient(WaitingClient):
    """Thin client of a trajectory actor. Every wait has a deadline and raises with the reason it waited for."""

    def request_permits(
        self, worker: int, incarnation: int, count: int, *, stop: threading.Event | None = None
    ) -> PermitReply | None:
        """Ask for permits, waiting as long as there are none; None if `stop` was set meanwhile.

        Raises:
            DeadlineExceeded: none was issued before the deadline.
        """
        reply: PermitReply | None = self._until_served("request_permits", worker, incarnation, count, stop=stop)
        return reply

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply | None:
        """Send trajectories; None if `stop` was set meanwhile.

        Raises:
            LayoutMismatch: a trajectory does not fit.
        """
        reply: InsertReply | None = self._until_served("insert", push, stop=stop)
        return reply

    def take(self, *, stop: threading.Event | None = None) -> TakeReply | None:
        """Take one global batch, waiting until it is complete; None if `stop` was set meanwhile.

        Raises:
            DeadlineExceeded: it was not complete before the deadline.
        """
        reply: TakeReply | None = self._until_served("take", stop=stop)
        return reply

    def revoke(self, worker: int, incarnation: int, *, seconds: float | None = None) -> None:
        """Give permits back, within `seconds` or else the deadline of every call.

        Raises:
            DeadlineExceeded: the server did not answer in time.
        """
        self._actor.call("revoke", worker, incarnation, seconds=self._deadline if seconds is None else seconds)

    def publish(self, version: int) -> None:
        """Say that `version` is published."""
        self._actor.call("publish", version, seconds=self._deadline)
