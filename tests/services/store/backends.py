"""The stores that the tests run on, and records of runs to register in them."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.store.base import RunStore
from services.store.records import RunRecord, this_process
from services.store.redis import RedisRunStore
from services.store.sqlite import SQLiteRunStore
from tests.services.redis_server import RedisServer

ROOT = Path(__file__).parents[3]


class SQLiteBackend:
    """A file for each test; it is unavailable, and does not answer, while another connection holds its write lock."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.path = request.getfixturevalue("tmp_path") / "squall.db"
        self.url = f"sqlite:///{self.path}"

    def open(self, **options: Any) -> RunStore:
        return SQLiteRunStore(self.path, **options)

    @contextmanager
    def outage(self) -> Iterator[None]:
        blocker = sqlite3.connect(self.path, isolation_level=None)
        try:
            blocker.execute("BEGIN EXCLUSIVE")
            yield
        finally:
            blocker.close()

    silence = outage


class RedisBackend:
    """A server that the tests of a module share; unavailable while stopped, without answers while suspended."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.server: RedisServer = request.getfixturevalue("redis_server")
        self.server.command("FLUSHALL")
        self.url = self.server.url

    def open(self, **options: Any) -> RunStore:
        return RedisRunStore(self.url, **options)

    @contextmanager
    def outage(self) -> Iterator[None]:
        self.server.stop()
        try:
            yield
        finally:
            self.server.start()

    @contextmanager
    def silence(self) -> Iterator[None]:
        with self.server.suspended():
            yield


Backend = SQLiteBackend | RedisBackend
BACKENDS: dict[str, type[Backend]] = {"sqlite": SQLiteBackend, "redis": RedisBackend}


def record(name: str = "pong-1", **changes: Any) -> RunRecord:
    """Return the record of a run of this process, which counts as live."""
    host, pid, started = this_process()
    now = time.time()
    made = RunRecord(
        name=name,
        created=now,
        algorithm="dqn",
        environment="PongNoFrameskip-v4",
        seed=0,
        host=host,
        pid=pid,
        pid_started=started,
        state="running",
        heartbeat=now,
        stopped_because=None,
        config={"actors": 2},
    )
    return replace(made, **changes)


def elsewhere(name: str = "pong-1", **changes: Any) -> RunRecord:
    """Return the record of a run on another machine, whose processes cannot be checked here."""
    return record(name, host="another-machine", pid=2**22 + 1, pid_started=1.0, **changes)


def ago(seconds: float) -> float:
    return time.time() - seconds


def start_python(script: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a Python process that runs `script`."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
