"""WaitingClient: asks a server again while it answers "wait", until a deadline."""

from __future__ import annotations

import threading
import time
from typing import Any

from replay.remote import RemoteActor
from replay.types import DeadlineExceeded

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
