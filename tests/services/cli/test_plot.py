"""Learning curves: arithmetic on hand-picked numbers, images, and the command through the real command line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from replay.errors import ConfigurationError
from services.cli.curves import Curve, Series, aggregate, as_series, describe_band, draw, smoothed
from services.cli.main import main
from services.store.records import RunRecord
from services.store.sqlite import SQLiteRunStore
from tests.services.running import squall

PNG = b"\x89PNG\r\n\x1a\n"


def series(*points: tuple[float, float]) -> Series:
    return Series(np.array([step for step, _ in points], float), np.array([value for _, value in points], float))


# Arithmetic


def test_a_moving_average_looks_back_and_starts_short() -> None:
    values = np.array([3.0, 5.0, 10.0, 0.0])
    np.testing.assert_allclose(smoothed(values, 1), values)
    np.testing.assert_allclose(smoothed(values, 3), [3, 4, 6, 5])
    np.testing.assert_allclose(smoothed(values, 99), [3, 4, 6, 4.5])


def test_seeds_are_interpolated_where_all_of_them_have_points() -> None:
    curve = aggregate("dqn", {0: series((0, 0), (10, 10), (20, 30)), 7: series((5, 1), (15, 5), (40, 1000))})
    assert curve.steps.tolist() == [5, 10, 15, 20]
    # values at these steps: seed 0: 5, 10, 20, 30; seed 7: 1, 3, 5, 5 + 995 / 5
    np.testing.assert_allclose(curve.mean, [3, 6.5, 12.5, 117])
    np.testing.assert_allclose(curve.low, [1, 3, 5, 30])
    np.testing.assert_allclose(curve.high, [5, 10, 20, 204])
    assert curve.seeds == (0, 7)


def test_a_seed_is_smoothed_by_its_own_points_before_it_meets_the_others() -> None:
    curve = aggregate("dqn", {0: series((0, 0), (10, 4)), 1: series((0, 10), (5, 20), (10, 60))}, smooth=2)
    assert curve.steps.tolist() == [0, 5, 10]
    np.testing.assert_allclose(curve.mean, [(0 + 10) / 2, (1 + 15) / 2, (2 + 40) / 2])


def test_one_seed_is_its_own_band() -> None:
    curve = aggregate("dqn", {3: series((1, 5), (2, 7))})
    assert curve.mean.tolist() == curve.low.tolist() == curve.high.tolist() == [5, 7]


def test_what_is_not_finite_is_left_out_and_counted() -> None:
    curve = aggregate("dqn", {0: series((0, 1), (5, math.nan), (10, 3)), 1: series((0, 1), (10, 1), (20, math.inf))})
    assert (curve.steps.tolist(), curve.mean.tolist(), curve.left_out) == ([0, 10], [1, 2], 2)
    with pytest.raises(ConfigurationError, match="dqn: seed 4 has no finite value"):
        aggregate("dqn", {3: series((0, 1)), 4: series((0, math.nan))})


def test_seeds_without_a_step_in_common_are_refused() -> None:
    words = r"dqn: no step is covered by all seeds: seed 0 0 to 1,000, seed 1 1,500 to 2,000"
    with pytest.raises(ConfigurationError, match=words):
        aggregate("dqn", {0: series((0, 1), (1000, 1)), 1: series((1500, 1), (2000, 1))})


def test_steps_done_again_after_a_resume_replace_the_first_ones() -> None:
    made = as_series([(100, 1.0), (200, 2.0), (300, 3.0), (200, 4.0), (250, 5.0), (250, 6.0)])
    assert made.steps.tolist() == [100, 200, 250]
    assert made.values.tolist() == [1, 4, 6]
    assert as_series([]).steps.shape == (0,)


# Images


def curve(label: str = "dqn", seeds: int = 2) -> Curve:
    return aggregate(label, {seed: series((0, seed), (1000, 10)) for seed in range(seeds)})


@pytest.mark.parametrize(("suffix", "begins"), [(".png", PNG), (".pdf", b"%PDF"), (".SVG", b"<?xml")])
def test_the_suffix_chooses_the_format(tmp_path: Path, suffix: str, begins: bytes) -> None:
    path = tmp_path / f"curves{suffix}"
    draw([curve(), curve("a2c", seeds=1)], path, title="CartPole-v1", ylabel="return", wanted=475)
    assert path.read_bytes().startswith(begins)


def test_a_picture_says_what_it_shows(tmp_path: Path) -> None:
    path = tmp_path / "curves.svg"
    made = replace(curve(), steps=np.array([0.0, 2_000_000.0]))
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        others = [curve("a2c", seeds=1), replace(curve("theirs"), seeds=())]
        draw([made, *others], path, title="CartPole-v1", ylabel="return", smooth=4, wanted=475)
    text = path.read_text()
    for words in (
        "CartPole-v1", "environment steps", "return", "dqn (2 seeds)", "a2c (1 seed)", "theirs", "wanted: 475",
        "1,000,000",
        "line: mean of the seeds; band: lowest to highest seed; each point is the mean of the last 4 of its seed",
    ):  # fmt: skip
        assert f">{words}<" in text, words


def test_no_band_is_explained_where_there_is_none() -> None:
    assert describe_band([curve(seeds=1)], smooth=1) == ""


# The command


@pytest.fixture(autouse=True)
def runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SQUALL_HOME", str(tmp_path / "runs"))
    return tmp_path / "runs"


def fill(runs_folder: Path, name: str, values: dict[str, list[tuple[int, float]]], **changes: Any) -> None:
    """Register an ended run with these metrics; `changes` override values of its record or its configuration."""
    fields = {key: changes.pop(key) for key in ("algorithm", "environment", "seed") if key in changes}
    config = {"actors": changes.pop("actors", 2), "hyperparameters": {"gamma": 0.99, **changes}}
    record = RunRecord(
        name, 1.0, "dqn", "CartPole-v1", 0, "elsewhere", 1, 1.0, "finished", 1.0, "steps", config
    )  # fmt: skip
    with SQLiteRunStore(runs_folder / "squall.db") as store:
        store.register(replace(record, **fields))
        for metric, points in values.items():
            for step, value in points:
                store.add_metrics(name, step, {metric: value}, 1.0)


RISING = {"eval/mean_reward": [(0, 10.0), (1000, 20.0)], "train/loss": [(0, 1.0), (500, 0.5), (1000, 0.1)]}


def plotted(capfd: pytest.CaptureFixture[str], *arguments: str) -> list[tuple[str, list[int], int]]:
    """Plot and return label, seeds and points of each curve."""
    status = main(["plot", *arguments, "--json"])
    out, err = capfd.readouterr()
    assert status == 0, err
    return [(c["label"], c["seeds"], c["points"]) for c in json.loads(out)["curves"]]


def test_seeds_of_a_run_are_one_curve(runs_folder: Path, tmp_path: Path) -> None:
    fill(runs_folder, "a", RISING)
    fill(runs_folder, "b", RISING, seed=1)
    fill(runs_folder, "c", RISING, algorithm="a2c")
    file = tmp_path / "curves.png"
    done = squall(
        runs_folder, "plot", "a", "b", "c", "-o", str(file), "--metric", "train/loss", "--smooth", "2", "--json"
    )
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
    assert json.loads(done.stdout) == {
        "output": str(file),
        "metric": "train/loss",
        "smooth": 2,
        "curves": [
            {"label": "dqn", "seeds": [0, 1], "points": 3},
            {"label": "a2c", "seeds": [0], "points": 3},
        ],
    }
    assert file.read_bytes().startswith(PNG)


def test_a_label_says_in_what_the_runs_differ(
    runs_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "curves.png")
    fill(runs_folder, "two", RISING)
    fill(runs_folder, "eight", RISING, actors=8)
    fill(runs_folder, "short", RISING, gamma=0.9, seed=1)
    fill(runs_folder, "pong", RISING, environment="PongNoFrameskip-v4")
    assert plotted(capfd, "two", "eight", "-o", output) == [("dqn, actors=2", [0], 2), ("dqn, actors=8", [0], 2)]
    labels = [label for label, _, _ in plotted(capfd, "two", "short", "pong", "-o", output)]
    assert labels == ["dqn, CartPole-v1, gamma=0.99", "dqn, CartPole-v1, gamma=0.9", "dqn, PongNoFrameskip-v4"]
    assert plotted(capfd, "mine=two", "mine=short", "eight", "-o", output) == [("mine", [0, 1], 2), ("dqn", [0], 2)]


def test_points_that_are_not_finite_are_reported(
    runs_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fill(runs_folder, "a", {"eval/mean_reward": [(0, 1.0), (10, math.nan), (20, 2.0)]})
    assert main(["plot", "a", "-o", str(tmp_path / "curves.svg")]) == 0
    out, err = capfd.readouterr()
    assert (out.split(), err) == (
        [f"{tmp_path}/curves.svg:", "dqn"],
        "dqn: 1 points that are not finite are left out\n",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run-9"], "no run is named 'run-9'; the nearest: run-"),
        (["run-1", "--metric", "eval/x"], "run 'run-1' has no metric 'eval/x'; it has eval/mean_reward, train/loss"),
        (["new"], "run 'new' has no metric 'eval/mean_reward'; it has no metrics yet"),
        (["run-1", "run-1"], "run 'run-1' is named twice"),
        (["run-1", "run-2"], "runs 'run-1' and 'run-2' are both dqn with seed 0; to draw a curve for each, label them"),
        (["x=run-1", "x=a2c"], "runs 'run-1' and 'a2c' are both x with seed 0"),
        (["run-1", "late"], "dqn: no step is covered by all seeds"),
        (["run-1", "--smooth", "0"], "smooth must be at least 1 point, got 0"),
        (["run-1", "-o", "curves.gif"], "an image file's name must end in .png, .pdf, .svg, got curves.gif"),
        (["run-1", "-o", "curves"], "an image file's name must end in .png, .pdf, .svg, got curves"),
        (["run-1", "-o", "nowhere/curves.png"], "cannot write nowhere/curves.png: there is no folder nowhere"),
        (["run-1", "-o", "folder.png"], "cannot write folder.png: it is a folder"),
    ],
)
def test_bad_input_is_one_clear_line_and_nothing_is_drawn(
    runs_folder: Path,
    tmp_path: Path,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    for name, changes in {"run-1": {}, "run-2": {}, "a2c": {"algorithm": "a2c"}}.items():
        fill(runs_folder, name, RISING, **changes)
    fill(runs_folder, "new", {}, seed=1)
    fill(runs_folder, "late", {"eval/mean_reward": [(2000, 1.0)]}, seed=2)
    assert main(["plot", *arguments]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "folder.png"}
