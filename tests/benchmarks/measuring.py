"""Pairs: each side is a process of its own, run in ABBA order; what counts is the median of the paired ratios."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.cases import Case, Side
from tests.benchmarks.peers import ROOT, PeerMissing, interpreter

SIDES = Path(__file__).parent / "sides"
MOST_SECONDS = 600.0


class SideFailed(Exception):
    """A side that printed no figure; the text ends with its last words."""


class OtherWork(Exception):
    """Two sides that did not do the same work, so that their ratio would mean nothing."""


@dataclass(frozen=True)
class Protocol:
    """How long and how often.

    Attributes:
        pairs: of ours and another's.
        warm_up: seconds, after a side is at work.
        seconds: of the window.
    """

    pairs: int = 5
    warm_up: float = 8.0
    seconds: float = 15.0


@dataclass(frozen=True)
class Comparison:
    """Ours against one other side.

    Attributes:
        other: the other side's name.
        ours: our figures, in the order of the pairs.
        theirs: the other side's.
        ratios: how many times better ours is, pair by pair.
        threads: of ours and of the other side, each the better of those tried.
        facts: what ours and the other side said of their work, the last time.
        failed: why there are no figures, or "".
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
        """Return this as plain values."""
        return asdict(self)


def compare(case: Case, protocol: Protocol) -> Iterator[Comparison]:
    """Measure ours against every other side of a case."""
    for other in case.others:
        try:
            yield _compare(case, other, protocol)
        except (SideFailed, PeerMissing, OtherWork) as error:
            yield Comparison(other.name, failed=str(error))


def _compare(case: Case, other: Side, protocol: Protocol) -> Comparison:
    threads = best_threads(case, case.ours, protocol), best_threads(case, other, protocol)
    ours: list[float] = []
    theirs: list[float] = []
    facts: list[Mapping[str, Any]] = [{}, {}]
    for pair in range(protocol.pairs):
        order = (0, 1) if pair % 2 == 0 else (1, 0)
        for which in order:
            side = (case.ours, other)[which]
            figure, facts[which] = run(side, threads[which], protocol)
            (ours, theirs)[which].append(figure)
        check_same(case, other, *facts)
    ratios = tuple(a / b if case.higher_is_better else b / a for a, b in zip(ours, theirs, strict=True))
    return Comparison(other.name, tuple(ours), tuple(theirs), ratios, threads, (facts[0], facts[1]))


def best_threads(case: Case, side: Side, protocol: Protocol) -> int:
    """Return the number of threads at which a side is best, by one short run each."""
    if len(side.threads) == 1:
        return side.threads[0]
    short = Protocol(1, protocol.warm_up / 2, protocol.seconds / 2)
    figures = {threads: run(side, threads, short)[0] for threads in side.threads}
    return (max if case.higher_is_better else min)(figures, key=lambda threads: figures[threads])


def run(side: Side, threads: int, protocol: Protocol) -> tuple[float, Mapping[str, Any]]:
    """Run a side to its end; return its figure and its facts.

    Raises:
        SideFailed: it printed none.
    """
    command = [
        interpreter(side.peer), str(SIDES / side.script), *side.arguments, "--threads", str(threads),
        "--warm-up", str(protocol.warm_up), "--seconds", str(protocol.seconds),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=MOST_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise SideFailed(f"{side.name}: no figure within {MOST_SECONDS:.0f} s") from error
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"figure"')]
    if done.returncode or not lines:
        words = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise SideFailed(f"{side.name}: exit status {done.returncode}: {words[-1] if words else 'no word'}")
    answer = json.loads(lines[-1])
    print(f"    {side.name}: {answer['figure']:,.4g}", file=sys.stderr, flush=True)
    return float(answer["figure"]), answer["facts"]


def check_same(case: Case, other: Side, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise `OtherWork` unless both sides did the same work, as far as both speak of it.

    Figures may differ by `Case.tolerance` of each other; a side that says whether its loss fell must say yes.
    """
    for fact in case.same:
        if fact not in ours or fact not in theirs:
            raise OtherWork(f"{case.id}: {'Squall' if fact not in ours else other.name} does not tell its {fact}")
        a, b = ours[fact], theirs[fact]
        alike = a == b if isinstance(a, str) else abs(a - b) <= case.tolerance * max(abs(a), abs(b))
        if not alike:
            raise OtherWork(f"{case.id}: {fact} is {a} in Squall and {b} in {other.name}")
    for name, facts in (("Squall", ours), (other.name, theirs)):
        if facts.get("loss_fell") is False:
            raise OtherWork(f"{case.id}: the loss of {name} does not fall")


def reached(target: float | None, comparisons: Sequence[Comparison], other: str) -> bool | None:
    """Return whether the ratio to a side is what is wanted; None where nothing is, or nothing was measured."""
    found = next((c for c in comparisons if c.other == other and not c.failed), None)
    return None if target is None or found is None else found.ratio >= target
