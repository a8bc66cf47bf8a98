"""The connection of a run store to a Redis server: it checks each server that it reaches, and translates errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from replay.errors import ConfigurationError, SquallError
from services.errors import StoreIncompatible, StoreUnavailable
from services.store.redis_url import hide_password, parse_url

SCHEMA_KEY = "squall:schema"
SCHEMA_VERSION = 1
_MIN_SERVER_VERSION = (6, 2)
# The text of a script's error contains the error code of the failed command.
_TEMPORARY = re.compile(r"\b(OOM|MISCONF|READONLY|BUSY|LOADING|MASTERDOWN|NOREPLICAS|UNKILLABLE)\b")


class RedisConnection:
    """A pool of connections to one Redis server. The first call connects.

    Attributes:
        shown_url: the URL without its password, for people.
        has_connected: whether a connection has succeeded before. A refused password then counts as an outage.
    """

    def __init__(self, url: str, timeout_seconds: float) -> None:
        self.shown_url = hide_password(url)
        self.has_connected = False
        self._timeout = timeout_seconds
        self._closed = False
        connection_class, options, self._secrets = parse_url(url)
        self._client: Any = redis.Redis(
            connection_pool=redis.ConnectionPool(
                connection_class=connection_class,
                **options,
                socket_timeout=timeout_seconds,
                socket_connect_timeout=timeout_seconds,
                retry=Retry(NoBackoff(), 0),
                driver_info=None,
                protocol=2,
                decode_responses=True,
                encoding_errors="replace",
                redis_connect_func=self._check_server,
            )
        )

    def close(self) -> None:
        """Close the connections; later calls raise `StoreUnavailable`."""
        self._closed = True
        self._client.connection_pool.disconnect()

    @contextmanager
    def client(self) -> Iterator[Any]:
        """Yield the Redis client, and translate its errors into Squall's.

        Raises:
            StoreUnavailable: no answer within the timeout, or the server cannot carry out the call now.
            StoreIncompatible: the server is not Redis, is too old, or contains the data of another program.
            ConfigurationError: the server refuses the password of the first connection.
        """
        if self._closed:
            raise StoreUnavailable(f"run store {self.shown_url} was closed")
        try:
            yield self._client
        except redis.RedisError as error:
            has_secret = any(secret in str(error) for secret in self._secrets)
            raise self._translate(error) from (None if has_secret else error)

    def _check_server(self, connection: Any) -> None:
        """Log in on a new connection, and check the server: after a restart another server may have the address."""
        try:
            connection.on_connect()
            connection.send_command("INFO", "server")
            info = str(connection.read_response())
            version = re.search(r"redis_version:(\d+)\.(\d+)", info)
            if version is None or tuple(map(int, version.groups())) < _MIN_SERVER_VERSION:
                actual = "not Redis" if version is None else f"Redis {'.'.join(version.groups())}"
                required = ".".join(map(str, _MIN_SERVER_VERSION))
                raise StoreIncompatible(f"run store {self.shown_url} is {actual}; Squall needs {required} or newer")
            connection.send_command("GET", SCHEMA_KEY)
            schema = connection.read_response() or "0"
            if not schema.isdecimal():
                raise StoreIncompatible(
                    f"run store {self.shown_url}: another program uses the key {SCHEMA_KEY}; use another database"
                )
            if int(schema) > SCHEMA_VERSION:
                raise StoreIncompatible(
                    f"run store {self.shown_url} is of version {schema}, made by a newer Squall;"
                    f" this one reads up to version {SCHEMA_VERSION}: upgrade, or use another store"
                )
        except BaseException:
            connection.disconnect()
            raise
        self.has_connected = True

    def _translate(self, error: redis.RedisError) -> SquallError:
        text = str(error)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        text = f"run store {self.shown_url}: {' '.join(text.split())[:300]}"
        if isinstance(error, redis.exceptions.AuthenticationError | redis.exceptions.NoPermissionError):
            return StoreUnavailable(text) if self.has_connected else ConfigurationError(text)
        if isinstance(error, redis.TimeoutError):
            return StoreUnavailable(f"run store {self.shown_url}: no answer within {self._timeout:g} s")
        if isinstance(error, redis.InvalidResponse):
            return StoreIncompatible(f"the server at {self.shown_url} is not Redis")
        if isinstance(error, redis.ConnectionError) or _is_temporary(error):
            return StoreUnavailable(text)
        return StoreIncompatible(text)


def _is_temporary(error: redis.RedisError) -> bool:
    temporary = redis.OutOfMemoryError | redis.ReadOnlyError | redis.exceptions.MasterDownError
    return isinstance(error, temporary) or _TEMPORARY.search(str(error)) is not None
