"""Display of runs for people: a live view on a terminal, and the tables of the commands."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from services.store.records import RunRecord

if TYPE_CHECKING:
    from services.cli.machine_checks import Finding  # imports Ray, which takes a while


class Display:
    """A live view of a run on standard error if that is a terminal; otherwise one line for each important event."""

    _MINOR_EVENTS = ("running", "restart")

    def __init__(self, run: str) -> None:
        """Create the display; a `with` block starts and stops it."""
        self.console = Console(stderr=True, highlight=False)
        self._run = run
        self._live = (
            Live(console=self.console, refresh_per_second=4, transient=True) if self.console.is_terminal else None
        )

    def __enter__(self) -> Display:
        """Start to show the run."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop showing the run."""
        if self._live is not None:
            self._live.stop()

    def snapshot(self, snapshot: dict[str, Any]) -> None:
        """Show the state of the run."""
        if self._live is not None:
            self._live.update(render_snapshot(self._run, snapshot, processes=False))

    def event(self, kind: str, text: str, at: float | None = None) -> None:
        """Show an event.

        Args:
            kind: kind of the event.
            text: text of the event; its first line is shown.
            at: time of the event in Unix seconds; None for now.
        """
        if self._live is not None or kind not in self._MINOR_EVENTS:
            clock = time.strftime("%H:%M:%S", time.localtime(at))
            self.console.print(f"{clock} {text.splitlines()[0]}", markup=False, soft_wrap=True)


def render_status(status: dict[str, Any]) -> Group:
    """Return a status from `services.store.remote_control.status` as a renderable."""
    run = status["run"]
    has_snapshot = "env_steps" in status
    parts: list[Any] = [render_snapshot(run, status) if has_snapshot else f"{run}: {status['state']}"]
    if status["stopped_because"]:
        parts.append(f"{status['state']}: {status['stopped_because']}")
    return Group(*parts, render_events(status["events"]))


def render_snapshot(run: str, snapshot: dict[str, Any], *, processes: bool = True) -> Group:
    """Return a snapshot as a renderable: progress, rates, returns, replay, waiting processes, and all processes."""
    replay = snapshot.get("replay") or {}
    done, total = snapshot["env_steps"], snapshot["steps"]
    grid = Table.grid(padding=(0, 2))
    grid.add_row("steps", f"{done:,} of {total:,}", ProgressBar(total=total, completed=min(done, total), width=24))
    grid.add_row(
        "rates", f"{snapshot['env_steps_per_second']:,.0f} steps/s", f"{snapshot['updates_per_second']:,.0f} updates/s"
    )
    grid.add_row("updates", f"{snapshot['updates']:,}", f"weights version {snapshot['weights_version']}")
    grid.add_row(
        "return", _number(snapshot["train_return_mean"]), f"best evaluation {_number(snapshot['best_return'])}"
    )
    if replay:
        fill = f"{replay['size']:,} of {replay['capacity']:,}"
        grid.add_row("replay", fill, f"{replay['bytes'] / 2**20:,.0f} MiB")
        ratio = f"{snapshot['samples_per_insert']:.2f}"
        grid.add_row("samples per insert", ratio, f"target {snapshot['samples_per_insert_wanted']:.2f}")
    for process, reason in snapshot["waiting"].items():
        grid.add_row(f"{process} waits for", Text(reason), "")
    parts: list[Any] = [Text(f"{run}: {snapshot['state']}"), grid]
    if processes:
        parts.append(_processes(snapshot["processes"]))
    return Group(*parts)


def _processes(processes: list[dict[str, Any]]) -> Table:
    table = Table("process", "node", "pid", "state", "restarts", "status", box=None, pad_edge=False)
    for process in processes:
        message = process["last_death"] or process["last_word"] or ""
        pid = "" if process["pid"] is None else str(process["pid"])
        table.add_row(process["name"], process["node"], pid, process["state"], str(process["restarts"]), Text(message))
    return table


def render_runs(records: list[RunRecord]) -> Table:
    """Return the list of runs as a table."""
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "algorithm", "environment", "seed", "state", "started"):
        table.add_column(heading, no_wrap=True, overflow="ignore", min_width=len(heading))
    table.add_column("reason", overflow="fold")
    for record in records:
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.created))
        cells = (record.name, record.algorithm, record.environment, str(record.seed), record.state, started)
        table.add_row(*cells, Text(record.stopped_because or ""))
    return table


def render_events(events: list[dict[str, Any]]) -> Table:
    """Return events as a table, oldest first."""
    table = Table("time", "event", "", box=None, pad_edge=False, show_header=False)
    for event in events:
        clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
        table.add_row(clock, event["kind"], Text(event["text"].splitlines()[0]))
    return table


def render_summary(summary: dict[str, Any]) -> Table:
    """Return a run's summary as a table."""
    table = Table("", "", box=None, pad_edge=False, show_header=False)
    for key, value in summary.items():
        table.add_row(key, _number(value) if isinstance(value, float) else str(value))
    return table


def render_findings(findings: Sequence[Finding]) -> Table:
    """Return the findings of `squall doctor` as a table, with advice below each finding that has any."""
    table = Table("place", "check", "verdict", "finding", box=None, pad_edge=False)
    for finding in findings:
        advice = f"\n-> {finding.advice}" if finding.advice else ""
        table.add_row(finding.place, finding.check, finding.verdict, finding.found + advice)
    return table


def _number(value: float | None) -> str:
    return "none yet" if value is None else f"{value:,.2f}"
