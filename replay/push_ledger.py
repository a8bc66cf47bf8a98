"""PushLedger: the pushes that a server has accepted, the episodes in them, and what its callers wait for."""

from __future__ import annotations

import time
from collections import deque

from replay.messages import Push
from replay.types import EpisodeResult, Moments

_WAITING_EXPIRES = 5.0
_MOST_EPISODES_KEPT = 10_000
_MOST_PUSHES_KEPT = 64  # of each worker, by name


class PushLedger:
    """Bookkeeping of one server; a plain object, one caller at a time."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self.repeated_pushes = 0
        self.returns = Moments()
        self._last: dict[int, tuple[int, int]] = {}
        self._accepted: dict[int, deque[tuple[int, int]]] = {}
        self._episodes: deque[EpisodeResult] = deque(maxlen=_MOST_EPISODES_KEPT)
        self._waiting: dict[str, tuple[float, str]] = {}

    def has_seen(self, push: Push) -> bool:
        """Return whether this push, or a later one of its worker, was accepted before; count it if so."""
        seen = (push.incarnation, push.sequence) <= self._last.get(push.worker, (-1, -1))
        self.repeated_pushes += seen
        return seen

    def has_accepted(self, push: Push) -> bool:
        """Return whether this very push was accepted before, or one too old to be remembered; count it if so.

        For a caller who hears of pushes in an order that is not that of their worker.
        """
        which, accepted = (push.incarnation, push.sequence), self._accepted.get(push.worker, ())
        repeated = which in accepted or (len(accepted) == _MOST_PUSHES_KEPT and which < min(accepted))
        self.repeated_pushes += repeated
        return repeated

    def accept(self, push: Push) -> None:
        """Remember that a push was accepted, and the episodes and returns in it."""
        self.returns = self.returns.merged(push.returns)
        which = push.incarnation, push.sequence
        self._accepted.setdefault(push.worker, deque(maxlen=_MOST_PUSHES_KEPT)).append(which)
        self._last[push.worker] = max(which, self._last.get(push.worker, which))
        self._episodes.extend(push.episodes)

    def drain_episodes(self) -> tuple[EpisodeResult, ...]:
        """Return and forget the episodes that ended since the last call."""
        episodes = tuple(self._episodes)
        self._episodes.clear()
        return episodes

    def note(self, caller: str, wait: str | None) -> None:
        """Take note of what a caller waits for, or that it waits no more."""
        if wait is None:
            self._waiting.pop(caller, None)
        else:
            self._waiting[caller] = (time.monotonic(), wait)

    def waiting(self) -> dict[str, str]:
        """Return caller -> reason, of those who asked again not long ago."""
        now = time.monotonic()
        return {who: why for who, (at, why) in self._waiting.items() if now - at < _WAITING_EXPIRES}
