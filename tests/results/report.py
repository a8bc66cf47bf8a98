"""Scores, verdicts, docs/results.md, and its plots: all computed from the experiments and their runs alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from replay.errors import ConfigurationError
from services.cli.curves import Curve, aggregate, as_series, draw
from tests.results.rows import BEST, LAST_THREE, PLOTS, Experiment, Published
from tests.results.training import Run

REACHED, MISSED, SHOWN, NOT_YET = "reached", "not reached", "shown as it is", "not yet run"

IMAGES = Path("docs/images/results")
"""Folder of the plots, relative to the repository's root."""

_INTRODUCTION = """\
# Results

This page shows scores and learning curves of every algorithm, each with the command that trained it.

<!-- test: check hours -->
```sh
make results                      # train the missing runs, resume the interrupted ones; takes many hours
make results ARGS="dqn-cartpole"  # one row; --fresh trains it again, --render only rewrites this page and its plots
make results-quick                # one seed of the quick rows, in some minutes; exit status 1 if a score is missed
```

`make results` writes this page and its plots from `tests/results/results.json`; nothing here is typed by hand. The
rows are declared in `tests/results/rows.py`, and their runs are kept in `runs/results`.

## How to read the tables

Several figures in one cell are in the order of the seeds. `?` is a seed that has not been run.

| column | meaning |
| --- | --- |
| steps | Environment steps of the longest run. With `--steps N` a run takes N steps, and the rest of the push that \
completed them. |
| allowed | The most environment steps that a run of the row may be given. |
| score | Mean return of the **best checkpoint** on fresh greedy episodes (`eval_return_mean`). Where the column \
*wanted* names the last three evaluations, it is the lowest of these. Returns are complete and not clipped. |
| last | Mean return of the **last weights** on fresh greedy episodes (`final_return_mean`). |
| wanted | The score that every seed must reach. |
| seconds | Wall time{cores}, shared by all processes of the run. |
| verdict | `reached`: the score of *every* seed is at least the wanted one, within the allowed steps. \
`shown as it is`: the row has no wanted score. |

Scores are those of the best checkpoint of each run, which periodic evaluations selected. The last weights can be much
worse, because the return of a DQN rises and falls until the end of training. Compare the columns *score* and *last*.

In the plots the line is the mean of the seeds' periodic evaluations. The band goes from the lowest seed to the highest.
"""

_HEADINGS = ("row", "seeds", "steps", "allowed", "score", "lowest", "mean", "last", "wanted", "seconds", "verdict")


def runs_of(row: Experiment, runs: Mapping[str, Run]) -> dict[int, Run]:
    """Return a row's runs by seed, without runs of another command."""
    found = {seed: runs.get(row.run(seed)) for seed in row.seeds}
    return {seed: run for seed, run in found.items() if run is not None and run.command == row.command(seed)}


def score(row: Experiment, run: Run) -> float | None:
    """Return the score that is compared with the row's threshold; None if the run has none."""
    if row.metric == LAST_THREE:
        last = [value for _, value in run.evaluations[-3:] if value is not None]
        return min(last) if len(last) == 3 else None
    best: float | None = run.summary["eval_return_mean"]
    return best


def reaches(row: Experiment, run: Run) -> bool:
    """Return whether a run's score is at least the threshold, within the steps allowed; True without a threshold."""
    reached = score(row, run)
    return row.threshold is None or (reached is not None and reached >= row.threshold and run.steps <= row.within)


def verdict(row: Experiment, runs: Mapping[int, Run]) -> str:
    """Return a row's verdict from its runs by seed; `NOT_YET` names the missing seeds if only some are missing."""
    if not all(reaches(row, run) for run in runs.values()):
        return MISSED
    missing = [seed for seed in row.seeds if seed not in runs]
    if missing:
        return f"{NOT_YET}: seed{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}" if runs else NOT_YET
    return SHOWN if row.threshold is None else REACHED


def markdown(rows: Sequence[Experiment], runs: Mapping[str, Run], plots: Sequence[str]) -> str:
    """Return docs/results.md: one section for each environment, with a table, plots, and commands.

    Args:
        rows: experiments, in the order of the page.
        runs: runs by name; runs of no experiment are ignored.
        plots: names of the plots that exist.
    """
    ours = [run for row in rows for run in runs_of(row, runs).values()]
    cores = " or ".join(str(count) for count in sorted({run.cores for run in ours}))
    parts = [_INTRODUCTION.format(cores=f" on a machine with {cores} cores" if cores else "")]
    for environment in dict.fromkeys(row.environment for row in rows):
        here = [row for row in rows if row.environment == environment]
        table = [_HEADINGS, ("---",) * len(_HEADINGS), *(_cells(row, runs_of(row, runs)) for row in here)]
        parts += [f"## {environment}\n", "\n".join(f"| {' | '.join(cells)} |" for cells in table) + "\n"]
        parts += [f"{row.id}: {row.note}\n" for row in here if row.note]
        for other in (other for row in here for other in row.published):
            step, reached = other.points[-1]
            parts.append(f"Published by others, {other.label}: {figure(reached)} at {step:,} steps ({other.source}).\n")
        names = dict.fromkeys(name for row in here for name in row.plots if name in plots)
        parts += [f"![{PLOTS[name]}](images/{IMAGES.name}/{name}.png)\n" for name in names]
        commands = [f"{row.command(row.seeds[0])}  # {row.id}" for row in here]
        block = "\n".join(["<!-- test: check hours -->", "```sh", *commands, "```"])
        parts.append(f"The commands, for the first seed of each row:\n\n{block}\n")
    return "\n".join(parts)


def _cells(row: Experiment, runs: Mapping[int, Run]) -> tuple[str, ...]:
    def each(what: Callable[[Run], str]) -> str:
        return ", ".join(what(runs[seed]) if seed in runs else "?" for seed in row.seeds) if runs else ""

    known = [value for value in (score(row, run) for run in runs.values()) if value is not None]
    wanted = "" if row.threshold is None else f"{row.threshold:g}"
    return (
        row.id,
        ", ".join(map(str, row.seeds)),
        f"{max(run.summary['env_steps'] for run in runs.values()):,}" if runs else "",
        f"{row.within:,}",
        each(lambda run: figure(score(row, run))),
        figure(min(known)) if known else "",
        figure(sum(known) / len(known)) if known else "",
        each(lambda run: figure(run.summary["final_return_mean"])),
        wanted if row.metric == BEST else f"{wanted} in the {LAST_THREE}",
        each(lambda run: f"{run.summary['wall_seconds']:,.0f}"),
        verdict(row, runs),
    )


def figure(value: float | None) -> str:
    """Return a score as text."""
    return "none" if value is None else f"{value:,.1f}"


def draw_plots(rows: Sequence[Experiment], runs: Mapping[str, Run], folder: Path) -> list[str]:
    """Draw every plot that has at least one curve into `folder`; return the names of the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, title in PLOTS.items():
        here = [row for row in rows if name in row.plots]
        one_algorithm = len(here) > 1 and len({row.algorithm for row in here}) == 1
        curves = []
        for row in sorted(here, key=lambda row: row.actors):
            actors = f"{row.actors} actor{'s' if row.actors > 1 else ''}"
            curve = _curve(actors if one_algorithm else row.algorithm, runs_of(row, runs))
            curves += [] if curve is None else [curve, *map(_published, row.published)]
        thresholds = {row.threshold for row in here} - {None}
        wanted = thresholds.pop() if len(thresholds) == 1 else None
        if curves:
            draw(
                curves, folder / f"{name}.png", title=title, ylabel="mean return of a greedy evaluation", wanted=wanted
            )
            drawn.append(name)
    return drawn


def _curve(label: str, runs: Mapping[int, Run]) -> Curve | None:
    """Return the curve of a row's evaluations; None where there are too few for one."""
    points = {seed: [(s, math.nan if v is None else v) for s, v in run.evaluations] for seed, run in runs.items()}
    try:
        return aggregate(label, {seed: as_series(pairs) for seed, pairs in points.items()}) if points else None
    except ConfigurationError:
        return None


def _published(other: Published) -> Curve:
    steps, mean = (np.array(column, np.float64) for column in zip(*other.points, strict=True))
    return Curve(other.label, (), steps, mean, mean, mean)
