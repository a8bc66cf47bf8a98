"""`python -m tests.benchmarks`: measure Squall beside its peers and the machine's limit, and write docs/performance.md.

The machine must run nothing else meanwhile. Exit status: 0 measured, 1 a side failed, 2 bad input, 130 interrupted. A
target that is not reached shows in docs/performance.md, not in the exit status.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence

from tests.benchmarks import report
from tests.benchmarks.cases import CASES, ROWS, Case, Side
from tests.benchmarks.measuring import Protocol, compare
from tests.benchmarks.peers import ROOT

_QUICK = Protocol(pairs=2, warm_up=2.0, seconds=4.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", metavar="ROW,ROW", help=f"rows to measure, of {', '.join(ROWS)}")
    parser.add_argument(
        "--quick", action="store_true", help="measure two short pairs of the quick cases; write no file"
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=Protocol.pairs,
        metavar="N",
        help="number of pairs, at least 5; default: %(default)s",
    )
    parser.add_argument(
        "--seconds", type=float, default=Protocol.seconds, metavar="S", help="seconds of a window, 10 to 30"
    )
    parser.add_argument(
        "--render", action="store_true", help="write docs/performance.md and plot from results.json; measure nothing"
    )
    parsed = parser.parse_args(arguments)
    only = [name for name in (parsed.only or "").split(",") if name]
    unknown = set(only) - set(ROWS)
    if unknown:
        parser.error(f"no row is named {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    if parsed.pairs < 5 or not 10 <= parsed.seconds <= 30:
        parser.error(f"at least 5 pairs and windows of 10 to 30 s, got {parsed.pairs} and {parsed.seconds:g}")
    if parsed.render:
        report.render(ROOT)
        return 0
    protocol = _QUICK if parsed.quick else Protocol(parsed.pairs, seconds=parsed.seconds)
    chosen = [case for case in CASES if (not only or case.row in only) and (case.quick or not parsed.quick)]
    failed = False
    try:
        for cases in together(chosen):
            for case in cases:
                print(f"{case.id}: {case.title}", file=sys.stderr, flush=True)
            for case, comparisons in zip(cases, compare(cases, protocol), strict=True):
                failed |= any(comparison.failed for comparison in comparisons)
                for comparison in comparisons:
                    print(f"{case.id:<30}{report.line(case, comparison)}", flush=True)
                if not parsed.quick:
                    report.keep(ROOT, case, comparisons)
    except KeyboardInterrupt:
        return 130
    if not parsed.quick:
        report.render(ROOT)
    return int(failed)


def together(cases: Iterable[Case]) -> list[list[Case]]:
    """Return the cases in groups with the same sides."""
    groups: dict[tuple[Side, ...], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.ours, *case.others), []).append(case)
    return list(groups.values())


if __name__ == "__main__":
    sys.exit(main())
