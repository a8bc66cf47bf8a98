"""BufferedWriter: the coordinator's pen. A store that is away stops no training."""

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
from services.store.records import Command, ProcessIdentity, check_state, check_time, check_whole

AWAY_SECONDS = 60.0
"""How long a run that has ended waits for a store that is away."""
_SECONDS_UNTIL_TOLD = 2.0
_SECONDS_TO_CATCH_UP = 0.25


class BufferedWriter:
    """Writes one run's word to a store; while the store is away, keeps it and catches up later.

    No call raises `StoreUnavailable`, and none but `flush` and `close` takes much longer than twice
    `patience_seconds`, which a far store with TLS needs. There is no thread: each call also delivers, for a
    quarter of a second, what had to wait, `retry_seconds` after the last failure at the earliest. Of snapshots
    only the newest waits. Of the rest at most `capacity` wait; beyond that the oldest metrics are dropped first,
    then the oldest events, and counted.

    Bad values raise at once, as in `RunStore`. What the store refuses for another reason (the run was
    deleted) is dropped and counted, and the reason kept: training goes on. Only when the run was adopted by
    another coordinator it must not: all that waits is dropped, nothing more is written, and `check_owner` and
    `pending_commands` raise.

    Attributes:
        name: the run.
        problem: why the last write did not reach the store, None if it did.
        dropped: how many of `metrics`, `event`, `state`, `acknowledgement` and `snapshot` were dropped.
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
        """Write for the run `name`; as its coordinator `owner`, or, if that is None, whoever has it.

        Args:
            store: opened once more, for this writer alone.
            name: the run.
            owner: what the run was registered or adopted with.
            capacity: how many writes may wait.
            patience_seconds: how long to wait for a connection, and for an answer.
            retry_seconds: how long to leave a store alone that gave none.
        """
        check_whole("a writer's capacity", capacity, least=1)
        self.name = name
        self._owner = owner
        self._adopted: RunTakenOver | None = None
        self.problem: str | None = None
        self.dropped: Counter[str] = Counter()
        self._store = store.with_timeout(patience_seconds)
        self._capacity = capacity
        self._retry = retry_seconds
        self._retry_at = -math.inf
        self._lock = threading.Lock()
        self._answered: set[int] = set()
        # In the order in which they are delivered: who waits for an answer first, bulk last.
        self._queues: dict[str, deque[Callable[[], object]]] = {
            "acknowledgement": deque(),
            "snapshot": deque(maxlen=1),
            "event": deque(),
            "state": deque(),
            "metrics": deque(),
        }

    @property
    def waiting(self) -> int:
        """Writes that have not reached the store yet."""
        return sum(len(queue) for queue in self._queues.values())

    def write_snapshot(self, snapshot: Mapping[str, Any], heartbeat: float) -> None:
        """As `RunStore.write_snapshot`."""
        check_time("heartbeat", heartbeat)
        payload = plain_payload("snapshot", snapshot)
        call = partial(self._store.write_snapshot, self.name, payload, heartbeat, owner=self._owner)
        self._write("snapshot", call)

    def update_state(self, state: str, stopped_because: str | None = None) -> None:
        """As `RunStore.update_state`."""
        check_state(state)
        call = partial(self._store.update_state, self.name, state, stopped_because, owner=self._owner)
        self._write("state", call)

    def add_event(self, kind: str, text: str, time: float) -> None:
        """As `RunStore.add_event`."""
        check_time("an event's time", time)
        call = partial(self._store.add_event, self.name, clean_text(kind), clean_text(text), time)
        self._write("event", call)

    def add_metrics(self, step: int, values: Mapping[str, float], time: float) -> None:
        """As `RunStore.add_metrics`."""
        check_whole("step", step, least=0)
        check_time("the metrics' time", time)
        self._write("metrics", partial(self._store.add_metrics, self.name, step, plain_metrics(values), time))

    def acknowledge(self, id: int, result: Mapping[str, Any]) -> None:
        """As `RunStore.acknowledge`; from now on `pending_commands` leaves this command out."""
        payload = plain_payload("result", result)
        self._answered.add(id)
        call = partial(self._store.acknowledge, self.name, id, payload, owner=self._owner)
        self._write("acknowledgement", call)

    def pending_commands(self) -> list[Command]:
        """Commands not acknowledged through this writer yet; none while the store is away. Raises `RunTakenOver`."""
        with self._lock:
            self._deliver()
            self.check_owner()
            if time.monotonic() < self._retry_at:
                return []
            try:
                commands = self._store.pending_commands(self.name)
            except SquallError as error:
                self._failed(error)
                return []
        return [command for command in commands if command.id not in self._answered]

    def check_owner(self) -> None:
        """Raise `RunTakenOver` if a write has shown that another coordinator has the run."""
        if self._adopted is not None:
            raise self._adopted

    @property
    def undelivered(self) -> Counter[str]:
        """What has not reached the store, by kind: what waits and what was dropped."""
        return self.dropped + Counter({kind: len(queue) for kind, queue in self._queues.items()})

    def flush(self, deadline_seconds: float, given_up: Callable[[], bool] = lambda: False) -> bool:
        """Try to deliver everything for up to `deadline_seconds`, or until `given_up`; return whether nothing waits."""
        deadline = time.monotonic() + deadline_seconds
        while True:
            with self._lock:
                self._retry_at = -math.inf
                self._deliver()
                if not self.waiting:
                    return True
            remaining = deadline - time.monotonic()
            if remaining <= 0 or given_up():
                return False
            if self.problem is not None:
                time.sleep(min(0.05, remaining))

    def hand_in(self, given_up: Callable[[], bool], tell: Callable[[str], object]) -> None:
        """Deliver the run's last word and let go of the store; one that is away is waited for, until `given_up`.

        `tell` is called with what is waited for, and at the end with what the store never got.
        """
        if not self.flush(_SECONDS_UNTIL_TOLD, given_up):
            tell(f"waiting up to {AWAY_SECONDS:.0f} s for the run store, Ctrl-C ends it: {self.problem}")
            self.flush(AWAY_SECONDS, given_up)
        self.close(0.0)
        if self.undelivered and self._adopted is None:
            lost = ", ".join(f"{count:,} x {kind}" for kind, count in self.undelivered.items())
            reads = f"; run {self.name} will read lost there" if self.undelivered["state"] else ""
            why = f": {self.problem}" if self.problem else ""
            tell(f"not delivered to the run store: {lost}{reads}{why}")

    def close(self, deadline_seconds: float = 2.0) -> bool:
        """`flush`, then let go of the store; what still waits is lost (see `undelivered`), and the answer False."""
        delivered = self.flush(deadline_seconds)
        self._store.close()
        return delivered

    def _write(self, kind: str, call: Callable[[], object]) -> None:
        with self._lock:
            self._queues[kind].append(call)
            if self._adopted is not None:
                self._drop_all()
            while self.waiting - len(self._queues["snapshot"]) > self._capacity:
                oldest = next(kind for kind in ("metrics", "event", "state", "acknowledgement") if self._queues[kind])
                self._queues[oldest].popleft()
                self.dropped[oldest] += 1
            self._deliver()

    def _deliver(self) -> None:
        now = time.monotonic()
        if now < self._retry_at:
            return
        for kind, queue in self._queues.items():
            while queue:
                if time.monotonic() - now > _SECONDS_TO_CATCH_UP:
                    return
                try:
                    queue[0]()
                    self.problem = None
                except StoreUnavailable as error:
                    self._failed(error)
                    return
                except RunTakenOver as error:
                    self._adopted, self.problem = error, str(error)
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

    def _failed(self, error: SquallError) -> None:
        self.problem = str(error)
        self._retry_at = time.monotonic() + self._retry
