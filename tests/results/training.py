"""Training the runs of an experiment with the real command line: start, resume, or skip."""

from __future__ import annotations

import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from services.cli.curves import EVALUATION, as_series
from services.errors import UnknownRun
from services.store.locate import CONFIG, SUMMARY
from services.store.sqlite import SQLiteRunStore
from tests.results.rows import Experiment

ROOT = Path(__file__).parents[2]
COMPLETE = ("steps", "return")
"""Reasons of a complete run: it took all its steps, or reached its `stop_at_return`."""


class TrainingFailed(Exception):
    """A run that did not complete; the text has the reason."""


@dataclass(frozen=True)
class Run:
    """A complete run.

    Attributes:
        command: command line that trained the run.
        steps: environment steps that the run was given.
        cores: cores of the machine that trained the run.
        summary: content of the run's `summary.json`.
        evaluations: environment steps and mean return of each periodic evaluation; None if it was not finite.
    """

    command: str
    steps: int
    cores: int
    summary: dict[str, Any]
    evaluations: tuple[tuple[int, float | None], ...]


def read_runs(file: Path) -> dict[str, Run]:
    """Read runs by name; none if the file does not exist."""
    if not file.exists():
        return {}
    entries = json.loads(file.read_text())
    return {
        name: Run(**{**entry, "evaluations": tuple((step, value) for step, value in entry["evaluations"])})
        for name, entry in entries.items()
    }


def write_runs(file: Path, runs: Mapping[str, Run]) -> None:
    """Write runs by name, one on each line."""
    lines = (f"{json.dumps(name)}: {json.dumps(asdict(runs[name]), allow_nan=False)}" for name in sorted(runs))
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def decide(exists: bool, summary: Mapping[str, Any] | None) -> str:
    """Return the next step of a run: `start`, `resume`, or `skip`."""
    if summary is not None and summary["stopped_because"] in COMPLETE:
        return "skip"
    return "resume" if exists else "start"


def differences(row: Experiment, seed: int, config: Mapping[str, Any]) -> list[str]:
    """Return the differences between a run's configuration and the row, as text."""
    wanted = {"algorithm": row.algorithm, "environment": row.environment, "actors": row.actors, "seed": seed}
    if row.steps is not None:
        wanted["steps"] = row.steps
    has = {**config, **config["hyperparameters"]}
    return [
        f"{key} is {has.get(key)}, not {value}"
        for key, value in {**wanted, **row.settings}.items()
        if has.get(key) != value
    ]


def make(row: Experiment, seed: int, runs_dir: Path) -> Run:
    """Start or resume a run unless it is complete, and return its figures.

    Raises:
        TrainingFailed: the run did not complete.
    """
    name = row.run(seed)
    folder = runs_dir / name
    step = decide((folder / CONFIG).exists(), _summary(folder))
    if step != "start":
        differs = differences(row, seed, yaml.safe_load((folder / CONFIG).read_text()))
        if differs:
            raise TrainingFailed(f"{name} is another experiment: {'; '.join(differs)}; --fresh starts it over")
    if step != "skip":
        named = ["--resume", name] if step == "resume" else [*row.arguments(seed), "--name", name]
        status, last_line = _squall_train([*named, "--json"], runs_dir, runs_dir / f"{name}.log")
        if status or decide(True, _summary(folder)) != "skip":
            raise TrainingFailed(f"{name}: {step} ended with exit status {status}: {last_line}")
    return collect(row, seed, runs_dir)


def collect(row: Experiment, seed: int, runs_dir: Path) -> Run:
    """Return the figures of a complete run."""
    name = row.run(seed)
    with SQLiteRunStore(runs_dir / "squall.db", create=False) as store:
        metrics = store.metrics(name)
    series = as_series((m.step, m.values[EVALUATION]) for m in metrics if EVALUATION in m.values)
    points = zip(series.steps.tolist(), series.values.tolist(), strict=True)
    summary = _summary(runs_dir / name)
    assert summary is not None
    return Run(
        command=row.command(seed),
        steps=yaml.safe_load((runs_dir / name / CONFIG).read_text())["steps"],
        cores=os.cpu_count() or 1,
        summary=summary,
        evaluations=tuple((int(step), value if math.isfinite(value) else None) for step, value in points),
    )


def forget(name: str, runs_dir: Path) -> None:
    """Remove a run that is not live, so that its name is free.

    Raises:
        TrainingFailed: the run is live.
    """
    file = runs_dir / "squall.db"
    if file.exists():
        with SQLiteRunStore(file, create=False) as store:
            try:
                if store.get(name).live:
                    raise TrainingFailed(f"{name} is live: squall stop {name}")
            except UnknownRun:
                pass
        connection = sqlite3.connect(file)
        with connection:
            connection.execute("DELETE FROM runs WHERE name = ?", (name,))
            for table in ("commands", "events", "metrics"):
                connection.execute(f"DELETE FROM {table} WHERE run = ?", (name,))
        connection.close()
    shutil.rmtree(runs_dir / name, ignore_errors=True)
    (runs_dir / f"{name}.log").unlink(missing_ok=True)


def _summary(folder: Path) -> dict[str, Any] | None:
    file = folder / SUMMARY
    summary: dict[str, Any] | None = json.loads(file.read_text()) if file.exists() else None
    return summary


def _squall_train(arguments: list[str], runs_dir: Path, log: Path) -> tuple[int, str]:
    """Run `squall train` to its end, and append its output to `log`; return the exit status and the last line."""
    runs_dir.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.cli.main", "train", *arguments],
            env={**os.environ, "SQUALL_HOME": str(runs_dir), "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            status = process.wait()
        except BaseException:
            # The run writes a checkpoint before it ends, and is resumed the next time.
            process.terminate()
            process.wait()
            raise
    lines = log.read_text().strip().splitlines()
    return status, lines[-1] if lines else "no output"
