"""WaitingClient: asks a server again while it answers "wait", until a deadline."""

from __future__ import annotations

import threading
import time
from typing import Any

from replay.remote import RemoteActor
from replay.types import DeadlineExceeded

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05


class WaitingClient:
    """Base of the thin clients of experience servers; `waiting_for` says what the call under way waits for."""

    def __init__(self, actor: RemoteActor, *, deadline_seconds: float = 300.0) -> None:
        """Hold `actor`, the name of the server's process; every wait ends after `deadline_seconds`."""
        self._actor, self._deadline = actor, deadline_seconds
        self.waiting_for: str | None = None
        self.seconds_waited = 0.0  # from each first answer "wait" to the answer that was none

    def _until_served(self, method: str, *arguments: Any, stop: threading.Event | None) -> Any:
        """Return the server's first answer that is not "wait"; None if `stop` was set meanwhile.

        Raises:
            DeadlineExceeded: it said "wait" until the deadline; the text has its last reason.
            Exception: what the server raised, as itself.
        """
        begun, pause, waiting_since = time.monotonic(), _SHORTEST_PAUSE, None
        try:
            while True:
                remaining = begun + self._deadline - time.monotonic()
                reply = self._actor.call(method, *arguments, seconds=max(remaining, 0.1), stop=stop)
                if reply is None or reply.wait is None:
                    return reply
                self.waiting_for = reply.wait
                waiting_since = waiting_since or time.monotonic()
                if remaining <= 0:
                    raise DeadlineExceeded(f"{method} waited {self._deadline:.0f} s for {reply.wait}")
                if stop is None:
                    time.sleep(pause)
                elif stop.wait(pause):
                    return None
                pause = min(pause * 1.5, _LONGEST_PAUSE)
        finally:
            self.waiting_for = None
            if waiting_since is not None:
                self.seconds_waited += time.monotonic() - waiting_since
