"""`squall runs`, `squall status`, `squall watch`: look at runs through the store."""

from __future__ import annotations

import argparse
from typing import TextIO

from services.cli.arguments import Commands
from services.cli.output import print_result


def add_to(commands: Commands) -> None:
    """Add the commands and their arguments."""
    commands.add("runs", _runs, "list runs", "List runs, newest first.")

    status = commands.add("status", _status, "show a run", "Show a run: its progress, processes, and last events.")
    status.add_argument("run", help="name of the run")
    status.add_argument("--events", type=int, default=10, metavar="N", help="number of events to show; default: 10")

    watch = commands.add(
        "watch",
        _watch,
        "show a live run continuously",
        "Show a live run continuously, from any terminal. With --json, print one line of JSON per second.",
    )
    watch.add_argument("run", help="name of the run")


def _runs(parsed: argparse.Namespace, out: TextIO) -> int:
    from services.cli.display import render_runs
    from services.store.locate import open_default_store

    with open_default_store(parsed.store) as store:
        records = store.list_runs()
    keys = ("name", "algorithm", "environment", "seed", "state", "created", "stopped_because")
    listed = [{key: getattr(record, key) for key in keys} for record in records]
    return print_result(out, parsed.json, listed, render_runs(records))


def _status(parsed: argparse.Namespace, out: TextIO) -> int:
    from services.cli.display import render_status
    from services.store import remote_control
    from services.store.locate import open_default_store

    with open_default_store(parsed.store) as store:
        status = remote_control.status(store, parsed.run, events=parsed.events)
    return print_result(out, parsed.json, status, render_status(status))


def _watch(parsed: argparse.Namespace, out: TextIO) -> int:
    from services.cli.display import Display, render_status
    from services.store import remote_control
    from services.store.locate import open_default_store

    with open_default_store(parsed.store) as store, Display(parsed.run) as display:
        for update in remote_control.follow(store, parsed.run):
            if parsed.json:
                print_result(out, True, update.plain(), "")
                out.flush()
                continue
            for event in update.events:
                display.event(event.kind, event.text, event.time)
            if "env_steps" in update.status:
                display.snapshot(update.status)
    return 0 if parsed.json else print_result(out, False, {}, render_status(update.status))
