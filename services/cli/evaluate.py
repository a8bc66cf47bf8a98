"""`squall evaluate`: play greedy episodes with a checkpoint, and record them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TextIO

from services.cli.arguments import Commands
from services.cli.output import print_result


def add_to(commands: Commands) -> None:
    """Add the command and its arguments."""
    parser = commands.add(
        "evaluate", _evaluate, "play greedy episodes", "Play greedy episodes with a checkpoint, and print the returns."
    )
    parser.add_argument("run", help="name of a run, or path of a .ckpt file")
    parser.add_argument("--episodes", type=int, default=20, metavar="N", help="number of episodes; default: 20")
    parser.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="checkpoint of the run; default: best"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the episodes; default: 0")
    parser.add_argument(
        "--video",
        type=Path,
        metavar="FILE.mp4",
        help="record the episodes to one H.264 file, one after the other; an existing file is replaced. A file holds "
        "at most 20,000 frames, divided evenly among the environments that play at the same time (8, or fewer if there "
        "are fewer episodes). Later frames are played and scored but not recorded, and a message reports their number",
    )


def _evaluate(parsed: argparse.Namespace, out: TextIO) -> int:
    from replay.imports import no_collections

    with no_collections():
        from services import runs
    from services.cli.display import render_summary

    result = runs.evaluate(
        parsed.run,
        episodes=parsed.episodes,
        which=parsed.checkpoint,
        seed=parsed.seed,
        video=parsed.video,
        store_url=parsed.store,
    )
    if left_out := result.get("frames_left_out"):
        print(
            f"squall: the video is full: it has {result['frames']:,} frames, and {left_out:,} more were played; "
            f"use fewer --episodes to record all of them",
            file=sys.stderr,
        )
    return print_result(out, parsed.json, result, render_summary(result))
