"""Location of runs and of their store. Fast to import, so that commands that only read start quickly."""

from __future__ import annotations

import os
import re
from pathlib import Path

from replay.errors import ConfigurationError
from services.store.base import RunStore
from services.store.sqlite import SQLiteRunStore

CONFIG = "config.yaml"
SUMMARY = "summary.json"


def runs_dir() -> Path:
    """Return the absolute path of the folder that contains all runs: SQUALL_HOME, else `runs` in the working folder."""
    return Path(os.environ.get("SQUALL_HOME") or "runs").absolute()


def open_default_store(url: str | None = None, *, create: bool = False) -> RunStore:
    """Open the store of `url`, else of SQUALL_STORE, else the file in `runs_dir()`, as `open_store` does."""
    return open_store(url or os.environ.get("SQUALL_STORE") or None, runs_dir(), create=create)


def open_store(url: str | None, folder: Path, *, create: bool = True, timeout_seconds: float = 5.0) -> RunStore:
    """Open the store that `--store` names; the first call creates the file or the connection.

    Args:
        url: None for the file `squall.db` in `folder`; `sqlite:///relative/path`, `sqlite:////absolute/path`, or the
            URL of a Redis server, see `redis_url.SCHEMES`.
        folder: folder of the runs.
        create: whether to create a missing file. Readers pass False: a missing file then reads as empty.
        timeout_seconds: time that a call may wait for the store.

    Raises:
        ConfigurationError: (a ValueError) a URL that names no store.
    """
    if url is None:
        return SQLiteRunStore(folder / "squall.db", create=create, timeout_seconds=timeout_seconds)
    if re.match(r"(rediss?|unix):", url):
        from services.store.redis import RedisRunStore  # here, because the Redis client is slow to import

        return RedisRunStore(url, timeout_seconds=timeout_seconds)
    prefix = "sqlite:///"
    path = url.removeprefix(prefix)
    if not url.startswith(prefix) or path.strip("/") in ("", ":memory:"):
        shown = re.sub(r"^([a-z0-9+]+:/*)?.*@", r"\1***@", url)  # the URL may contain a password
        raise ConfigurationError(
            "a store is sqlite:///relative/file.db, sqlite:////absolute/file.db, redis://host:port/db, rediss://... "
            f"(TLS) or unix:///path/to/socket, got {shown!r}"
        )
    return SQLiteRunStore(Path(path), create=create, timeout_seconds=timeout_seconds)
