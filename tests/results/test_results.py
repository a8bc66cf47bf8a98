"""The program of docs/results.md without training: verdicts, the page, and the choice of runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.cli.curves import Curve
from services.store.records import RunRecord, this_process
from services.store.sqlite import SQLiteRunStore
from tests.results import __main__ as command
from tests.results import report
from tests.results.rows import LAST_THREE, PLOTS, ROWS, Experiment, Published
from tests.results.training import Run, TrainingFailed, decide, differences, forget, make, read_runs, write_runs

ROOT = Path(__file__).parents[2]
PLOT = "cartpole-dqn"
BEST_OF = Experiment("dqn-cartpole", "dqn", "CartPole-v1", 60_000, threshold=475, seeds=(0, 1), plots=(PLOT,))
STEADY = replace(BEST_OF, metric=LAST_THREE)


def run(row: Experiment, seed: int = 0, best: float | None = 480.0, steps: int = 50_000, **changes: Any) -> Run:
    summary = {"eval_return_mean": best, "final_return_mean": 300.0, "env_steps": steps + 3, "wall_seconds": 90.4}
    evaluations = ((10_000, 100.0), (20_000, 500.0), (30_000, 490.0), (40_000, 480.0))
    made = Run(row.command(seed), steps, 2, {**summary, "stopped_because": "steps"}, evaluations)
    return replace(made, **changes)


# Rows


def test_rows_have_names_and_plots_of_their_own() -> None:
    assert len({row.id for row in ROWS}) == len(ROWS)
    assert {name for row in ROWS for name in row.plots} == set(PLOTS)
    assert any(row.quick for row in ROWS)


def test_the_command_of_a_row() -> None:
    row = replace(BEST_OF, steps=2000, settings={"updates_per_step": 0.5})
    words = "squall train dqn CartPole-v1 --actors 2 --steps 2000 --set updates_per_step=0.5 --seed 1"
    assert (row.command(1), row.run(1)) == (words, "dqn-cartpole-seed1")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_the_command_of_a_row_reads_as_its_settings(row: Experiment) -> None:
    """Otherwise an interrupted run would look like another experiment when it is resumed."""
    words = row.arguments(0)
    sets = [value.partition("=") for word, value in pairwise(words) if word == "--set"]
    assert {key: yaml.safe_load(value) for key, _, value in sets} == dict(row.settings)


# Scores and verdicts


def test_a_score_is_the_best_weights_or_the_lowest_of_the_last_three() -> None:
    assert report.score(BEST_OF, run(BEST_OF, best=477.5)) == 477.5
    assert report.score(BEST_OF, run(BEST_OF, best=None)) is None
    assert report.score(STEADY, run(STEADY, best=1.0)) == 480
    assert report.score(STEADY, run(STEADY, evaluations=((1, 500.0), (2, 500.0)))) is None
    assert report.score(STEADY, run(STEADY, evaluations=((1, 500.0), (2, 500.0), (3, None), (4, 500.0)))) is None


@pytest.mark.parametrize(
    ("best", "steps", "reached"),
    [(475.0, 60_000, True), (474.9, 60_000, False), (500.0, 60_001, False), (None, 60_000, False)],
)
def test_a_score_counts_within_the_steps_allowed(best: float | None, steps: int, reached: bool) -> None:
    made = run(BEST_OF, best=best, steps=steps)
    assert report.reaches(BEST_OF, made) == reached
    assert report.reaches(replace(BEST_OF, threshold=None), made)


def test_every_seed_must_reach_it() -> None:
    good, bad = run(BEST_OF), run(BEST_OF, best=100.0)
    assert report.verdict(BEST_OF, {0: good, 1: good}) == report.REACHED
    assert report.verdict(BEST_OF, {0: good, 1: bad}) == report.MISSED
    assert report.verdict(BEST_OF, {1: bad}) == report.MISSED
    assert report.verdict(BEST_OF, {0: good}) == "not yet run: seed 1"
    assert report.verdict(BEST_OF, {}) == report.NOT_YET
    shown = replace(BEST_OF, threshold=None)
    assert report.verdict(shown, {0: bad, 1: bad}) == report.SHOWN
    assert report.verdict(shown, {}) == report.NOT_YET


def test_a_run_of_another_command_is_ignored() -> None:
    runs = {"dqn-cartpole-seed0": run(BEST_OF), "dqn-cartpole-seed1": run(BEST_OF, 1, command="squall train dqn")}
    assert list(report.runs_of(BEST_OF, runs)) == [0]


# The page


def test_the_page_and_the_plots_come_from_the_file_alone(tmp_path: Path) -> None:
    other = replace(BEST_OF, id="a2c-acrobot", algorithm="a2c", environment="Acrobot-v1", plots=("acrobot",))
    theirs = Published("theirs", "their page", ((10, 1.0), (20, 2.5)))
    noted = replace(other, id="sac", note="published: 42", threshold=None, within=7, published=(theirs,))
    file = command.results_file(tmp_path)
    file.parent.mkdir(parents=True)
    write_runs(file, {BEST_OF.run(0): run(BEST_OF), BEST_OF.run(1): run(BEST_OF, 1, best=400.04)})
    assert command.main(["--render"], (BEST_OF, other, noted), tmp_path) == 0
    page = command.page_file(tmp_path).read_text().splitlines()
    cells = "50,003 | 60,000 | 480.0, 400.0 | 400.0 | 440.0 | 300.0, 300.0 | 475 | 90, 90 | not reached |"
    assert f"| dqn-cartpole | 0, 1 | {cells}" in page
    assert "| a2c-acrobot | 0, 1 |  | 60,000 |  |  |  |  | 475 |  | not yet run |" in page
    assert "sac: published: 42" in page
    assert "Published by others, theirs: 2.5 at 20 steps (their page)." in page
    assert "![CartPole-v1: DQN and its variants](images/results/cartpole-dqn.png)" in page
    assert "squall train dqn CartPole-v1 --actors 2 --seed 0  # dqn-cartpole" in page
    assert [path.name for path in (tmp_path / report.IMAGES).iterdir()] == ["cartpole-dqn.png"]
    assert any("with 2 cores" in line for line in page)


def test_what_others_published_is_drawn_beside_a_row_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Curve] = []
    monkeypatch.setattr(report, "draw", lambda curves, *_, **__: drawn.extend(curves))
    row = replace(BEST_OF, published=(Published("theirs", "their page", ((10, 1.0), (20, 2.5))),))
    report.draw_plots([row], {}, tmp_path)
    assert drawn == []
    report.draw_plots([row], {BEST_OF.run(0): run(BEST_OF)}, tmp_path)
    ours, theirs = drawn
    assert (ours.label, ours.seeds) == ("dqn", (0,))
    assert (theirs.label, theirs.seeds) == ("theirs", ())
    assert theirs.steps.tolist() == [10.0, 20.0]
    assert theirs.mean.tolist() == [1.0, 2.5]


def test_runs_read_as_they_were_written(tmp_path: Path) -> None:
    runs = {"b": run(BEST_OF, best=None), "a": run(STEADY, evaluations=((1, 0.5), (2, None)))}
    write_runs(tmp_path / "results.json", runs)
    assert read_runs(tmp_path / "results.json") == runs
    assert read_runs(tmp_path / "none.json") == {}


def test_the_page_in_the_repository_is_what_its_file_gives() -> None:
    runs = read_runs(command.results_file(ROOT))
    drawn = {path.stem for path in (ROOT / report.IMAGES).glob("*.png")}
    same = command.page_file(ROOT).read_text() == report.markdown(ROWS, runs, sorted(drawn))
    assert same, "write it again: make results ARGS=--render"


# What is run


@pytest.mark.parametrize(
    ("exists", "stopped_because", "step"),
    [
        (False, None, "start"),
        (True, None, "resume"),
        (True, "interrupted", "resume"),
        (True, "stopped", "resume"),
        (True, "steps", "skip"),
        (True, "return", "skip"),
    ],
)
def test_a_run_is_started_resumed_or_left_alone(exists: bool, stopped_because: str | None, step: str) -> None:
    assert decide(exists, stopped_because and {"stopped_because": stopped_because}) == step  # type: ignore[arg-type]


CONFIG = {
    "algorithm": "dqn",
    "environment": "CartPole-v1",
    "seed": 0,
    "steps": 50_000,
    "actors": 2,
    "hyperparameters": {"updates_per_step": 1.0},
}


def test_a_run_of_another_experiment_is_recognized() -> None:
    assert differences(BEST_OF, 0, CONFIG) == []
    row = replace(BEST_OF, actors=8, steps=1000, settings={"updates_per_step": 0.5, "seed": 3})
    assert differences(row, 0, CONFIG) == [
        "actors is 2, not 8", "seed is 0, not 3", "steps is 50000, not 1000", "updates_per_step is 1.0, not 0.5"
    ]  # fmt: skip


@pytest.fixture
def runs_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SQUALL_HOME", str(tmp_path / "runs"))
    return tmp_path / "runs"


def leave(runs_dir: Path, row: Experiment, seed: int, best: float = 480.0, stopped_because: str = "steps") -> None:
    """Leave a run as `squall train` does: evaluated at step 1000, resumed, evaluated there again and at 2000."""
    name = row.run(seed)
    (runs_dir / name).mkdir(parents=True)
    (runs_dir / name / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "seed": seed}))
    summary = {**run(row, seed, best=best).summary, "stopped_because": stopped_because}
    (runs_dir / name / "summary.json").write_text(json.dumps(summary))
    with SQLiteRunStore(runs_dir / "squall.db") as store:
        store.register(
            RunRecord(name, 1.0, "dqn", "CartPole-v1", seed, "here", 1, 1.0, "finished", 1.0, "steps", CONFIG)
        )
        for step, value in ((1000, 5.0), (1000, 6.0), (2000, float("nan"))):
            store.add_metrics(name, step, {"eval/mean_reward": value}, 1.0)
            store.add_metrics(name, step + 1, {"train/loss": 1.0}, 1.0)


def test_runs_that_are_done_are_collected_and_judged(
    runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(runs_dir, BEST_OF, 0)
    leave(runs_dir, BEST_OF, 1, best=10.0)
    assert command.main([], (BEST_OF,), tmp_path) == 1
    runs = read_runs(command.results_file(tmp_path))
    assert list(runs) == ["dqn-cartpole-seed0", "dqn-cartpole-seed1"]
    assert (runs["dqn-cartpole-seed0"].evaluations, runs["dqn-cartpole-seed0"].steps) == (
        ((1000, 6.0), (2000, None)),
        50_000,
    )
    assert "dqn-cartpole-seed1: score 10.0, 90 s, below the wanted score" in capsys.readouterr().out
    assert "not reached" in command.page_file(tmp_path).read_text()
    assert command.main(["dqn-cartpole"], (replace(BEST_OF, threshold=10),), tmp_path) == 0


def test_quick_takes_first_seeds_and_writes_nothing(
    runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (replace(BEST_OF, quick=True), replace(BEST_OF, id="slow"))
    leave(runs_dir, rows[0], 0)
    assert command.main(["--quick"], rows, tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    out = capsys.readouterr().out
    assert "slow" not in out
    assert [line.split() for line in out.splitlines() if line.endswith(" reached")] == [
        ["dqn-cartpole", "480.0", "475", "reached"]
    ]
    assert command.main(["--quick"], (replace(rows[0], threshold=481),), tmp_path) == 1


def test_a_finished_run_of_another_experiment_is_not_taken(runs_dir: Path, tmp_path: Path) -> None:
    leave(runs_dir, BEST_OF, 0)
    row = replace(BEST_OF, actors=8, seeds=(0,))
    with pytest.raises(TrainingFailed, match=r"actors is 2, not 8; --fresh starts it over"):
        make(row, 0, runs_dir)
    assert command.main([], (row,), tmp_path) == 1
    assert read_runs(command.results_file(tmp_path)) == {}


def test_a_run_is_removed_unless_it_is_live(runs_dir: Path) -> None:
    for seed in (0, 1):
        leave(runs_dir, BEST_OF, seed)
    forget("dqn-cartpole-seed0", runs_dir)
    forget("never-was", runs_dir)
    assert not (runs_dir / "dqn-cartpole-seed0").exists()
    with SQLiteRunStore(runs_dir / "squall.db") as store:
        assert [record.name for record in store.list_runs()] == ["dqn-cartpole-seed1"]
        assert len(store.metrics("dqn-cartpole-seed1")) == 6
        store.adopt("dqn-cartpole-seed1", *this_process())
        store.write_snapshot("dqn-cartpole-seed1", {}, time.time())
    with pytest.raises(TrainingFailed, match="dqn-cartpole-seed1 is live: squall stop dqn-cartpole-seed1"):
        forget("dqn-cartpole-seed1", runs_dir)
    assert (runs_dir / "dqn-cartpole-seed1").exists()


def test_an_unknown_row_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["dqn-cartpol"], (BEST_OF,), tmp_path)
    assert "no row is named dqn-cartpol; there are dqn-cartpole" in capsys.readouterr().err


def test_nothing_heavy_is_imported() -> None:
    heavy = "('torch', 'ray', 'pytorch_lightning', 'gymnasium', 'matplotlib')"
    script = f"import sys, tests.results.__main__; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
