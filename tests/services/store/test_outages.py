"""Stores that are unavailable or closed, and their health, on every store."""

from __future__ import annotations

import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from replay.errors import ConfigurationError
from services.errors import (
    StoreUnavailable,
)
from services.store.base import RunStore
from services.store.redis import RedisRunStore
from tests.services.redis_server import RedisServer
from tests.services.store.backends import Backend, RedisBackend, record


def test_a_store_that_is_away_is_an_error_in_time(backend: Backend, store: RunStore) -> None:
    store.register(record())
    with store.with_timeout(0.2) as impatient:
        with backend.outage():
            started = time.monotonic()
            with pytest.raises(StoreUnavailable, match="store"):
                impatient.update_state("pong-1", "stopping")
            assert time.monotonic() - started < 2
        assert impatient.get("pong-1").state == "running"
        impatient.update_state("pong-1", "stopping")
    assert store.get("pong-1").state == "stopping"


def test_a_call_outlasts_a_short_outage(backend: Backend, store: RunStore) -> None:
    store.register(record())
    with ThreadPoolExecutor(1) as thread:
        with backend.silence():
            waiting = thread.submit(store.update_state, "pong-1", "stopping")
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
        waiting.result(timeout=5)
    assert store.get("pong-1").state == "stopping"


def test_health_names_the_server(store: RunStore, backend: Backend) -> None:
    health = store.health()
    assert health.warnings == ()
    if isinstance(backend, RedisBackend):
        assert re.match(r"Redis \d+\.\d+\.\d+, redis://127", health.server)
        assert health.clock == pytest.approx(time.time(), abs=5.0)
    else:
        assert str(backend.path) in health.server
        assert health.clock is None


def test_health_of_a_server_that_is_away(redis_server: RedisServer) -> None:
    with (
        RedisRunStore(redis_server.url, timeout_seconds=0.3) as store,
        redis_server.suspended(),
        pytest.raises(StoreUnavailable, match="no answer within"),
    ):
        store.health()


def test_a_redis_that_may_forget_is_warned_about(tmp_path: Path) -> None:
    options = ("--appendonly", "no", "--maxmemory-policy", "allkeys-lru", "--requirepass", "hunter2")
    with RedisServer(tmp_path, *options) as server, RedisRunStore(server.url.replace("//", "//:hunter2@")) as store:
        health = store.health()
    assert [("noeviction" in warning, "appendonly" in warning) for warning in health.warnings] == [
        (True, False),
        (False, True),
    ]
    assert "hunter2" not in str(health)


def test_a_closed_store_says_so(backend: Backend) -> None:
    store = backend.open()
    store.register(record())
    store.close()
    store.close()
    with pytest.raises(StoreUnavailable, match="was closed"):
        store.get("pong-1")


@pytest.mark.parametrize("options", [{"timeout_seconds": 0}, {"timeout_seconds": math.nan}, {"history": 0}])
def test_options_that_cannot_work_are_refused(backend: Backend, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"a store's .* must be"):
        backend.open(**options)
