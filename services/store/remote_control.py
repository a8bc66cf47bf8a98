"""Remote control of a run through its store: read its status, send it commands, and follow it.

The command line and the gRPC services use these functions, so no client has to reach the run's processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from services.errors import CommandRefused, StoreUnavailable
from services.store.base import RunStore
from services.store.records import ENDED_STATES, LOST, Event

COMMAND_SECONDS = 30.0
POLL_SECONDS = 1.0
MAX_OUTAGE_SECONDS = 60.0
"""Seconds that a client which follows a run waits for an unavailable store."""


def status(store: RunStore, run: str, *, events: int = 10) -> dict[str, Any]:
    """Return the status of a run: its record, its last snapshot if there is one, and its last `events` events.

    Raises:
        UnknownRun: no run has this name.
    """
    record = store.get(run)
    snapshot = store.read_snapshot(run) or {}
    return {
        **snapshot,
        "run": record.name,
        "algorithm": record.algorithm,
        "environment": record.environment,
        "seed": record.seed,
        "created": record.created,
        "state": record.state,
        "stopped_because": record.stopped_because,
        "heartbeat": record.heartbeat,
        "events": [_plain(event) for event in store.events(run, limit=events)] if events else [],
    }


def _plain(event: Event) -> dict[str, Any]:
    return {"time": event.time, "kind": event.kind, "text": event.text}


def command(
    store: RunStore,
    run: str,
    kind: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    seconds: float = COMMAND_SECONDS,
) -> dict[str, Any]:
    """Send a command to a live run and return its answer.

    Raises:
        UnknownRun: no run has this name.
        RunIsNotLive: the run has ended or is lost.
        CommandRefused: the run refused the command.
        StoreTimeout: no answer within `seconds`.
    """
    id = store.send_command(run, kind, arguments or {})
    answer = store.wait_for_acknowledgement(run, id, seconds)
    if "error" in answer:
        raise CommandRefused(f"run {run!r} refused {kind!r}: {answer['error']}")
    return answer


@dataclass(frozen=True)
class RunUpdate:
    """The state of a followed run: its status, and the events since the previous update."""

    status: dict[str, Any]
    events: list[Event]

    @property
    def last(self) -> bool:
        """Whether this is the last update, because the run has ended or is lost."""
        return self.status["state"] in (*ENDED_STATES, LOST)

    def plain(self) -> dict[str, Any]:
        """Return status and events as one mapping of plain values."""
        return {**self.status, "events": [_plain(event) for event in self.events]}


class Follower:
    """Follows a run by polling its store. It tolerates a store that is unavailable for up to a minute."""

    def __init__(self, store: RunStore, run: str, *, past_events: int = 10) -> None:
        """Start to follow a run.

        Args:
            store: the store in which the run is registered.
            run: name of the run.
            past_events: number of past events in the first update.

        Raises:
            UnknownRun: no run has this name.
        """
        store.get(run)
        self._store, self._run, self._past_events = store, run, past_events
        self._last_id: int | None = None
        self._answered_at = time.monotonic()

    def poll(self) -> RunUpdate | None:
        """Return the next update, or None while the store is unavailable.

        Raises:
            StoreUnavailable: the store has been unavailable for more than `MAX_OUTAGE_SECONDS`.
        """
        start = time.monotonic()
        try:
            # The state is read before the events, so that no event that led to the last state is missed.
            current = status(self._store, self._run, events=0)
            if self._last_id is None:
                new = self._store.events(self._run, limit=self._past_events)
            else:
                new = self._store.events(self._run, after_id=self._last_id)
        except StoreUnavailable:
            if start - self._answered_at > MAX_OUTAGE_SECONDS:
                raise
            return None
        self._answered_at = start
        self._last_id = max([self._last_id or 0, *(event.id for event in new)])
        return RunUpdate(current, new)


def follow(store: RunStore, run: str, *, every: float = POLL_SECONDS, past_events: int = 10) -> Iterator[RunUpdate]:
    """Yield an update of a run every `every` seconds, until the run has ended or is lost; raises as `Follower` does."""
    follower = Follower(store, run, past_events=past_events)
    while True:
        start = time.monotonic()
        update = follower.poll()
        if update is not None:
            yield update
            if update.last:
                return
        time.sleep(max(0.0, start + every - time.monotonic()))
