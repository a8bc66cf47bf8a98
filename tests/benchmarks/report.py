"""The benchmarks in docs/performance.md, and their plot: computed from results.json and notes.md alone.

The program writes the part of the page between two marker comments; the rest of the page is written by hand.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.benchmarks.cases import CASES, LIMIT, ROWS, Case
from tests.benchmarks.measuring import Comparison, reached
from tests.benchmarks.peers import PEERS

_VERSIONS = ("torch", "ray", "pytorch-lightning", "numpy", "gymnasium", "ale-py")
BEGIN = "<!-- benchmarks: begin; `make bench` writes this part of the page, from tests/benchmarks -->"
END = "<!-- benchmarks: end -->"
_REACHED = {None: "", True: "reached", False: "not reached"}


def file_of(root: Path) -> Path:
    """Return the path of the file with the figures."""
    return root / "tests" / "benchmarks" / "results.json"


def page_file(root: Path) -> Path:
    """Return the path of the page."""
    return root / "docs" / "performance.md"


def plot_file(root: Path) -> Path:
    """Return the path of the plot."""
    return root / "docs" / "images" / "ratios.png"


def machine() -> dict[str, Any]:
    """Return the description of the machine that runs this process."""
    cpu = platform.processor()
    for row in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if row.startswith("model name"):
            cpu = row.partition(":")[2].strip()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _VERSIONS},
        "date": time.strftime("%Y-%m-%d"),
    }


def keep(root: Path, case: Case, comparisons: Sequence[Comparison]) -> None:
    """Write a case's figures into results.json, in place of its earlier ones."""
    file = file_of(root)
    kept = json.loads(file.read_text()) if file.exists() else {}
    kept[case.id] = {"machine": machine(), "comparisons": [comparison.plain() for comparison in comparisons]}
    file.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def read(root: Path) -> dict[str, tuple[dict[str, Any], list[Comparison]]]:
    """Return machine and comparisons of every measured case."""
    file = file_of(root)
    kept = json.loads(file.read_text()) if file.exists() else {}
    return {
        name: (entry["machine"], [Comparison(**{k: _frozen(v) for k, v in c.items()}) for c in entry["comparisons"]])
        for name, entry in kept.items()
    }


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def line(case: Case, comparison: Comparison) -> str:
    """Return one comparison as text, for a terminal."""
    if comparison.failed:
        return f"{comparison.other}: failed: {comparison.failed}"
    wanted = case.targets.get(comparison.other)
    ours, theirs = statistics.median(comparison.ours), statistics.median(comparison.theirs)
    return (
        f"{comparison.ratio:6.2f} x {comparison.other} ({min(comparison.ratios):.2f}-{max(comparison.ratios):.2f})"
        f"{'' if wanted is None else f', wanted {wanted:.2f}'}; {ours:,.4g} and {theirs:,.4g} {case.unit}"
    )


def render(root: Path) -> None:
    """Write the plot, and the program's part of docs/performance.md."""
    measured, page = read(root), page_file(root)
    draw(measured, plot_file(root))
    page.write_text(replace_part(page.read_text(), markdown(measured, notes(root))))


def replace_part(page: str, part: str) -> str:
    """Return a page with `part` between the two marker comments.

    Raises:
        ValueError: the page does not hold each marker once, in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ValueError(f"the page must hold {BEGIN!r} and then {END!r}, each once")
    return f"{before}{BEGIN}\n\n{part}\n{END}{after}"


def notes(root: Path) -> dict[str, str]:
    """Return the explanation of each row, from notes.md.

    Raises:
        ValueError: a heading in notes.md names no row.
    """
    texts = {}
    for part in (root / "tests" / "benchmarks" / "notes.md").read_text().split("\n## ")[1:]:
        row, _, text = part.partition("\n")
        if row not in ROWS:
            raise ValueError(f"notes.md has a heading {row!r}, which is no row; the rows are {', '.join(ROWS)}")
        texts[row] = text.strip()
    return texts


def markdown(
    measured: dict[str, tuple[dict[str, Any], list[Comparison]]], texts: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Return the program's part of the page: a plot, and one section for each row.

    Args:
        measured: machine and comparisons by case.
        texts: explanations by row.
    """
    parts = ["![How many times better Squall is, and the wanted ratio](images/ratios.png)\n"]
    for row in ROWS:
        cases = [case for case in CASES if case.row == row]
        parts.append(f"### {row}\n")
        parts.append("| case | side | ours | theirs | ratio | range | wanted | threads | verdict |")
        parts.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for case in cases:
            parts += _rows(case, measured[case.id][1] if case.id in measured else [])
        parts.append("")
        parts += [f"- `{case.name or case.row}`: {case.title}; {case.unit}." for case in cases]
        if row == "scale":
            parts += _forecast([c for case in cases if case.id in measured for c in measured[case.id][1]])
        if row in texts:
            parts.append(f"\n{texts[row]}")
        parts.append(f"\n<!-- test: check hours -->\n```sh\nmake bench ONLY={row}\n```\n")
    parts.append("### Machine and peers\n")
    parts += sorted({_where(machine) for machine, _ in measured.values()}) or ["Nothing has been measured yet."]
    parts.append("\nPeers: " + "; ".join(f"{name}: {', '.join(wants)}" for name, wants in PEERS.items()) + ".\n")
    return "\n".join(parts)


def _rows(case: Case, comparisons: Sequence[Comparison]) -> Iterable[str]:
    found = {comparison.other: comparison for comparison in comparisons}
    for side in case.others:
        comparison, wanted = found.get(side.name), case.targets.get(side.name)
        head = f"| {case.name or case.row} | {side.name} |"
        tail = f" {'' if wanted is None else f'{wanted:.2f}'} |"
        if comparison is None:
            yield f"{head} | | | |{tail} | not yet measured |"
        elif comparison.failed:
            yield f"{head} | | | |{tail} | {comparison.failed.replace('|', '/')} |"
        else:
            verdict = _REACHED[reached(wanted, comparisons, side.name)]
            ours, theirs = statistics.median(comparison.ours), statistics.median(comparison.theirs)
            spread = f"{min(comparison.ratios):.2f}-{max(comparison.ratios):.2f}"
            threads = "{} and {}".format(*comparison.threads)
            figures = f"{ours:,.4g} | {theirs:,.4g} | {comparison.ratio:.2f} | {spread}"
            yield f"{head} {figures} |{tail} {threads} | {verdict} |"
    if case.most is not None and comparisons and not comparisons[0].failed:
        ours = statistics.median(comparisons[0].ours)
        verdict = _REACHED[ours <= case.most]
        yield f"| {case.name or case.row} | at most | {ours:,.4g} | | | | {case.most:g} {case.unit} | | {verdict} |"


def _forecast(comparisons: Sequence[Comparison]) -> list[str]:
    """Return the forecast for a cluster with 1,000 workers from the row `scale`, with its arithmetic."""
    facts = [c.facts[which] for c in comparisons if not c.failed for which in (1, 0)]
    if not facts:
        return []
    costs = {
        fact["shards"]: (fact["cpu_seconds_per_million_inserted"], fact["cpu_seconds_per_million_drawn"])
        for fact in facts
    }
    rate, drawn = facts[0]["rate"], 50_000.0
    wanted = 1_000 * rate
    parts = ["\nCPU seconds of all processes of the replay for a million Atari transitions:\n"]
    parts += ["| shards | inserted | drawn, priorities set | most inserted, items/s |", "| --- | --- | --- | --- |"]
    most = {fact["shards"]: max(f["most"] for f in facts if f["shards"] == fact["shards"]) for fact in facts}
    parts += [f"| {n} | {a:.1f} | {b:.1f} | {most[n]:,.0f} |" for n, (a, b) in sorted(costs.items())]
    inserting, drawing = costs[max(costs)]
    cores = (wanted * inserting + drawn * drawing) / 1e6
    parts.append(
        f"\nForecast (arithmetic, not a measurement): 1,000 workers with {rate:,.0f} transitions a second each send "
        f"{wanted:,.0f} a second, which is {wanted * 7_056 / 1e9:.1f} GB/s of frames. Inserting them takes "
        f"{wanted:,.0f} x {inserting:.1f} / 1,000,000 = {wanted * inserting / 1e6:.1f} cores. A learner that draws "
        f"{drawn:,.0f} a second takes {drawn:,.0f} x {drawing:.1f} / 1,000,000 = {drawn * drawing / 1e6:.1f} more. "
        f"With a third of each shard's core left free, that is {-(-cores * 1.5 // 1):.0f} shards. The network must "
        f"carry the frames to the shards' node; otherwise choose `updates_per_step` and `--actors` to send less."
    )
    return parts


def _where(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return f"- {machine['date']}: {machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, {versions}."


def draw(measured: dict[str, tuple[dict[str, Any], list[Comparison]]], file: Path) -> None:
    """Draw every ratio with its range and the wanted ratio; one panel for the peers, one for the limit."""
    from matplotlib.figure import Figure

    bars = [
        (case, comparison)
        for case in CASES
        for comparison in (measured[case.id][1] if case.id in measured else [])
        if not comparison.failed
    ]
    figure = Figure(figsize=(10, 1.2 + 0.26 * max(len(bars), 4)), layout="constrained")
    for axes, limit in zip(figure.subplots(1, 2), (False, True), strict=True):
        shown = [(case, c) for case, c in bars if (c.other == LIMIT) == limit]
        for y, (case, comparison) in enumerate(reversed(shown)):
            low, high = min(comparison.ratios), max(comparison.ratios)
            axes.barh(y, comparison.ratio, color="#4878a8", height=0.6)
            axes.plot([low, high], [y, y], color="black", linewidth=1)
            if (wanted := case.targets.get(comparison.other)) is not None:
                axes.plot([wanted, wanted], [y - 0.4, y + 0.4], color="#c04030", linewidth=2)
        axes.set_yticks(
            range(len(shown)), [c.id if limit else f"{c.id}: {o.other}" for c, o in reversed(shown)], fontsize=7
        )
        axes.set_title("beside the limit" if limit else "beside peers (log)")
        axes.set_xlabel("times better; red: wanted")
        if not limit:
            axes.set_xscale("log")
        axes.axvline(1.0, color="grey", linewidth=0.8)
    figure.savefig(file, dpi=120)
