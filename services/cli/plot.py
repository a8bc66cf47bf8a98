"""`squall plot`: draw learning curves."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TextIO

from services.cli.arguments import Commands, count
from services.cli.output import print_result


def add_to(commands: Commands) -> None:
    """Add the command and its arguments."""
    parser = commands.add(
        "plot",
        _plot,
        "draw learning curves",
        "Draw learning curves over environment steps. Runs that differ only in their seed are drawn as one curve: the "
        "line is the mean over the seeds, and the band spans the range from the lowest to the highest seed.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="name of a run; 'LABEL=RUN' sets the curve's label")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("curves.png"),
        metavar="FILE",
        help=".png, .pdf, or .svg file; default: curves.png",
    )
    parser.add_argument(
        "--metric",
        default="eval/mean_reward",
        help="metric, such as rollout/ep_rew_mean; default: eval/mean_reward",
    )
    parser.add_argument(
        "--smooth",
        type=count,
        default=1,
        metavar="N",
        help="replace each point of a run by the mean of its last N points; default: 1, which changes nothing",
    )


def _plot(parsed: argparse.Namespace, out: TextIO) -> int:
    from services.cli.curves import plot_runs
    from services.store.locate import open_default_store

    with open_default_store(parsed.store) as store:
        curves = plot_runs(store, parsed.runs, parsed.output, metric=parsed.metric, smooth=parsed.smooth)
    for curve in curves:
        if curve.left_out:
            print(f"{curve.label}: {curve.left_out} points that are not finite are left out", file=sys.stderr)
    payload = {
        "output": str(parsed.output.absolute()),
        "metric": parsed.metric,
        "smooth": parsed.smooth,
        "curves": [{"label": c.label, "seeds": c.seeds, "points": len(c.steps)} for c in curves],
    }
    return print_result(out, parsed.json, payload, f"{parsed.output}: {', '.join(curve.label for curve in curves)}")
