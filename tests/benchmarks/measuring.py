"""Measuring in rounds. Each side is a process of its own; the sides run in turn, every second round in reverse (ABBA).

The result is the median of the ratios within a round.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.cases import FIGURE, Case, Side
from tests.benchmarks.peers import ROOT, PeerMissing, interpreter

SIDES = Path(__file__).parent / "sides"
MOST_SECONDS = 600.0


class SideFailed(Exception):
    """A side that printed no figure; the text ends with the last line of its output."""


class OtherWork(Exception):
    """Two sides that did not do the same work, so that their ratio would be meaningless."""


@dataclass(frozen=True)
class Protocol:
    """Number and length of the measurements.

    Attributes:
        pairs: pairs of Squall and each other side, one for each round.
        warm_up: seconds before the window, once a side is at work.
        seconds: length of the window.
    """

    pairs: int = 5
    warm_up: float = 8.0
    seconds: float = 15.0


@dataclass(frozen=True)
class Comparison:
    """Squall beside one other side.

    Attributes:
        other: name of the other side.
        ours: figures of Squall, in the order of the pairs.
        theirs: figures of the other side.
        ratios: how many times better Squall is, pair by pair.
        threads: threads of Squall and of the other side, the best of those tried.
        facts: last reported facts of Squall and of the other side.
        failed: reason why there are no figures, or "".
    """

    other: str
    ours: tuple[float, ...] = ()
    theirs: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()
    threads: tuple[int, int] = (1, 1)
    facts: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {})
    failed: str = ""

    @property
    def ratio(self) -> float:
        """The median of the paired ratios."""
        return statistics.median(self.ratios)

    def plain(self) -> dict[str, Any]:
        """Return the comparison as plain values."""
        return asdict(self)


def compare(cases: Sequence[Case], protocol: Protocol) -> list[list[Comparison]]:
    """Measure cases that have the same sides, in the same runs; return each case's comparisons.

    A side that fails, or does other work than Squall, is not run again, and its comparison has the reason.
    """
    first = cases[0]
    assert all((case.ours, case.others) == (first.ours, first.others) for case in cases)
    sides = (first.ours, *first.others)
    failed: dict[Side, str] = {}
    threads: dict[Side, int] = {}
    told: dict[Side, list[Mapping[str, Any]]] = {side: [] for side in sides}
    for side in sides:
        with _noting(failed, side):
            threads[side] = best_threads(first, side, protocol)
    for count in range(protocol.pairs):
        for side in sides if count % 2 == 0 else reversed(sides):
            if side not in failed and first.ours not in failed:
                with _noting(failed, side):
                    told[side].append(run(side, threads[side], protocol))
        for case in cases:
            for other in first.others:
                if other not in failed and first.ours not in failed:
                    with _noting(failed, other):
                        check_same(case, other, told[first.ours][-1], told[other][-1])
    why = {other: failed.get(first.ours) or failed.get(other) for other in first.others}
    return [
        [
            Comparison(other.name, failed=str(why[other]))
            if why[other]
            else _comparison(case, other, told[first.ours], told[other], (threads[first.ours], threads[other]))
            for other in first.others
        ]
        for case in cases
    ]


@contextmanager
def _noting(failed: dict[Side, str], side: Side) -> Iterator[None]:
    try:
        yield
    except (SideFailed, PeerMissing, OtherWork) as error:
        failed[side] = str(error)


def _comparison(
    case: Case,
    other: Side,
    ours: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
    threads: tuple[int, int],
) -> Comparison:
    a, b = ([float(told[case.fact]) for told in side] for side in (ours, theirs))
    ratios = tuple(x / y if case.higher_is_better else y / x for x, y in zip(a, b, strict=True))
    return Comparison(other.name, tuple(a), tuple(b), ratios, threads, (ours[-1], theirs[-1]))


def best_threads(case: Case, side: Side, protocol: Protocol) -> int:
    """Return the number of threads with which a side is best, from one short run for each."""
    if len(side.threads) == 1:
        return side.threads[0]
    short = Protocol(1, protocol.warm_up / 2, protocol.seconds / 2)
    figures = {threads: float(run(side, threads, short)[case.fact]) for threads in side.threads}
    return (max if case.higher_is_better else min)(figures, key=lambda threads: figures[threads])


def run(side: Side, threads: int, protocol: Protocol) -> Mapping[str, Any]:
    """Run a side to its end; return its facts, with the figure under the name `FIGURE`.

    Raises:
        SideFailed: the side printed no figure.
    """
    command = [
        interpreter(side.peer), str(SIDES / side.script), *side.arguments, "--threads", str(threads),
        "--warm-up", str(protocol.warm_up), "--seconds", str(protocol.seconds),
    ]  # fmt: skip
    started = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        out, err = started.communicate(timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise SideFailed(f"{side.name}: no figure within {MOST_SECONDS:.0f} s") from error
    finally:
        with suppress(ProcessLookupError):  # with its child processes, also after an interruption
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    lines = [line for line in out.splitlines() if line.startswith('{"figure"')]
    if started.returncode or not lines:
        words = [line for line in (err or out).splitlines() if line.strip()]
        raise SideFailed(f"{side.name}: exit status {started.returncode}: {words[-1] if words else 'no output'}")
    answer = json.loads(lines[-1])
    print(f"    {side.name}: {answer['figure']:,.4g}", file=sys.stderr, flush=True)
    return {FIGURE: float(answer["figure"]), **answer["facts"]}


def check_same(case: Case, other: Side, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise `OtherWork` unless both sides did the same work, as far as they report it.

    Numbers may differ by `Case.tolerance`. A side that reports whether its loss fell must report that it did.
    """
    for fact in (*case.same, case.fact):
        if fact not in ours or fact not in theirs:
            raise OtherWork(f"{case.id}: {'Squall' if fact not in ours else other.name} does not report its {fact}")
        if fact == case.fact:
            continue
        a, b = ours[fact], theirs[fact]
        alike = a == b if isinstance(a, str) else abs(a - b) <= case.tolerance * max(abs(a), abs(b))
        if not alike:
            raise OtherWork(f"{case.id}: {fact} is {a} in Squall and {b} in {other.name}")
    for name, facts in (("Squall", ours), (other.name, theirs)):
        if facts.get("loss_fell") is False:
            raise OtherWork(f"{case.id}: the loss of {name} does not fall")


def reached(target: float | None, comparisons: Sequence[Comparison], other: str) -> bool | None:
    """Return whether the ratio to a side reaches its target; None without a target or a measurement."""
    found = next((c for c in comparisons if c.other == other and not c.failed), None)
    return None if target is None or found is None else found.ratio >= target
