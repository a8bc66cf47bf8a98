"""What a run's visitors meet when the store goes away: a real Redis server, killed while a run is followed."""

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
        news = remote_control.follow(store, "followed", every=0.05)
        assert next(news).status["state"] == "running"
        server.stop(signal.SIGKILL)
        server.start()
        store.add_event("followed", "note", "back again", time.time())
        seen = next(event for told in news for event in told.events)
        assert seen.text == "back again"


def test_a_store_that_stays_away_ends_the_following(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_control, "AWAY_SECONDS", 0.5)
    with RedisServer(tmp_path) as server, RedisRunStore(server.url) as store:
        register(store)
        news = remote_control.follow(store, "followed", every=0.05)
        next(news)
        server.stop(signal.SIGKILL)
        with pytest.raises(StoreUnavailable):
            next(news)
