"""Learning curves over environment steps: the seeds of an experiment are drawn as a line (their mean) and a band.

`plot_runs` reads runs from a store, `aggregate` computes one curve from several seeds, and `draw` writes curves to a
file. The last two need no store. matplotlib is imported only by `draw`, because its import takes 0.5 s.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from replay.errors import ConfigurationError
from services.store.base import RunStore
from services.store.records import RunRecord

SUFFIXES = (".png", ".pdf", ".svg")
EVALUATION = "eval/mean_reward"

# The palette of Okabe and Ito, which color-blind readers can distinguish, without its yellow, which is too pale.
_LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINE_STYLES = ("-", "--", ":", "-.")
_GRAY = "0.35"


class Series(NamedTuple):
    """One metric of one run.

    Attributes:
        steps: `[N]` environment steps, strictly increasing.
        values: `[N]` values of the metric.
    """

    steps: NDArray[np.float64]
    values: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Curve:
    """A line and its band.

    Attributes:
        label: label in the legend.
        seeds: seeds that the line is the mean of; empty for published results of others.
        steps: `[N]` environment steps.
        mean: `[N]` mean over the seeds.
        low: `[N]` minimum over the seeds.
        high: `[N]` maximum over the seeds.
        left_out: number of points, over all seeds, that are left out because they are not finite.
    """

    label: str
    seeds: tuple[int, ...]
    steps: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    left_out: int = 0


def as_series(points: Iterable[tuple[int, float]]) -> Series:
    """Return a series from points `(step, value)` in the order in which they were written.

    A resumed run repeats the steps since its last checkpoint, so later points replace earlier ones of the same steps.
    """
    kept: list[tuple[int, float]] = []
    for point in points:
        while kept and kept[-1][0] >= point[0]:
            kept.pop()
        kept.append(point)
    table = np.array(kept, np.float64).reshape(-1, 2)
    return Series(table[:, 0], table[:, 1])


def smoothed(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Return the moving average, `[N]`: the mean of each value and the up to `window - 1` values before it."""
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means: NDArray[np.float64] = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def aggregate(label: str, seeds: Mapping[int, Series], smooth: int = 1) -> Curve:
    """Return one curve from the series of several seeds.

    Seeds may be evaluated at different steps. A seed is interpolated linearly between its points, and the curve covers
    only the steps between the first and the last point of every seed.

    Args:
        label: label in the legend.
        seeds: series by seed.
        smooth: number of points in the moving average of each seed; 1 for no smoothing.

    Raises:
        ConfigurationError: a seed has no finite point, or no step is covered by all seeds.
    """
    finite = {seed: _finite(series) for seed, series in seeds.items()}
    empty = [seed for seed, series in finite.items() if not len(series.steps)]
    if empty:
        raise ConfigurationError(f"{label}: seed {empty[0]} has no finite value")
    first = max(series.steps[0] for series in finite.values())
    last = min(series.steps[-1] for series in finite.values())
    if first > last:
        ranges = (f"seed {seed} {s.steps[0]:,.0f} to {s.steps[-1]:,.0f}" for seed, s in finite.items())
        raise ConfigurationError(f"{label}: no step is covered by all seeds: {', '.join(ranges)}")
    steps = np.unique(np.concatenate([series.steps for series in finite.values()]))
    steps = steps[(first <= steps) & (steps <= last)]
    values = np.stack([np.interp(steps, s.steps, smoothed(s.values, smooth)) for s in finite.values()])  # [seeds, N]
    left_out = sum(len(seeds[seed].steps) - len(series.steps) for seed, series in finite.items())
    return Curve(label, tuple(seeds), steps, values.mean(0), values.min(0), values.max(0), left_out)


def _finite(series: Series) -> Series:
    kept = np.isfinite(series.values)
    return Series(series.steps[kept], series.values[kept])


def check_output(path: Path) -> None:
    """Raise `ConfigurationError` unless an image can be written to `path`."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigurationError(f"an image file's name must end in {', '.join(SUFFIXES)}, got {path}")
    if not path.parent.is_dir():
        raise ConfigurationError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise ConfigurationError(f"cannot write {path}: it is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigurationError(f"cannot write {path}: permission denied")


def draw(
    curves: Sequence[Curve],
    path: Path,
    *,
    title: str,
    ylabel: str,
    smooth: int = 1,
    wanted: float | None = None,
) -> None:
    """Draw curves to a file; an existing file is replaced.

    Args:
        curves: the curves, in the order of the legend.
        path: path of the file; the suffix, one of `SUFFIXES`, selects the format.
        title: title of the figure, such as the environment's id.
        ylabel: name of the values.
        smooth: number of points in the moving average, as given to `aggregate`; shown in the caption.
        wanted: value of a horizontal line; None for no line.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    check_output(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for index, curve in enumerate(curves):
        color = _LINE_COLORS[index % len(_LINE_COLORS)]
        style = _LINE_STYLES[index // len(_LINE_COLORS) % len(_LINE_STYLES)]
        # Matplotlib renders text between dollar signs as formulas, and omits labels that begin with _ from a legend.
        name = curve.label.replace("$", r"\$")
        seeds = f" ({len(curve.seeds)} seed{'s' if len(curve.seeds) > 1 else ''})" if curve.seeds else ""
        style = style if curve.seeds else ":"
        label = f"{' ' if name.startswith('_') else ''}{name}{seeds}"
        marker = "o" if len(curve.steps) == 1 else None
        axes.plot(curve.steps, curve.mean, style, color=color, linewidth=1.6, marker=marker, label=label)
        if len(curve.seeds) > 1:
            axes.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)
    if wanted is not None:
        axes.axhline(wanted, color=_GRAY, linewidth=1, linestyle=(0, (6, 3)), label=f"wanted: {wanted:,g}", zorder=1)
    _style_axes(axes)
    axes.set_title(title, loc="left", fontsize="medium", fontweight="bold")
    axes.set_xlabel("environment steps")
    axes.set_ylabel(ylabel)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    note = describe_band(curves, smooth)
    if note:
        figure.supxlabel(note, x=0.01, ha="left", fontsize="x-small", color=_GRAY)
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror or error}") from error


def _style_axes(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    thousands = FuncFormatter(lambda value, _: f"{value:,.10g}".replace("-", "\N{MINUS SIGN}"))
    axes.xaxis.set_major_formatter(thousands)
    axes.yaxis.set_major_formatter(thousands)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GRAY)
    axes.tick_params(color=_GRAY, labelsize="small")
    axes.set_xlim(left=0)


def describe_band(curves: Sequence[Curve], smooth: int) -> str:
    """Return a caption that explains line, band, and smoothing; empty if there is nothing to explain."""
    parts = []
    if any(len(curve.seeds) > 1 for curve in curves):
        parts.append("line: mean of the seeds; band: lowest to highest seed")
    if smooth > 1:
        parts.append(f"each point is the mean of the last {smooth} of its seed")
    return "; ".join(parts)


def read_series(store: RunStore, run: str, metric: str) -> Series:
    """Return one metric of a run.

    Raises:
        UnknownRun: there is no such run.
        ConfigurationError: the run has no such metric; the text lists its metrics.
    """
    rows = store.metrics(run)
    series = as_series((row.step, row.values[metric]) for row in rows if metric in row.values)
    if not len(series.steps):
        names = sorted({name for row in rows for name in row.values})
        has = f"it has {', '.join(names)}" if names else "it has no metrics yet"
        raise ConfigurationError(f"run {run!r} has no metric {metric!r}; {has}")
    return series


def plot_runs(
    store: RunStore, runs: Sequence[str], output: Path, *, metric: str = EVALUATION, smooth: int = 1
) -> list[Curve]:
    """Draw runs to a file, and return their curves.

    Runs that differ only in the seed make one curve. Labels consist of the algorithm and the settings in which its runs
    differ: environment, actors, and hyper-parameters.

    Args:
        store: the run store.
        runs: names of the runs, or `label=name`; runs with the same label make one curve.
        output: path of the file.
        metric: name of the metric, such as `rollout/ep_rew_mean`.
        smooth: number of points in the moving average of each run; 1 for no smoothing.

    Raises:
        UnknownRun: there is no such run.
        ConfigurationError: the runs cannot be drawn in this way, or the file cannot be written; nothing was drawn.
    """
    check_output(output)
    if smooth < 1:
        raise ConfigurationError(f"smooth must be at least 1 point, got {smooth}")
    labels, names = zip(*((label, name) for label, _, name in (run.rpartition("=") for run in runs)), strict=True)
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise ConfigurationError(f"run {repeated[0]!r} is named twice")
    records = [store.get(name) for name in names]
    groups: dict[str, dict[int, RunRecord]] = {}
    for label, record in zip(labels, records, strict=True):
        others = [other for other, text in zip(records, labels, strict=True) if not text]
        label = label or _label(record, others)
        same = groups.setdefault(label, {}).setdefault(record.seed, record)
        if same is not record:
            raise ConfigurationError(
                f"runs {same.name!r} and {record.name!r} are both {label} with seed {record.seed}; "
                f"to draw a curve for each, label them: 'some label={record.name}'"
            )
    series = {record.name: read_series(store, record.name, metric) for record in records}
    curves = [
        aggregate(label, {seed: series[record.name] for seed, record in group.items()}, smooth)
        for label, group in groups.items()
    ]
    title = ", ".join(dict.fromkeys(record.environment for record in records))
    draw(curves, output, title=title, ylabel=metric, smooth=smooth)
    return curves


def _label(record: RunRecord, among: Sequence[RunRecord]) -> str:
    """Return a label: the run's algorithm, and the settings in which it differs from the runs in `among`."""
    parts = [record.algorithm]
    if any(other.environment != record.environment for other in among):
        parts.append(record.environment)
    alike = [_settings(r) for r in among if (r.algorithm, r.environment) == (record.algorithm, record.environment)]
    for key, value in _settings(record).items():
        if any(other.get(key) != value for other in alike):
            parts.append(f"{key}={value}")
    return ", ".join(parts)


def _settings(record: RunRecord) -> dict[str, Any]:
    return {"actors": record.config.get("actors"), **record.config.get("hyperparameters", {})}
