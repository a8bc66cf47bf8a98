"""Reporter."""

from __future__ import annotations

from collections import deque
from typing import Any

from replay.messages import Push, ShardReport
from replay.remote import GONE, RemoteActor, fetch, is_ready


class ShardReporter:
    """Calls a desk in another process without waiting; what a desk did not answer is told again, to the next."""

    def __init__(self, actor: RemoteActor) -> None:
        """Hold the desk's name."""
        self._actor = actor
        self._told: deque[tuple[tuple[Any, ...], Any]] = deque()
        self._untold: deque[tuple[Any, ...]] = deque()

    def report(self, shard: int, shard_report: ShardReport, *push: Push) -> None:
        """See `ReplayRouter.report`."""
        # What a shard holds is in its next word too; pushes are not.
        self._untold = deque(word for word in self._untold if word[2:])
        self._untold.append((shard, shard_report, *push))
        for _ in range(2):
            try:
                # A dead actor's handle takes calls without a word; only their answers tell.
                while self._told and is_ready(self._told[0][1]):
                    fetch(self._told[0][1], 1.0)
                    self._told.popleft()
                while self._untold:
                    self._told.append((self._untold[0], self._actor.later("report", *self._untold[0])))
                    self._untold.popleft()
                return
            except (*GONE, ValueError):
                self._actor.forget()
                self._untold.extendleft(word for word, _ in reversed(self._told))
                self._told.clear()
