"""What a run's visitors do from afar, by way of the store alone: ask, command, follow. Every front is one of these."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from replay.types import SquallError
from services.store import ENDED_STATES, LOST, Event, RunStore, StoreUnavailable

COMMAND_SECONDS = 30.0
LOOK_SECONDS = 1.0
AWAY_SECONDS = 60.0


class CommandRefused(SquallError):
    """The run understood a command and will not obey it; the text says why."""


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
class News:
    """What a look at a run brought: its status, and the events since the look before."""

    status: dict[str, Any]
    events: list[Event]

    def plain(self) -> dict[str, Any]:
        """Return both as one mapping of plain values."""
        return {**self.status, "events": [_plain(event) for event in self.events]}


def follow(store: RunStore, run: str, *, every: float = LOOK_SECONDS, past_events: int = 10) -> Iterator[News]:
    """Yield news of a run until it has ended or is lost; a store that is away is waited for, for a minute.

    Args:
        store: where the run reports.
        run: its name.
        every: seconds between looks.
        past_events: how many of the events so far come with the first news.

    Raises:
        UnknownRun: there is no such run.
        StoreUnavailable: the store was away for too long.
    """
    store.get(run)
    seen: int | None = None
    answered = time.monotonic()
    while True:
        begun = time.monotonic()
        try:
            # The state before the events: what is read last misses none that led to the state.
            told = status(store, run, events=0)
            new = store.events(run, limit=past_events) if seen is None else store.events(run, after_id=seen)
        except StoreUnavailable:
            if begun - answered > AWAY_SECONDS:
                raise
        else:
            answered = begun
            seen = max([seen or 0, *(event.id for event in new)])
            yield News(told, new)
            if told["state"] in (*ENDED_STATES, LOST):
                return
        time.sleep(max(0.0, begun + every - time.monotonic()))
