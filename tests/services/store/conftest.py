"""Fixtures for the tests of the run store: every test with `store` or `backend` runs on each of `BACKENDS`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.store.base import RunStore
from tests.services.redis_server import RedisServer
from tests.services.store.backends import BACKENDS, Backend


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Start a Redis server that the tests of a module share."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(redis_server: RedisServer) -> RedisServer:
    """Return a Redis server without data."""
    redis_server.command("FLUSHALL")
    return redis_server


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Return one of `BACKENDS`, without data."""
    return BACKENDS[request.param](request)


@pytest.fixture
def store(backend: Backend) -> Iterator[RunStore]:
    """Open a store of the backend."""
    with backend.open() as opened:
        yield opened
