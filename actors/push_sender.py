"""Sender."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from replay.messages import InsertReply, Permit, Push
from replay.types import NO_MOMENTS, EpisodeResult, Moments, Segment, Trajectory

_MOST_PUSHES_WAITING = 2


SECONDS_TO_SEND_THE_REST = 3.0


class Replay(Protocol):
    """Where a worker sends its pushes: a `ReplayClient`, or a server in the same process."""

    waiting_for: str | None

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply | None:
        """See `ReplayClient.insert`."""
        ...


class PushSender:
    """Sends pushes in order from a thread of its own, a bounded number of them waiting."""

    def __init__(self, replay: Replay, worker: int, incarnation: int) -> None:
        self._replay, self._worker, self._incarnation = replay, worker, incarnation
        self._queue: queue.Queue[Push | None] = queue.Queue(_MOST_PUSHES_WAITING)
        self._sequence = 0
        self._abort = threading.Event()
        self._error: BaseException | None = None
        self._end = math.inf
        self.env_steps = self.accepted = self.steps_taken = self.steps_sent = 0
        self.seconds_waited = 0.0
        self.finished = False
        self._thread = threading.Thread(target=self._send_all, name="push sender", daemon=True)
        self._thread.start()

    @property
    def waiting_for(self) -> str | None:
        """What the push under way waits for, or None."""
        return self._replay.waiting_for

    def put(
        self,
        *,
        segments: Sequence[Segment] = (),
        trajectories: Sequence[tuple[Permit, Trajectory]] = (),
        episodes: Sequence[EpisodeResult] = (),
        returns: Moments = NO_MOMENTS,
    ) -> None:
        """Hand over a push; wait while too many are waiting, or until the time that `drain` gave is over.

        Raises:
            Exception: what an earlier push met.
        """
        if not (segments or trajectories or episodes):
            return
        content = segments or (), tuple(episodes), tuple(trajectories), returns
        push = Push(self._worker, self._incarnation, self._sequence, *content)
        self._sequence += 1
        self.steps_taken += push.steps
        while not self.finished:
            self.check()
            begun = time.monotonic()
            try:
                self._queue.put(push, timeout=0.2)
                return
            except queue.Full:
                if time.monotonic() > self._end:
                    return
            finally:
                self.seconds_waited += time.monotonic() - begun

    def check(self) -> None:
        """Raise what a push met."""
        if self._error is not None:
            raise self._error

    def _send_all(self) -> None:
        try:
            while (push := self._queue.get()) is not None:
                reply = self._replay.insert(push, stop=self._abort)
                if reply is None:
                    return
                self.env_steps = max(self.env_steps, reply.env_steps)
                self.accepted += reply.accepted
                self.steps_sent += push.steps if reply.accepted or reply.repeated else 0
                self.finished = self.finished or reply.finished
        except BaseException as error:
            self._error = error

    def drain(self, seconds: float) -> None:
        """Give up what is not sent in `seconds` from now."""
        self._end = time.monotonic() + seconds

    def close(self) -> None:
        """Send what is waiting, for as long as `drain` gave or else a short time; then give up."""
        end = time.monotonic() + SECONDS_TO_SEND_THE_REST if math.isinf(self._end) else self._end
        while self._thread.is_alive() and time.monotonic() < end:
            try:
                self._queue.put(None, timeout=0.05)
                break
            except queue.Full:
                continue
        self._thread.join(max(end - time.monotonic(), 0.0))
        self._abort.set()
        self._thread.join(1.0)
