"""The push ledger: a server's record of accepted pushes, of the episodes in them, and of waiting callers."""

from __future__ import annotations

import time
from collections import deque

from replay.messages import Push
from replay.types import EpisodeResult, Moments

_WAIT_EXPIRES_SECONDS = 5.0
_MAX_EPISODES = 10_000
_MAX_PUSHES_PER_WORKER = 64


class PushLedger:
    """Record of the pushes of one server; not thread-safe.

    Attributes:
        repeated_pushes: number of pushes that arrived again after they were accepted.
        returns: moments of all discounted returns in the accepted pushes.
    """

    def __init__(self) -> None:
        """Create an empty ledger."""
        self.repeated_pushes = 0
        self.returns = Moments()
        self._newest: dict[int, tuple[int, int]] = {}  # worker -> (incarnation, sequence)
        self._accepted: dict[int, deque[tuple[int, int]]] = {}
        self._episodes: deque[EpisodeResult] = deque(maxlen=_MAX_EPISODES)
        self._waiting: dict[str, tuple[float, str]] = {}  # caller -> (time of the call, reason)

    def has_seen(self, push: Push) -> bool:
        """Return whether this push or a later push of the same worker has been accepted; if so, count a repeat."""
        seen = (push.incarnation, push.sequence) <= self._newest.get(push.worker, (-1, -1))
        self.repeated_pushes += seen
        return seen

    def has_accepted(self, push: Push) -> bool:
        """Return whether exactly this push has been accepted; if so, count a repeat.

        A caller uses this method in place of `has_seen` if the pushes of a worker can reach it out of order. The ledger
        remembers the last 64 accepted pushes of each worker and treats an older push as accepted.
        """
        key, accepted = (push.incarnation, push.sequence), self._accepted.get(push.worker, ())
        repeated = key in accepted or (len(accepted) == _MAX_PUSHES_PER_WORKER and key < min(accepted))
        self.repeated_pushes += repeated
        return repeated

    def accept(self, push: Push) -> None:
        """Record an accepted push, with its episodes and returns."""
        self.returns = self.returns.merged(push.returns)
        key = push.incarnation, push.sequence
        self._accepted.setdefault(push.worker, deque(maxlen=_MAX_PUSHES_PER_WORKER)).append(key)
        self._newest[push.worker] = max(key, self._newest.get(push.worker, key))
        self._episodes.extend(push.episodes)

    def drain_episodes(self) -> tuple[EpisodeResult, ...]:
        """Return the episodes that ended since the last call, and forget them."""
        episodes = tuple(self._episodes)
        self._episodes.clear()
        return episodes

    def record_wait(self, caller: str, wait: str | None) -> None:
        """Record the reason why a caller waits; None means that the caller no longer waits."""
        if wait is None:
            self._waiting.pop(caller, None)
        else:
            self._waiting[caller] = (time.monotonic(), wait)

    def waiting(self) -> dict[str, str]:
        """Return caller -> reason for the callers that called within the last 5 seconds."""
        now = time.monotonic()
        return {caller: reason for caller, (at, reason) in self._waiting.items() if now - at < _WAIT_EXPIRES_SECONDS}
