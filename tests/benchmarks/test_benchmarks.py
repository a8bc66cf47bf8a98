"""The benchmark programs without a measurement: which sides are comparable, and the page."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import measuring, report
from tests.benchmarks.__main__ import main, together
from tests.benchmarks.cases import CASES, LIMIT, Case, Side
from tests.benchmarks.measuring import SIDES, Comparison, OtherWork, Protocol, SideFailed, check_same, compare
from tests.benchmarks.peers import PEERS, ROOT, PeerMissing, interpreter

CASE = Case("row", "", "title", "steps/s", Side("Squall", "ours.py"), (Side(LIMIT, "limit.py"),), same=("parameters",))
SAME = {"parameters": 100, "figure": 1.0}


def test_cases_have_names_of_their_own_and_scripts_that_exist() -> None:
    assert len({case.id for case in CASES}) == len(CASES)
    for case in CASES:
        for side in (case.ours, *case.others):
            assert (SIDES / side.script).exists()
            assert side.peer in {"", *PEERS}
        assert set(case.targets) <= {side.name for side in case.others}


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ({**SAME}, {**SAME, "parameters": 90}, "parameters is 100 in Squall and 90 in limit"),
        ({**SAME}, {}, "limit does not report its parameters"),
        ({}, {**SAME}, "Squall does not report its parameters"),
        ({**SAME}, {"parameters": 100}, "limit does not report its figure"),
        ({**SAME}, {**SAME, "loss_fell": False}, "the loss of limit does not fall"),
    ],
)
def test_sides_that_did_other_work_have_no_ratio(ours: dict[str, Any], theirs: dict[str, Any], words: str) -> None:
    with pytest.raises(OtherWork, match=words):
        check_same(CASE, CASE.others[0], ours, theirs)


def test_sides_within_the_tolerance_did_the_same_work() -> None:
    check_same(CASE, CASE.others[0], {**SAME, "loss_fell": True}, {**SAME, "parameters": 101, "figure": 9.0})


def measured_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: str, limit: str, case: Case = CASE
) -> Comparison:
    """Compare two scripts given as text, in windows of no length."""
    for name, text in (("ours.py", ours), ("limit.py", limit)):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(measuring, "SIDES", tmp_path)
    ((comparison,),) = compare([case], Protocol(pairs=3, warm_up=0.0, seconds=0.0))
    return comparison


COUNTING = """
import json, pathlib
file = pathlib.Path(__file__).with_suffix(".count")
count = int(file.read_text()) + 1 if file.exists() else 1
file.write_text(str(count))
print(json.dumps({"figure": FACTOR * count, "facts": {"parameters": 7}}))
"""


def test_the_ratio_is_of_pairs_and_says_how_many_times_better_ours_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = COUNTING.replace("FACTOR", "6.0"), COUNTING.replace("FACTOR", "2.0")
    comparison = measured_by(tmp_path, monkeypatch, *texts)
    assert comparison.ratios == (3.0, 3.0, 3.0)
    assert comparison.ours == (6.0, 12.0, 18.0)

    less = measured_by(tmp_path, monkeypatch, *texts, replace(CASE, higher_is_better=False))
    assert less.ratio == pytest.approx(1 / 3)


def test_cases_of_the_same_sides_share_their_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ours.py", "limit.py"):
        (tmp_path / name).write_text(
            COUNTING.replace("FACTOR", "2.0").replace('"parameters": 7', '"parameters": 7, "b": 3 * count')
        )
    monkeypatch.setattr(measuring, "SIDES", tmp_path)
    cases = [CASE, replace(CASE, name="b", fact="b")]
    assert together(cases) == [cases]
    ((a,), (b,)) = compare(cases, Protocol(pairs=2, warm_up=0.0, seconds=0.0))
    assert a.ours == (2.0, 4.0)
    assert b.ours == (3.0, 6.0)


def test_rounds_go_forth_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (tmp_path / f"{name}.py").write_text(
            "import json, pathlib\n"
            f"with open(pathlib.Path(__file__).with_name('order'), 'a') as file: file.write('{name}')\n"
            "print(json.dumps({'figure': 1, 'facts': {'parameters': 1}}))"
        )
    monkeypatch.setattr(measuring, "SIDES", tmp_path)
    case = replace(CASE, ours=Side("Squall", "a.py"), others=(Side("b", "b.py"), Side("c", "c.py")))
    compare([case], Protocol(pairs=3, warm_up=0.0, seconds=0.0))
    assert (tmp_path / "order").read_text() == "abccbaabc"


def test_a_side_that_fails_is_named_with_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = measured_by(tmp_path, monkeypatch, COUNTING.replace("FACTOR", "1.0"), "raise SystemExit('no game')")
    assert comparison.failed == "limit: exit status 1: no game"
    assert "no game" in report.line(CASE, comparison)


def test_a_side_without_a_figure_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ours.py").write_text("print('done')")
    monkeypatch.setattr(measuring, "SIDES", tmp_path)
    with pytest.raises(SideFailed, match="Squall: exit status 0: done"):
        measuring.run(CASE.ours, 1, Protocol())


def test_a_peer_that_cannot_be_installed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUALL_PEERS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(PeerMissing, match="cpprb: ERROR: No matching distribution found"):
        interpreter("cpprb")
    assert interpreter("") == sys.executable


def test_the_page_in_the_repository_is_what_its_file_gives() -> None:
    page = report.page_file(ROOT).read_text()
    part = report.markdown(report.read(ROOT), report.notes(ROOT))
    assert page == report.replace_part(page, part), "write it again: make bench ARGS=--render"


def test_the_rest_of_the_page_stays() -> None:
    page = f"by hand\n\n{report.BEGIN}\nold\n{report.END}\n\nmore by hand\n"
    new = report.replace_part(page, "new")
    assert new == f"by hand\n\n{report.BEGIN}\n\nnew\n{report.END}\n\nmore by hand\n"
    assert report.replace_part(new, "new") == new


@pytest.mark.parametrize(
    "page",
    [
        "no markers",
        f"{report.BEGIN}\n",
        f"{report.END}\n{report.BEGIN}\n",
        f"{report.BEGIN}{report.BEGIN}{report.END}",
        f"{report.BEGIN}{report.END}{report.END}",
    ],
)
def test_a_page_without_its_markers_is_not_written(page: str) -> None:
    with pytest.raises(ValueError, match="each once"):
        report.replace_part(page, "new")


def test_the_page_shows_which_targets_are_reached() -> None:
    case = next(case for case in CASES if case.id == "lightning/k=8")
    facts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for ratio, verdict in ((0.9, "reached"), (0.8, "not reached")):
        comparison = Comparison(LIMIT, (90.0,), (100.0,), (ratio,), (1, 1), facts)
        page = report.markdown({case.id: (report.machine(), [comparison])})
        assert (
            f"| k=8 | limit | 90 | 100 | {ratio:.2f} | {ratio:.2f}-{ratio:.2f} | 0.85 | 1 and 1 | {verdict} |" in page
        )
    assert "not yet measured" in page


def test_the_forecast_is_the_arithmetic_of_the_scale_rows() -> None:
    case = next(case for case in CASES if case.id == "scale/2-shards")
    facts = [
        {"shards": n, "rate": 400.0, "most": 20_000.0 * n, "cpu_seconds_per_million_inserted": 20.0,
         "cpu_seconds_per_million_drawn": 30.0}
        for n in (2, 1)
    ]  # fmt: skip
    comparison = Comparison("1 shard", (60.0,), (30.0,), (2.0,), (1, 1), (facts[0], facts[1]))
    page = report.markdown({case.id: (report.machine(), [comparison])})
    assert "400,000 x 20.0 / 1,000,000 = 8.0 cores" in page
    assert "50,000 x 30.0 / 1,000,000 = 1.5" in page
    assert f"{math.ceil(9.5 * 1.5)} shards" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "pong,perr"], "no row is named perr"),
        (["--pairs", "3"], "at least 5 pairs"),
        (["--seconds", "5"], "windows of 10 to 30 s"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_starts(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert message in capsys.readouterr().err
