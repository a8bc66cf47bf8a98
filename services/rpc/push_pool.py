"""The threads through which all sessions of the Experience service push to the replay."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from actors.push_sender import Replay
from replay.messages import InsertReply, Push

_THREADS = 8


class PushPool:
    """A pool of a few threads that send pushes.

    A few threads are enough: when the replay's rate limiter blocks a push, it blocks the pushes of all sessions.

    Attributes:
        env_steps: highest number of environment steps of the run that a reply has reported.
        finished: whether a reply has reported that the run has all its steps.
    """

    def __init__(self, make_client: Callable[[], Replay]) -> None:
        """Create a pool whose threads create one client each, with `make_client`."""
        self._make_client = make_client
        self._executor = ThreadPoolExecutor(_THREADS, "experience")
        self._thread = threading.local()
        self._clients: list[Replay] = []
        self._closing = threading.Event()
        self.env_steps = 0
        self.finished = False

    async def send(self, push: Push) -> InsertReply | None:
        """Return the replay's reply, or None if the pool was closed before it; raises as `ReplayClient.insert` does."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._insert, push)

    def _insert(self, push: Push) -> InsertReply | None:
        client: Replay | None = getattr(self._thread, "client", None)
        if client is None:
            client = self._thread.client = self._make_client()
            self._clients.append(client)
        reply = client.insert(push, stop=self._closing)
        if reply is not None:
            self.env_steps = max(self.env_steps, reply.env_steps)
            self.finished = self.finished or reply.finished
        return reply

    @property
    def waiting_for(self) -> str | None:
        """The event that a push waits for, or None."""
        return next((client.waiting_for for client in self._clients if client.waiting_for), None)

    def close(self) -> None:
        """End all waits."""
        self._closing.set()
        self._executor.shutdown(wait=False, cancel_futures=True)
