"""Clients of the replay server and the trajectory server. A client repeats a call while the server replies "wait"."""

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

_MIN_PAUSE, _MAX_PAUSE = 0.001, 0.05
# Pauses as fractions of the average wait. Under a rate limiter, consecutive waits have similar lengths: a long first
# pause saves calls whose reply can only be "wait", and the short pauses that follow keep the delay small.
_FIRST_PAUSE, _NEXT_PAUSES = 0.7, 0.15
_NEWEST_WEIGHT = 0.25  # weight of the newest wait in the moving average


class WaitingClient:
    """Base class of the clients of experience servers.

    Attributes:
        waiting_for: reason why the current call waits, or None.
        seconds_waited: total time in seconds between the first reply "wait" of a call and its final reply.
    """

    def __init__(self, actor: RemoteActor, *, deadline_seconds: float = 300.0) -> None:
        """Store `actor`, the server's process; each call has a deadline of `deadline_seconds`."""
        self._actor, self._deadline = actor, deadline_seconds
        self.waiting_for: str | None = None
        self.seconds_waited = 0.0
        self._average_wait = 0.0

    def _call_until_served(
        self, method: str, *arguments: Any, stop: threading.Event | None, pending: Any = None
    ) -> Any:
        """Return the server's first reply that is not "wait", or None if `stop` is set first.

        `pending` is the reference to the first reply if the call was already made.

        Raises:
            DeadlineExceeded: the server replied "wait" until the deadline; the message has the server's last reason.
            Exception: the exception that the server raised.
        """
        start, waiting_since, repeated = time.monotonic(), None, False
        pause = _clip_pause(_FIRST_PAUSE * self._average_wait)
        try:
            while True:
                remaining = start + self._deadline - time.monotonic()
                reply = self._actor.call(method, *arguments, seconds=max(remaining, 0.1), stop=stop, pending=pending)
                prefetched, pending = pending is not None, None
                if reply is None or reply.wait is None:
                    return reply
                if prefetched:  # the server may have sent this reply long ago: call again before pausing
                    continue
                self.waiting_for = reply.wait
                waiting_since = waiting_since or time.monotonic()
                if remaining <= 0:
                    raise DeadlineExceeded(f"{method} waited {self._deadline:.0f} s for {reply.wait}")
                if stop is None:
                    time.sleep(pause)
                elif stop.wait(pause):
                    return None
                pause = _clip_pause(max(1.5 * pause if repeated else 0.0, _NEXT_PAUSES * self._average_wait))
                repeated = True
        finally:
            self.waiting_for = None
            waited = 0.0 if waiting_since is None else time.monotonic() - waiting_since
            self.seconds_waited += waited
            self._average_wait += _NEWEST_WEIGHT * (waited - self._average_wait)


def _clip_pause(pause: float) -> float:
    return min(max(pause, _MIN_PAUSE), _MAX_PAUSE)


class ReplayClient(WaitingClient):
    """Client of a replay server.

    Each call has a deadline. The `DeadlineExceeded` that a call raises contains the server's reason to wait.
    """

    def __init__(self, actor: RemoteActor, *, deadline_seconds: float = 300.0) -> None:
        """Store `actor`, the server's process; each call has a deadline of `deadline_seconds`."""
        super().__init__(actor, deadline_seconds=deadline_seconds)
        self._shared_frames = SharedFrames()
        self._prefetched: dict[tuple[Any, ...], Any] = {}  # (k, batch_size) -> reference to the reply
        actor.on_forget = self._forget_server

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle only the constructor's arguments: mapped frames and prefetched calls belong to this process."""
        return partial(type(self), deadline_seconds=self._deadline), (self._actor,)

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply | None:
        """Insert a push once the rate limiter permits it; return None if `stop` is set first.

        Raises:
            DeadlineExceeded: the rate limiter did not permit the insert before the deadline.
            LayoutMismatch: the push does not fit the table.
        """
        reply: InsertReply | None = self._call_until_served("insert", argument(push), stop=stop)
        return reply

    def sample(
        self, k: int, batch_size: int, *, stop: threading.Event | None = None, ahead: bool = False
    ) -> SampleReply | None:
        """Sample once the rate limiter permits it; return None if `stop` is set first.

        Args:
            k: number of batches.
            batch_size: transitions in each batch.
            stop: event that ends the wait.
            ahead: whether to prefetch: after the reply, also send the next call, with the same arguments.

        Raises:
            DeadlineExceeded: the rate limiter did not permit the sample before the deadline.
        """
        retry_of, pending = None, self._prefetched.pop((k, batch_size), None)
        while True:
            reply: SampleReply | None = self._call_until_served(
                "sample", k, batch_size, self._shared_frames.enabled, retry_of, stop=stop, pending=pending
            )
            if reply is None or reply.finished:
                return reply
            if reply.indices is None:
                self._shared_frames.count_copy()
            if ahead:
                self._prefetch(k, batch_size, self._shared_frames.enabled)
            if reply.indices is None:
                return reply
            batch = self._shared_frames.batch(reply.indices)
            if batch is not None:
                return replace(reply, batch=batch, indices=None)
            assert reply.indices.frames is not None
            retry_of, pending = reply.indices.frames.token, None

    def _prefetch(self, *arguments: Any) -> None:
        if arguments[:2] not in self._prefetched:
            with contextlib.suppress(*GONE, ValueError):
                self._prefetched[arguments[:2]] = self._actor.later("sample", *arguments)

    def _forget_server(self) -> None:
        """Drop the mapped frames and the prefetched calls of a server that has died."""
        self._shared_frames.reset()
        self._prefetched.clear()

    def update_priorities(self, ids: Array, priorities: Array) -> None:
        """Send new priorities without waiting for a reply.

        If the server has died, the priorities are dropped, because the table is lost.
        """
        try:
            self._actor.later("update_priorities", ids, priorities)
        except (*GONE, ValueError):
            self._actor.forget()


class TrajectoryClient(WaitingClient):
    """Client of a trajectory server.

    Each call has a deadline. The `DeadlineExceeded` that a call raises contains the server's reason to wait.
    """

    def request_permits(
        self, worker: int, incarnation: int, count: int, *, stop: threading.Event | None = None
    ) -> PermitReply | None:
        """Request up to `count` permits and wait until at least one is issued; return None if `stop` is set first.

        Raises:
            DeadlineExceeded: the server issued no permit before the deadline.
        """
        reply: PermitReply | None = self._call_until_served("request_permits", worker, incarnation, count, stop=stop)
        return reply

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply | None:
        """Send trajectories; return None if `stop` is set first.

        Raises:
            LayoutMismatch: a trajectory does not fit the layout.
        """
        reply: InsertReply | None = self._call_until_served("insert", push, stop=stop)
        return reply

    def take(self, *, stop: threading.Event | None = None) -> TakeReply | None:
        """Take one global batch once it is complete; return None if `stop` is set first.

        Raises:
            DeadlineExceeded: the batch was not complete before the deadline.
        """
        reply: TakeReply | None = self._call_until_served("take", stop=stop)
        return reply

    def revoke(self, worker: int, incarnation: int, *, seconds: float | None = None) -> None:
        """Make the server revoke a worker's unused permits, within `seconds` (default: the deadline of each call).

        Raises:
            DeadlineExceeded: the server did not answer in time.
        """
        self._actor.call("revoke", worker, incarnation, seconds=self._deadline if seconds is None else seconds)

    def publish(self, version: int) -> None:
        """Notify the server that the learner has published `version` of the weights."""
        self._actor.call("publish", version, seconds=self._deadline)
