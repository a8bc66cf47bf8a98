"""Events and metrics of a run, on every store."""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from replay.errors import ConfigurationError
from services.errors import (
    NotStorable,
)
from services.store.base import RunStore
from services.store.locate import open_store
from tests.services.store.backends import Backend, record


def test_events_are_read_newest_or_followed(store: RunStore) -> None:
    store.register(record())
    assert store.events("pong-1") == []
    for index in range(10):
        store.add_event("pong-1", "restart", f"worker {index}", 100.0 + index)
    newest = store.events("pong-1", limit=3)
    assert [(event.kind, event.text, event.time) for event in newest] == [
        ("restart", f"worker {index}", 100.0 + index) for index in (7, 8, 9)
    ]
    followed: list[str] = []
    last = 0
    while batch := store.events("pong-1", limit=4, after_id=last):
        followed += [event.text for event in batch]
        last = batch[-1].id
    assert followed == [f"worker {index}" for index in range(10)]
    assert store.events("pong-1", after_id=last) == []


def test_any_text_can_be_an_event(store: RunStore) -> None:
    store.register(record())
    store.add_event("pong-1", "death", "no such file: caf\udce9\0'; DROP TABLE runs; --", 1.0)
    store.add_event("pong-1", "death", "x" * 50_000, 2.0)
    first, second = store.events("pong-1")
    assert first.text == "no such file: caf?\0'; DROP TABLE runs; --"
    assert second.text == "x" * 20_000 + "... (30000 characters more)"


def test_metrics_keep_what_json_cannot_say(store: RunStore) -> None:
    store.register(record())
    store.add_metrics("pong-1", 1000, {"loss": math.nan, "a": math.inf, "b": -math.inf, "fps": 61.5}, 5.0)
    store.add_metrics("pong-1", np.int64(2000), {"loss": np.float32(0.25), "n": 3}, 6.0)  # type: ignore[arg-type]
    first, second = store.metrics("pong-1")
    assert math.isnan(first.values.pop("loss"))
    assert (first.step, first.time, first.values) == (1000, 5.0, {"a": math.inf, "b": -math.inf, "fps": 61.5})
    assert (second.step, second.time, second.values) == (2000, 6.0, {"loss": 0.25, "n": 3.0})
    assert all(type(value) is float for value in second.values.values())


@pytest.mark.parametrize("values", [{"loss": "0.5"}, {"loss": None}, {"loss": np.zeros(1)}, {3: 1.0}])
def test_a_metric_is_a_number(store: RunStore, values: Any) -> None:
    store.register(record())
    with pytest.raises(NotStorable, match="must be a number, got"):
        store.add_metrics("pong-1", 0, values, 1.0)


@pytest.mark.parametrize("step", [-1, 1.5, 2**63, None])
def test_a_step_is_a_whole_number(store: RunStore, step: Any) -> None:
    store.register(record())
    with pytest.raises(ConfigurationError, match="step must be a whole number of at least 0, got"):
        store.add_metrics("pong-1", step, {}, 1.0)


@pytest.mark.parametrize("limit", [0, -1, 2.5])
def test_a_limit_is_positive(store: RunStore, limit: Any) -> None:
    store.register(record())
    for read in (store.metrics, store.events):
        with pytest.raises(ConfigurationError, match="limit must be a whole number of at least 1, got"):
            read("pong-1", limit)


def test_histories_are_bounded_for_each_run(backend: Backend) -> None:
    with backend.open(history=20) as store:
        store.register(record("long"))
        store.register(record("short"))
        for index in range(50):
            store.add_metrics("long", index, {"x": index}, 1.0)
            store.add_event("long", "tick", str(index), 1.0)
            if index < 5:
                store.add_metrics("short", index, {"x": index}, 1.0)
        assert [row.step for row in store.metrics("long")] == list(range(30, 50))
        assert [row.step for row in store.metrics("long", limit=3)] == [47, 48, 49]
        assert [event.text for event in store.events("long", after_id=0)] == [str(i) for i in range(30, 50)]
        assert [row.step for row in store.metrics("short")] == list(range(5))


def test_metrics_are_json_that_any_language_reads(tmp_path: Path) -> None:
    with open_store(None, tmp_path) as store:
        store.register(record())
        store.add_metrics("pong-1", 0, {"loss": math.nan, "x": 1.0}, 1.0)
    probe = sqlite3.connect(tmp_path / "squall.db")
    (text,) = probe.execute('SELECT "values" FROM metrics').fetchone()
    probe.close()
    assert text == '{"loss": "nan", "x": 1.0}'
