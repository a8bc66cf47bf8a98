"""What a run's visitors do from afar, by way of the store alone: ask, command, follow. Every front is one of these."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from services.errors import CommandRefused, StoreUnavailable
from services.store.base import RunStore
from services.store.records import ENDED_STATES, LOST, Event

COMMAND_SECONDS = 30.0
LOOK_SECONDS = 1.0
AWAY_SECONDS = 60.0


def status(store: RunStore, run: str, *, events: int = 10) -> dict[str, Any]:
    """Return what is known of a run: its record, its last snapshot if there was one, its last events.

    Raises:
        UnknownRun: there is no such run.
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
        UnknownRun: there is no such run.
        RunIsNotLive: it ended or is lost.
        CommandRefused: it said no.
        StoreTimeout: it did not answer within `seconds`.
    """
    sent = store.send_command(run, kind, arguments or {})
    answer = store.wait_for_acknowledgement(run, sent, seconds)
    if "error" in answer:
        raise CommandRefused(f"run {run!r} refused {kind!r}: {answer['error']}")
    return answer


@dataclass(frozen=True)
class RunUpdate:
    """What a look at a run brought: its status, and the events since the look before."""

    status: dict[str, Any]
    events: list[Event]

    @property
    def last(self) -> bool:
        """Whether no more will come: the run has ended or is lost."""
        return self.status["state"] in (*ENDED_STATES, LOST)

    def plain(self) -> dict[str, Any]:
        """Return both as one mapping of plain values."""
        return {**self.status, "events": [_plain(event) for event in self.events]}


class Follower:
    """Looks at a run again and again; whoever holds it says when. A store that is away is waited for, for a minute."""

    def __init__(self, store: RunStore, run: str, *, past_events: int = 10) -> None:
        """Begin to follow a run.

        Args:
            store: where the run reports.
            run: its name.
            past_events: how many of the events so far come with the first news.

        Raises:
            UnknownRun: there is no such run.
        """
        store.get(run)
        self._store, self._run, self._past_events = store, run, past_events
        self._seen: int | None = None
        self._answered = time.monotonic()

    def look(self) -> RunUpdate | None:
        """Return what is new, or None while the store is away.

        Raises:
            StoreUnavailable: it was away for too long.
        """
        begun = time.monotonic()
        try:
            # The state before the events: what is read last misses none that led to the state.
            told = status(self._store, self._run, events=0)
            if self._seen is None:
                new = self._store.events(self._run, limit=self._past_events)
            else:
                new = self._store.events(self._run, after_id=self._seen)
        except StoreUnavailable:
            if begun - self._answered > AWAY_SECONDS:
                raise
            return None
        self._answered = begun
        self._seen = max([self._seen or 0, *(event.id for event in new)])
        return RunUpdate(told, new)


def follow(store: RunStore, run: str, *, every: float = LOOK_SECONDS, past_events: int = 10) -> Iterator[RunUpdate]:
    """Yield news of a run, one look every so many seconds, until it has ended or is lost; raises as `Follower` does."""
    follower = Follower(store, run, past_events=past_events)
    while True:
        begun = time.monotonic()
        news = follower.look()
        if news is not None:
            yield news
            if news.last:
                return
        time.sleep(max(0.0, begun + every - time.monotonic()))
