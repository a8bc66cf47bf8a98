"""What every side of a comparison shares: its command line, the timed window, and the one line of JSON it ends with.

Runs in the peers' environments too, so it imports nothing but the standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def arguments(*own: str) -> argparse.Namespace:
    """Parse `--threads`, `--warm-up`, `--seconds` and a side's own `--name VALUE`s; sets the thread count at once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warm-up", type=float, default=5.0, help="seconds, after the side is at work")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the window")
    for name in own:
        parser.add_argument(f"--{name}")
    parsed = parser.parse_args()
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(parsed.threads)
    return parsed


def rate(step: Callable[[], int], warm_up: float, seconds: float) -> float:
    """Call `step`, which returns how much it did, through the warm-up and the window; return what it did a second."""
    end = time.perf_counter() + warm_up
    while time.perf_counter() < end:
        step()
    begun, done = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        done += step()
    return done / (time.perf_counter() - begun)


def times(step: Callable[[], object], warm_up: float, seconds: float) -> list[float]:
    """Call `step` through the warm-up and the window; return the seconds that each call of the window took, sorted."""
    end = time.perf_counter() + warm_up
    while time.perf_counter() < end:
        step()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end:
        step()
        taken.append(time.perf_counter() - begun)
    return sorted(taken)


def quantile(ordered: list[float], share: float) -> float:
    """Return the value below which `share` of the sorted values lie."""
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def resident() -> int:
    """Return this process's resident memory in bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def report(figure: float, **facts: Any) -> None:
    """Print the figure, and the facts by which the harness sees that all sides did the same work."""
    sys.stdout.flush()
    print(json.dumps({"figure": figure, "facts": facts}), flush=True)
