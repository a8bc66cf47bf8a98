"""The SQLite store: creation, checks, and loss of its file."""

from __future__ import annotations

import difflib
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from services.errors import (
    StoreIncompatible,
    StoreUnavailable,
    UnknownRun,
)
from services.store.buffered import BufferedWriter
from services.store.locate import open_store
from services.store.sqlite import SQLiteRunStore
from tests.services.store.backends import record, start_python


def test_looking_makes_no_file_and_sees_one_that_appears(tmp_path: Path) -> None:
    runs_dir = tmp_path / "runs"
    with open_store(None, runs_dir, create=False) as reader:
        assert reader.list_runs() == []
        with pytest.raises(UnknownRun, match="there are no runs yet"):
            reader.get("pong-1")
        with pytest.raises(StoreUnavailable, match="there is no run store at"):
            reader.register(record())
        assert not runs_dir.exists()
        with open_store(None, runs_dir) as writer:
            writer.register(record())
            assert [run.name for run in reader.list_runs()] == ["pong-1"]
            sent = reader.send_command("pong-1", "stop", {})
            assert [command.id for command in writer.pending_commands("pong-1")] == [sent]


def test_closing_leaves_one_file(tmp_path: Path) -> None:
    with open_store(None, tmp_path) as store:
        store.register(record())
        probe = sqlite3.connect(tmp_path / "squall.db")
        assert probe.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        probe.close()
    assert [path.name for path in tmp_path.iterdir()] == ["squall.db"]


def test_a_store_of_a_newer_squall_is_refused_and_left_alone(tmp_path: Path) -> None:
    with open_store(None, tmp_path) as store:
        store.register(record())
    newer = sqlite3.connect(tmp_path / "squall.db")
    newer.execute("PRAGMA user_version = 7")
    newer.close()
    with open_store(None, tmp_path) as store:
        for call in (store.list_runs, lambda: store.register(record("other"))):
            with pytest.raises(StoreIncompatible, match=r"version 7, made by a newer Squall.*up to version 1"):
                call()


def test_another_programs_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "squall.db"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE runs (id INTEGER)")
    other.execute("PRAGMA user_version = 1")
    other.commit()
    other.close()
    before = path.read_bytes()
    with open_store(None, tmp_path) as store, pytest.raises(StoreIncompatible, match="of another program"):
        store.list_runs()
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "squall.db"
    path.write_text("a text file\n" * 1000)
    with open_store(None, tmp_path) as store, pytest.raises(StoreIncompatible, match="is not an SQLite file"):
        store.list_runs()
    assert path.read_text() == "a text file\n" * 1000


@pytest.mark.parametrize("create", [True, False])
def test_a_folder_that_cannot_be_is_unavailable(tmp_path: Path, create: bool) -> None:
    (tmp_path / "runs").write_text("")
    with (
        open_store(None, tmp_path / "runs", create=create) as store,
        pytest.raises(StoreUnavailable, match=r"squall\.db: Not a directory"),
    ):
        store.list_runs()


def test_a_deleted_file_is_unavailable_until_it_is_back(tmp_path: Path) -> None:
    path = tmp_path / "squall.db"
    with open_store(None, tmp_path) as store:
        store.register(record())
        store.add_event("pong-1", "tick", "before", 1.0)
    with open_store(None, tmp_path) as store:
        writer = BufferedWriter(store, "pong-1", retry_seconds=0)
        writer.add_event("tick", "connected", 2.0)
        path.rename(tmp_path / "aside.db")
        writer.add_event("tick", "while away", 3.0)
        assert "was deleted or moved away" in (writer.problem or "")
        assert not path.exists()
        (tmp_path / "aside.db").rename(path)
        assert writer.close(deadline_seconds=5)
        assert [event.text for event in store.events("pong-1")] == ["before", "connected", "while away"]


def test_two_processes_may_make_the_file_at_once(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from services.store.locate import open_store
sys.stdin.readline()
for index in range(20):
    with open_store(None, Path(sys.argv[1]) / str(index)) as store:
        assert store.list_runs() == []
"""
    makers = [start_python(script, str(tmp_path)) for _ in range(2)]
    for maker in makers:
        assert maker.stdin is not None
        maker.stdin.write("go\n")
        maker.stdin.flush()
    for maker in makers:
        maker.communicate(timeout=20)
    assert [maker.returncode for maker in makers] == [0, 0]


def test_an_interrupted_change_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SQLiteRunStore(tmp_path / "squall.db") as store:
        store.register(record())
        append = store._append

        def interrupted(*arguments: Any) -> int:
            append(*arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(store, "_append", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.add_event("pong-1", "tick", "half", 1.0)
        store.add_event("pong-1", "tick", "whole", 2.0)
        assert [(event.id, event.text) for event in store.events("pong-1")] == [(1, "whole")]


def test_the_nearest_are_looked_for_while_others_use_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SQLiteRunStore(tmp_path / "squall.db") as store, ThreadPoolExecutor(1) as pool:
        store.register(record("pong-1"))

        def look(*_: Any, **__: Any) -> list[str]:
            return [run.name for run in pool.submit(store.list_runs).result(20.0)]

        monkeypatch.setattr(difflib, "get_close_matches", look)
        with pytest.raises(UnknownRun, match="the nearest: pong-1"):
            store.get("pong-2")
