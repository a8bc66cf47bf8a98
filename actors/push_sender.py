"""A background thread that sends a rollout worker's pushes to the replay server."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from replay.messages import InsertReply, Permit, Push
from replay.types import NO_MOMENTS, EpisodeResult, Moments, Segment, Trajectory

DRAIN_SECONDS = 3.0
_MAX_WAITING_PUSHES = 2
_SECONDS_BETWEEN_CHECKS = 0.2  # `put` checks this often whether an earlier push failed


class Replay(Protocol):
    """The receiver of a worker's pushes: a `ReplayClient`, or a server in the same process."""

    waiting_for: str | None

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply | None:
        """Send a push and return the reply, or None if `stop` was set first."""
        ...


class PushSender:
    """Sends pushes in order from a background thread, with a bounded number of waiting pushes.

    Attributes:
        env_steps: environment steps of the run, from all workers, as of the last reply.
        accepted: number of accepted pushes.
        steps_submitted: steps in all pushes that `put` received.
        steps_sent: steps in the pushes that the replay server has accepted or has acknowledged as repeated.
        seconds_waited: seconds that `put` has blocked.
        finished: whether the run has all its steps.
    """

    def __init__(self, replay: Replay, worker: int, incarnation: int) -> None:
        """Start the thread; `worker` and `incarnation` identify the sender in each push."""
        self._replay, self._worker, self._incarnation = replay, worker, incarnation
        self._queue: queue.Queue[Push | None] = queue.Queue(_MAX_WAITING_PUSHES)
        self._sequence = 0
        self._abort = threading.Event()
        self._error: BaseException | None = None
        self._deadline = math.inf
        self.env_steps = self.accepted = self.steps_submitted = self.steps_sent = 0
        self.seconds_waited = 0.0
        self.finished = False
        self._thread = threading.Thread(target=self._send_all, name="push sender", daemon=True)
        self._thread.start()

    @property
    def waiting_for(self) -> str | None:
        """The reason why the current push is waiting, or None."""
        return self._replay.waiting_for

    def put(
        self,
        *,
        segments: Sequence[Segment] = (),
        trajectories: Sequence[tuple[Permit, Trajectory]] = (),
        episodes: Sequence[EpisodeResult] = (),
        returns: Moments = NO_MOMENTS,
    ) -> None:
        """Queue a push; block while the queue is full.

        The push is dropped if the run is finished or the deadline that `drain` set has passed.

        Raises:
            Exception: the error of an earlier push.
        """
        if not (segments or trajectories or episodes):
            return
        content = segments or (), tuple(episodes), tuple(trajectories), returns
        push = Push(self._worker, self._incarnation, self._sequence, *content)
        self._sequence += 1
        self.steps_submitted += push.steps
        while not self.finished:
            self.check()
            started = time.monotonic()
            try:
                self._queue.put(push, timeout=_SECONDS_BETWEEN_CHECKS)
                return
            except queue.Full:
                if time.monotonic() > self._deadline:
                    return
            finally:
                self.seconds_waited += time.monotonic() - started

    def check(self) -> None:
        """Raise the error of an earlier push, if there was one."""
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
        """Set the deadline: pushes that are not sent within `seconds` from now are dropped."""
        self._deadline = time.monotonic() + seconds

    def close(self) -> None:
        """Send the waiting pushes until the deadline, then stop the thread.

        The deadline is that of `drain`, or `DRAIN_SECONDS` from now if `drain` was not called.
        """
        deadline = time.monotonic() + DRAIN_SECONDS if math.isinf(self._deadline) else self._deadline
        while self._thread.is_alive() and time.monotonic() < deadline:
            try:
                self._queue.put(None, timeout=0.05)
                break
            except queue.Full:
                continue
        self._thread.join(max(deadline - time.monotonic(), 0.0))
        self._abort.set()
        self._thread.join(1.0)
