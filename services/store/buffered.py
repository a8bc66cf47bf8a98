"""The coordinator's writer, which buffers writes: training continues while the run store is unavailable."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from replay.errors import SquallError
from services.errors import RunTakenOver, StoreUnavailable
from services.store.base import RunStore
from services.store.payloads import clean_text, plain_metrics, plain_payload
from services.store.records import Command, ProcessIdentity, check_integer, check_state, check_time

MAX_OUTAGE_SECONDS = 60.0
"""Seconds that a run which has ended waits for an unavailable store."""
_NOTIFY_AFTER_SECONDS = 2.0
_DELIVERY_SECONDS = 0.25


class BufferedWriter:
    """The writer of one run. While the store is unavailable, it keeps the writes and delivers them later.

    No call raises `StoreUnavailable`. No call except `flush`, `finish`, and `close` takes much longer than twice
    `patience_seconds`: once for the connection, once for the answer. The writer has no thread: each call also delivers
    waiting writes, for about a quarter of a second, unless the last failure is less than `retry_seconds` ago. Of the
    waiting snapshots, only the newest is kept. At most `capacity` other writes wait. Beyond that, the oldest metrics
    are dropped first, then the oldest events. Dropped writes are counted.

    An invalid value raises immediately, as in `RunStore`. A write that the store refuses for another reason (such as a
    deleted run) is dropped and counted, the reason is kept in `problem`, and training continues. Training must not
    continue if another coordinator has adopted the run: then all waiting writes are dropped, nothing more is written,
    and `check_owner` and `pending_commands` raise `RunTakenOver`.

    Attributes:
        name: name of the run.
        problem: reason why the last write did not reach the store; None if it did.
        dropped: number of dropped writes by kind: `metrics`, `event`, `state`, `acknowledgement`, and `snapshot`.
    """

    def __init__(
        self,
        store: RunStore,
        name: str,
        *,
        owner: ProcessIdentity | None = None,
        capacity: int = 10_000,
        patience_seconds: float = 1.0,
        retry_seconds: float = 2.0,
    ) -> None:
        """Open a second client of the store for this writer alone.

        Args:
            store: the store to write to.
            name: name of the run.
            owner: the coordinator that registered or adopted the run; with None, writes do not check the owner.
            capacity: maximum number of waiting writes.
            patience_seconds: timeout of a connection attempt, and of each answer; a distant store with TLS needs 1 s.
            retry_seconds: pause after a failed write.
        """
        check_integer("a writer's capacity", capacity, least=1)
        self.name = name
        self._owner = owner
        self._taken_over: RunTakenOver | None = None
        self.problem: str | None = None
        self.dropped: Counter[str] = Counter()
        self._store = store.with_timeout(patience_seconds)
        self._capacity = capacity
        self._retry = retry_seconds
        self._retry_at = -math.inf
        self._lock = threading.Lock()
        self._acknowledged: set[int] = set()
        # In the order of delivery: answers to waiting clients first, bulk data last.
        self._queues: dict[str, deque[Callable[[], object]]] = {
            "acknowledgement": deque(),
            "snapshot": deque(maxlen=1),
            "event": deque(),
            "state": deque(),
            "metrics": deque(),
        }

    @property
    def waiting(self) -> int:
        """Number of writes that have not reached the store yet."""
        return sum(len(queue) for queue in self._queues.values())

    def write_snapshot(self, snapshot: Mapping[str, Any], heartbeat: float) -> None:
        """Write a snapshot; see `RunStore.write_snapshot`."""
        check_time("heartbeat", heartbeat)
        payload = plain_payload("snapshot", snapshot)
        call = partial(self._store.write_snapshot, self.name, payload, heartbeat, owner=self._owner)
        self._write("snapshot", call)

    def update_state(self, state: str, stopped_because: str | None = None) -> None:
        """Write the run's state; see `RunStore.update_state`."""
        check_state(state)
        call = partial(self._store.update_state, self.name, state, stopped_because, owner=self._owner)
        self._write("state", call)

    def add_event(self, kind: str, text: str, time: float) -> None:
        """Append an event; see `RunStore.add_event`."""
        check_time("an event's time", time)
        call = partial(self._store.add_event, self.name, clean_text(kind), clean_text(text), time)
        self._write("event", call)

    def add_metrics(self, step: int, values: Mapping[str, float], time: float) -> None:
        """Append a row of metrics; see `RunStore.add_metrics`."""
        check_integer("step", step, least=0)
        check_time("the metrics' time", time)
        self._write("metrics", partial(self._store.add_metrics, self.name, step, plain_metrics(values), time))

    def acknowledge(self, id: int, result: Mapping[str, Any]) -> None:
        """Answer a command, which `pending_commands` omits from now on; see `RunStore.acknowledge`."""
        payload = plain_payload("result", result)
        self._acknowledged.add(id)
        call = partial(self._store.acknowledge, self.name, id, payload, owner=self._owner)
        self._write("acknowledgement", call)

    def pending_commands(self) -> list[Command]:
        """Return the commands that this writer has not acknowledged yet; none while the store is unavailable.

        Raises:
            RunTakenOver: another coordinator has adopted the run.
        """
        with self._lock:
            self._deliver()
            self.check_owner()
            if time.monotonic() < self._retry_at:
                return []
            try:
                commands = self._store.pending_commands(self.name)
            except SquallError as error:
                self._pause(error)
                return []
        return [command for command in commands if command.id not in self._acknowledged]

    def check_owner(self) -> None:
        """Raise `RunTakenOver` if a write has shown that another coordinator has adopted the run."""
        if self._taken_over is not None:
            raise self._taken_over

    @property
    def undelivered(self) -> Counter[str]:
        """Number of waiting and dropped writes, by kind."""
        return self.dropped + Counter({kind: len(queue) for kind, queue in self._queues.items()})

    def flush(self, deadline_seconds: float, cancelled: Callable[[], bool] = lambda: False) -> bool:
        """Try to deliver all writes for up to `deadline_seconds`, or until `cancelled`; return whether none waits."""
        deadline = time.monotonic() + deadline_seconds
        while True:
            with self._lock:
                self._retry_at = -math.inf
                self._deliver()
                if not self.waiting:
                    return True
            remaining = deadline - time.monotonic()
            if remaining <= 0 or cancelled():
                return False
            if self.problem is not None:
                time.sleep(min(0.05, remaining))

    def finish(self, cancelled: Callable[[], bool], notify: Callable[[str], object]) -> None:
        """Deliver the last writes of a run that has ended, and close the store.

        Waits up to `MAX_OUTAGE_SECONDS` for an unavailable store, or until `cancelled` returns True.

        Args:
            cancelled: whether to stop waiting.
            notify: called with a text when the wait begins, and at the end with the number of lost writes, if any.
        """
        if not self.flush(_NOTIFY_AFTER_SECONDS, cancelled):
            notify(f"waiting up to {MAX_OUTAGE_SECONDS:.0f} s for the run store (Ctrl-C ends the wait): {self.problem}")
            self.flush(MAX_OUTAGE_SECONDS, cancelled)
        self.close(0.0)
        if self.undelivered and self._taken_over is None:
            lost = ", ".join(f"{count:,} x {kind}" for kind, count in self.undelivered.items())
            effect = f"; the store will list run {self.name} as lost" if self.undelivered["state"] else ""
            reason = f": {self.problem}" if self.problem else ""
            notify(f"not delivered to the run store: {lost}{effect}{reason}")

    def close(self, deadline_seconds: float = 2.0) -> bool:
        """Flush and close the store; return False if writes were still waiting, which are lost (see `undelivered`)."""
        delivered = self.flush(deadline_seconds)
        self._store.close()
        return delivered

    def _write(self, kind: str, call: Callable[[], object]) -> None:
        with self._lock:
            self._queues[kind].append(call)
            if self._taken_over is not None:
                self._drop_all()
            while self.waiting - len(self._queues["snapshot"]) > self._capacity:
                oldest = next(kind for kind in ("metrics", "event", "state", "acknowledgement") if self._queues[kind])
                self._queues[oldest].popleft()
                self.dropped[oldest] += 1
            self._deliver()

    def _deliver(self) -> None:
        start = time.monotonic()
        if start < self._retry_at:
            return
        for kind, queue in self._queues.items():
            while queue:
                if time.monotonic() - start > _DELIVERY_SECONDS:
                    return
                try:
                    queue[0]()
                    self.problem = None
                except StoreUnavailable as error:
                    self._pause(error)
                    return
                except RunTakenOver as error:
                    self._taken_over, self.problem = error, str(error)
                    self._drop_all()
                    return
                except SquallError as error:
                    self.dropped[kind] += 1
                    self.problem = str(error)
                queue.popleft()

    def _drop_all(self) -> None:
        for kind in [kind for kind, queue in self._queues.items() if queue]:
            self.dropped[kind] += len(self._queues[kind])
            self._queues[kind].clear()

    def _pause(self, error: SquallError) -> None:
        self.problem = str(error)
        self._retry_at = time.monotonic() + self._retry
