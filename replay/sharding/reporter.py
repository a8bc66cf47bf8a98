"""The shard reporter: sends the reports of a replay shard to the router without blocking the shard."""

from __future__ import annotations

from collections import deque
from typing import Any

from replay.messages import Push, ShardReport
from replay.remote import GONE, RemoteActor, fetch, is_ready


class ShardReporter:
    """Client that sends the reports of a replay shard to a replay router in another process.

    A call does not wait for the router. If the router dies, the reporter resends each unconfirmed report to the
    recreated router.
    """

    def __init__(self, actor: RemoteActor) -> None:
        """Store `actor`, the router's process."""
        self._actor = actor
        self._unconfirmed: deque[tuple[tuple[Any, ...], Any]] = deque()  # (arguments, reference to the result)
        self._unsent: deque[tuple[Any, ...]] = deque()

    def report(self, shard: int, shard_report: ShardReport, *push: Push) -> None:
        """Send a report; see `ReplayRouter.report`."""
        # The new report replaces unsent reports, except those with a push, which would otherwise be lost.
        self._unsent = deque(arguments for arguments in self._unsent if arguments[2:])
        self._unsent.append((shard, shard_report, *push))
        for _ in range(2):
            try:
                # Sending a call to a dead actor does not fail; only fetching the result raises.
                while self._unconfirmed and is_ready(self._unconfirmed[0][1]):
                    fetch(self._unconfirmed[0][1], 1.0)
                    self._unconfirmed.popleft()
                while self._unsent:
                    self._unconfirmed.append((self._unsent[0], self._actor.later("report", *self._unsent[0])))
                    self._unsent.popleft()
                return
            except (*GONE, ValueError):
                self._actor.forget()
                self._unsent.extendleft(arguments for arguments, _ in reversed(self._unconfirmed))
                self._unconfirmed.clear()
