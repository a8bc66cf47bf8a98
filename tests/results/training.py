"""Making the runs of a row with the real command line: started, resumed, or done already."""

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
from tests.results.rows import VectorStep

ROOT = Path(__file__).parents[2]
COMPLETE = ("steps", "return")
"""Why a run stopped that has no more to do: it has its steps, or the return that it was to reach."""


class TrainingFailed(Exception):
    """A run did not come to its end; the text says why."""


@dataclass(frozen=True)
class Run:
    """A run that came to its end.

    Attributes:
        command: that makes it.
        steps: environment steps that it was given.
        cores: of the machine that made it.
        summary: its `summary.json`.
        evaluations: environment steps and mean return of each periodic evaluation; None if it was not finite.
    """

    command: str
    steps: int
    cores: int
    summary: dict[str, Any]
    evaluations: tuple[tuple[int, float | None], ...]


def read_runs(file: Path) -> dict[str, Run]:
    """Read runs by name; none where there is no file."""
    if not file.exists():
        return {}
    entries = json.loads(file.read_text())
    return {
        name: Run(**{**entry, "evaluations": tuple((step, value) for step, value in entry["evaluations"])})
        for name, entry in entries.items()
    }


def write_runs(file: Path, runs: Mapping[str, Run]) -> None:
    """Write runs by name, a line each."""
    lines = (f"{json.dumps(name)}: {json.dumps(asdict(runs[name]), allow_nan=False)}" for name in sorted(runs))
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def decide(exists: bool, summary: Mapping[str, Any] | None) -> str:
    """Return what is to be done for a run: `start`, `resume` or `skip`."""
    if summary is not None and summary["stopped_because"] in COMPLETE:
        return "skip"
    return "resume" if exists else "start"


def differences(row: VectorStep, seed: int, config: Mapping[str, Any]) -> list[str]:
    """Say in what a run's configuration is not what the row asks for."""
    wanted = {"algorithm": row.algorithm, "environment": row.environment, "actors": row.actors, "seed": seed}
    if row.steps is not None:
        wanted["steps"] = row.steps
    has = {**config, **config["hyperparameters"]}
    return [
        f"{key} is {has.get(key)}, not {value}"
        for key, value in {**wanted, **row.settings}.items()
        if has.get(key) != value
    ]


def make(row: VectorStep, seed: int, home: Path) -> Run:
    """Bring a run to its end, by whatever is still to be done, and collect it.

    Raises:
        TrainingFailed: it did not come to its end.
    """
    name = row.run(seed)
    folder = home / name
    step = decide((folder / CONFIG).exists(), _summary(folder))
    if step != "start":
        differs = differences(row, seed, yaml.safe_load((folder / CONFIG).read_text()))
        if differs:
            raise TrainingFailed(f"{name} is another experiment: {'; '.join(differs)}; --fresh starts it over")
    if step != "skip":
        named = ["--resume", name] if step == "resume" else [*row.arguments(seed), "--name", name]
        status, last_word = _squall_train([*named, "--json"], home, home / f"{name}.log")
        if status or decide(True, _summary(folder)) != "skip":
            raise TrainingFailed(f"{name} was to {step} and ended with status {status}: {last_word}")
    return collect(row, seed, home)


def collect(row: VectorStep, seed: int, home: Path) -> Run:
    """Read what there is to know of a run that came to its end."""
    name = row.run(seed)
    with SQLiteRunStore(home / "squall.db", create=False) as store:
        metrics = store.metrics(name)
    series = as_series((m.step, m.values[EVALUATION]) for m in metrics if EVALUATION in m.values)
    points = zip(series.steps.tolist(), series.values.tolist(), strict=True)
    summary = _summary(home / name)
    assert summary is not None
    return Run(
        command=row.command(seed),
        steps=yaml.safe_load((home / name / CONFIG).read_text())["steps"],
        cores=os.cpu_count() or 1,
        summary=summary,
        evaluations=tuple((int(step), value if math.isfinite(value) else None) for step, value in points),
    )


def forget(name: str, home: Path) -> None:
    """Remove a run that is not alive, so that its name is free.

    Raises:
        TrainingFailed: it is alive.
    """
    file = home / "squall.db"
    if file.exists():
        with SQLiteRunStore(file, create=False) as store:
            try:
                if store.get(name).live:
                    raise TrainingFailed(f"{name} is alive: squall stop {name}")
            except UnknownRun:
                pass
        connection = sqlite3.connect(file)
        with connection:
            connection.execute("DELETE FROM runs WHERE name = ?", (name,))
            for table in ("commands", "events", "metrics"):
                connection.execute(f"DELETE FROM {table} WHERE run = ?", (name,))
        connection.close()
    shutil.rmtree(home / name, ignore_errors=True)
    (home / f"{name}.log").unlink(missing_ok=True)


def _summary(folder: Path) -> dict[str, Any] | None:
    file = folder / SUMMARY
    summary: dict[str, Any] | None = json.loads(file.read_text()) if file.exists() else None
    return summary


def _squall_train(arguments: list[str], home: Path, log: Path) -> tuple[int, str]:
    """Run `squall train` to its end, its output appended to `log`; return exit status and last line."""
    home.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.cli.main", "train", *arguments],
            env={**os.environ, "SQUALL_HOME": str(home), "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            status = process.wait()
        except BaseException:
            # It writes a checkpoint before it ends, and the run is resumed the next time.
            process.terminate()
            process.wait()
            raise
    lines = log.read_text().strip().splitlines()
    return status, lines[-1] if lines else "no word"
