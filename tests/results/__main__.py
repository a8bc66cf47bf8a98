"""`python -m tests.results`: train the runs of docs/results.md, judge their scores, and write the page.

Runs are kept under SQUALL_HOME (default `runs/results`). A complete run is not repeated, and an interrupted one is
resumed. Exit status: 0 all scores reached, 1 a score was missed or a run failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.results import report
from tests.results.rows import ROWS, Experiment
from tests.results.training import ROOT, Run, TrainingFailed, forget, make, read_runs, write_runs


def main(arguments: Sequence[str] | None = None, rows: Sequence[Experiment] = ROWS, root: Path = ROOT) -> int:
    """Run the command line for these rows, and write files below `root`; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.results", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("rows", nargs="*", metavar="ROW", help="rows to train; default: all rows, or all quick ones")
    parser.add_argument("--quick", action="store_true", help="train first seeds in a temporary folder; write no page")
    parser.add_argument("--fresh", action="store_true", help="train the rows' runs again from the start")
    parser.add_argument("--render", action="store_true", help="write page and plots from results.json; train nothing")
    parsed = parser.parse_args(arguments)
    unknown = set(parsed.rows) - {row.id for row in rows}
    if unknown:
        parser.error(f"no row is named {', '.join(sorted(unknown))}; there are {', '.join(row.id for row in rows)}")
    try:
        if parsed.render:
            render(rows, root)
            return 0
        chosen = [row for row in rows if row.id in parsed.rows or (not parsed.rows and (row.quick or not parsed.quick))]
        return quick(chosen, parsed.fresh) if parsed.quick else full(rows, chosen, root, parsed.fresh)
    except KeyboardInterrupt:
        return 130


def full(rows: Sequence[Experiment], chosen: Sequence[Experiment], root: Path, fresh: bool) -> int:
    """Train the runs of the chosen rows, save each in results.json when it ends, and render all rows."""
    runs_dir = Path(os.environ.get("SQUALL_HOME") or root / "runs" / "results").absolute()
    file = results_file(root)
    file.parent.mkdir(parents=True, exist_ok=True)
    kept, failed = read_runs(file), False
    for name, run in make_all(chosen, runs_dir, fresh):
        failed |= run is None
        if run is not None:
            # A run that is collected again may have been trained on another machine than this one.
            before = kept.get(name)
            kept[name] = replace(run, cores=before.cores) if before and before.summary == run.summary else run
            write_runs(file, kept)
    render(rows, root)
    return status(chosen, kept, failed)


def quick(chosen: Sequence[Experiment], fresh: bool) -> int:
    """Train the first seed of the chosen rows, and print a table."""
    chosen = [replace(row, seeds=row.seeds[:1]) for row in chosen]
    began = time.monotonic()
    with ExitStack() as stack:
        given = os.environ.get("SQUALL_HOME")
        runs_dir = Path(given or stack.enter_context(TemporaryDirectory(prefix="squall-results-"))).absolute()
        made = dict(make_all(chosen, runs_dir, fresh))
    runs = {name: run for name, run in made.items() if run is not None}
    print(f"\n{'row':<36}{'score':>10}{'wanted':>10}  verdict")
    for row in chosen:
        found = report.runs_of(row, runs)
        figure = next((report.figure(report.score(row, run)) for run in found.values()), "")
        wanted = "" if row.threshold is None else f"{row.threshold:g}"
        print(f"{row.id:<36}{figure:>10}{wanted:>10}  {report.verdict(row, found)}")
    print(f"{time.monotonic() - began:.0f} s in all")
    return status(chosen, runs, len(runs) < len(made))


def make_all(rows: Sequence[Experiment], runs_dir: Path, fresh: bool) -> Iterator[tuple[str, Run | None]]:
    """Train the runs of rows, and print the outcome of each; yield name and run, None for a run that failed."""
    for row, seed in ((chosen, seed) for chosen in rows for seed in chosen.seeds):
        name = row.run(seed)
        run = None
        try:
            if fresh:
                forget(name, runs_dir)
            run = make(row, seed, runs_dir)
            words = f"score {report.figure(report.score(row, run))}, {run.summary['wall_seconds']:,.0f} s"
            print(f"{name}: {words}{'' if report.reaches(row, run) else ', below the wanted score'}", flush=True)
        except TrainingFailed as error:
            print(f"{name}: failed: {error}", flush=True)
        yield name, run


def status(rows: Sequence[Experiment], runs: Mapping[str, Run], failed: bool) -> int:
    """Return the exit status: 1 if a run failed or a score was missed."""
    return int(failed or any(report.verdict(row, report.runs_of(row, runs)) == report.MISSED for row in rows))


def render(rows: Sequence[Experiment], root: Path) -> None:
    """Write docs/results.md and its plots from results.json alone."""
    runs = read_runs(results_file(root))
    plots = report.draw_plots(rows, runs, root / report.IMAGES)
    page_file(root).write_text(report.markdown(rows, runs, plots))


def page_file(root: Path) -> Path:
    """Return the path of the page."""
    return root / "docs" / "results.md"


def results_file(root: Path) -> Path:
    """Return the path of the file with the figures of all runs."""
    return root / "tests" / "results" / "results.json"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
