"""The connection of a run store to an SQLite file: it opens and checks the file, and runs transactions."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from replay.errors import SquallError
from services.errors import StoreIncompatible, StoreUnavailable

_APPLICATION_ID = 0x53514C4C  # "SQLL". Files of other programs have another id and are never changed.
_SCHEMA_VERSION = 1
_SCHEMA = (
    """CREATE TABLE runs (
        name TEXT PRIMARY KEY, created REAL NOT NULL, algorithm TEXT NOT NULL, environment TEXT NOT NULL,
        seed TEXT NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL, pid_started REAL NOT NULL,
        state TEXT NOT NULL, heartbeat REAL NOT NULL, stopped_because TEXT, config TEXT NOT NULL,
        snapshot TEXT) WITHOUT ROWID""",
    """CREATE TABLE commands (
        run TEXT NOT NULL, id INTEGER NOT NULL, time REAL NOT NULL, kind TEXT NOT NULL,
        arguments TEXT NOT NULL, result TEXT, PRIMARY KEY (run, id)) WITHOUT ROWID""",
    """CREATE TABLE events (
        run TEXT NOT NULL, id INTEGER NOT NULL, time REAL NOT NULL, kind TEXT NOT NULL,
        text TEXT NOT NULL, PRIMARY KEY (run, id)) WITHOUT ROWID""",
    """CREATE TABLE metrics (
        run TEXT NOT NULL, id INTEGER NOT NULL, time REAL NOT NULL, step INTEGER NOT NULL,
        "values" TEXT NOT NULL, PRIMARY KEY (run, id)) WITHOUT ROWID""",
)


class SQLiteConnection:
    """One connection to a store's file, which all threads share under a lock. The first transaction connects.

    Args:
        path: absolute path of the file.
        create: whether to create a missing file. Otherwise a missing file reads as an empty store.
        timeout_seconds: time that a transaction may wait for other threads, and for other processes that lock the file.

    Attributes:
        has_existed: whether the file has existed before. A file that is missing later counts as an outage.
    """

    def __init__(self, path: Path, create: bool, timeout_seconds: float) -> None:
        self._path = path
        self._create = create
        self._timeout = timeout_seconds
        self.has_existed = False
        # Transactions are short, and a single connection leaves none open when a thread ends.
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._file_id: tuple[int, int] | None = None
        self._closed = False

    @property
    def has_file(self) -> bool:
        """Whether the connection has a file, rather than an empty store in memory in place of a missing file."""
        return self._file_id is not None

    def close(self) -> None:
        """Close the file; later transactions raise `StoreUnavailable`."""
        with self._lock:
            self._closed = True
            self._disconnect()

    @contextmanager
    def transaction(self, write: bool = False) -> Iterator[sqlite3.Connection]:
        """Run one atomic transaction, exclusive if `write`. After an SQLite error the next transaction connects again.

        Raises:
            StoreUnavailable: the file is locked, missing, or cannot be accessed now.
            StoreIncompatible: the file belongs to another program or to a newer Squall.
        """
        if not self._lock.acquire(timeout=self._timeout):
            raise StoreUnavailable(f"run store {self._path}: another thread has used it for {self._timeout:g} s")
        try:
            connection = self._connect()
            # IMMEDIATE: a transaction that reads first and locks later would fail instead of waiting for the lock.
            begin = "BEGIN IMMEDIATE" if write else "BEGIN"
            try:
                connection.execute(begin)
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        except (sqlite3.ProgrammingError, sqlite3.IntegrityError):
            raise
        except sqlite3.DatabaseError as error:
            self._disconnect()
            raise self._translate(error) from error
        except OSError as error:
            raise StoreUnavailable(f"run store {self._path}: {error.strerror or error}") from error
        finally:
            self._lock.release()

    def _translate(self, error: sqlite3.DatabaseError) -> SquallError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary code of an extended code
        if code == sqlite3.SQLITE_NOTADB:
            return StoreIncompatible(
                f"{self._path} is not an SQLite file, and thus not a run store; move it away, or name another file"
            )
        waited = f" (waited {self._timeout:g} s)" if code == sqlite3.SQLITE_BUSY else ""
        return StoreUnavailable(f"run store {self._path}: {error}{waited}")

    def _connect(self) -> sqlite3.Connection:
        if self._closed:
            raise StoreUnavailable(f"run store {self._path} was closed")
        file_id = _file_id(self._path)
        if self._connection is not None and file_id == self._file_id:
            return self._connection
        self._disconnect()
        if file_id is None and self.has_existed:
            raise StoreUnavailable(f"run store {self._path} was deleted or moved away")
        if file_id is None and not self._create:
            self._connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        else:
            if file_id is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            mode = "rwc" if file_id is None else "rw"
            self._connection = sqlite3.connect(
                f"{self._path.as_uri()}?mode={mode}",
                uri=True,
                timeout=self._timeout,
                isolation_level=None,
                check_same_thread=False,
            )
        try:
            self._prepare(self._connection)
        except BaseException:
            self._disconnect()
            raise
        self._file_id = _file_id(self._path) if self._create or file_id is not None else None
        self.has_existed = self._file_id is not None
        return self._connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Check that the file is a run store, and create the tables of a new one."""
        # The order of the checks matters: another process may be creating tables, id, and version in one transaction.
        has_tables = connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is not None
        if has_tables and _pragma(connection, "application_id") != _APPLICATION_ID:
            raise StoreIncompatible(
                f"{self._path} is an SQLite file of another program; name another file for the run store"
            )
        version = _pragma(connection, "user_version")
        if version > _SCHEMA_VERSION:
            raise StoreIncompatible(
                f"{self._path} is a run store of version {version}, made by a newer Squall;"
                f" this one reads up to version {_SCHEMA_VERSION}: upgrade, or use another store"
            )
        # With a write-ahead log, readers and the writer do not block each other. Some file systems do not support it.
        try:
            (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
            if mode == "delete":
                (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        except sqlite3.OperationalError:
            mode = "delete"
        if mode == "wal":
            connection.execute("PRAGMA synchronous = NORMAL")
        if version == 0:
            connection.execute("BEGIN IMMEDIATE")
            if _pragma(connection, "user_version") == 0:
                for statement in _SCHEMA:
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            connection.execute("COMMIT")

    def _disconnect(self) -> None:
        connection, self._connection, self._file_id = self._connection, None, None
        if connection is not None:
            connection.close()


def _file_id(path: Path) -> tuple[int, int] | None:
    """Return device and inode of a file, None if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])
