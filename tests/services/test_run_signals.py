"""Real runs that are stopped: by SIGINT and SIGTERM."""

from __future__ import annotations

import json
import signal
import time

import pytest

from services.store.sqlite import SQLiteRunStore
from tests.services.running import LONG, Start

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_interrupt_stops_in_order_within_ten_seconds(start: Start) -> None:
    run = start("interrupted", *LONG)
    run.wait_for(lambda s: s["state"] == "running" and s["updates"] > 0)
    began = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    run.process.wait(20)
    assert time.monotonic() - began < 10
    assert run.process.returncode == 130
    assert json.loads(run.out.read_text())["stopped_because"] == "interrupted"
    assert (run.home / "interrupted" / "checkpoints" / "last.ckpt").exists()
    assert run.leftovers(2) == []
    assert run.status()["state"] == "finished"


def test_a_second_interrupt_stops_at_once(start: Start) -> None:
    run = start("twice", *LONG)
    run.wait_for(lambda s: s["state"] == "running")
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    began = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    run.process.wait(5)
    assert time.monotonic() - began < 2
    assert run.leftovers(5) == []


def test_an_interrupt_while_starting_is_obeyed(start: Start) -> None:
    run = start("early", *LONG)
    store = SQLiteRunStore(run.home / "squall.db")
    end = time.monotonic() + 60
    while not any(record.name == "early" for record in store.list_runs()) and time.monotonic() < end:
        time.sleep(0.05)
    store.close()
    run.process.send_signal(signal.SIGINT)
    run.process.wait(60)
    assert run.process.returncode != 0
    assert run.leftovers() == []
    assert run.status()["state"] in ("finished", "failed")


def test_terminated_stops_in_order(start: Start) -> None:
    """As `docker stop`, `ray job stop`, and `timeout` do: one SIGTERM for the process, and one for its group."""
    run = start("terminated", *LONG)
    run.wait_for(lambda s: s["state"] == "running" and s["updates"] > 0)
    run.process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    run.process.send_signal(signal.SIGTERM)
    run.process.wait(15)
    assert run.process.returncode == 143, run.err.read_text()
    assert json.loads(run.out.read_text())["stopped_because"] == "terminated"
    assert (run.home / "terminated" / "checkpoints" / "last.ckpt").exists()
    assert run.leftovers(2) == []
