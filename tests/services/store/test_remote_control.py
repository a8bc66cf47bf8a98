"""Following a run while its store is unavailable: a real Redis server is killed."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from services.errors import StoreUnavailable
from services.store import remote_control
from services.store.base import RunStore
from services.store.records import RunRecord, this_process
from services.store.redis import RedisRunStore
from tests.services.redis_server import RedisServer


def register(store: RunStore) -> None:
    now, me = time.time(), this_process()
    store.register(RunRecord("followed", now, "dqn", "CartPole-v1", 0, *me, "running", now, None, {}))


def test_a_store_that_comes_back_is_waited_for(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server, RedisRunStore(server.url) as store:
        register(store)
        updates = remote_control.follow(store, "followed", every=0.05)
        assert next(updates).status["state"] == "running"
        server.stop(signal.SIGKILL)
        server.start()
        store.add_event("followed", "note", "after the outage", time.time())
        event = next(event for update in updates for event in update.events)
        assert event.text == "after the outage"


def test_a_store_that_stays_away_ends_the_following(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_control, "MAX_OUTAGE_SECONDS", 0.5)
    with RedisServer(tmp_path) as server, RedisRunStore(server.url) as store:
        register(store)
        updates = remote_control.follow(store, "followed", every=0.05)
        next(updates)
        server.stop(signal.SIGKILL)
        with pytest.raises(StoreUnavailable):
            next(updates)
