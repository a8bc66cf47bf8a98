"""Tests of checkpoints: the files that a learner writes, resumed learners, and files that are refused."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import learner.learner
from learner import DQN
from learner.checkpoints import LAST, load_algorithm, make_algorithm, read_checkpoint
from replay.errors import ConfigurationError
from replay.types import Moments
from tests.learner.runs import LearnerRun, loaded
from tests.learner.toys import CARTPOLE, clone_parameters, same

# Files that a learner writes.


@pytest.mark.parametrize("k", [1, 4, 32])
def test_numbered_checkpoints_come_at_exact_updates_and_only_the_newest_stay(k: int, tmp_path: Path) -> None:
    run = LearnerRun(tmp_path, updates=128, updates_per_training_step=k, checkpoint_every=30, keep_checkpoints=2)
    written: list[str] = []
    save = run.learner.save

    def watched(path: Path) -> None:
        written.append(path.name)
        save(path)
        assert run.global_step(path.name) == run.learner._updates

    run.learner.save = watched  # type: ignore[method-assign]
    report = run.fit()
    assert report.updates == 128
    numbered = [f"step-{n:010d}.ckpt" for n in (30, 60, 90, 120)]
    assert written == [*itertools.chain(*((name, LAST) for name in numbered)), LAST]
    assert run.files == {*numbered[-2:], LAST}
    assert [run.global_step(name) for name in (*numbered[-2:], LAST)] == [90, 120, 128]
    assert report.checkpoint_updates == 128


def test_the_last_checkpoint_is_the_last_state(tmp_path: Path) -> None:
    run = LearnerRun(tmp_path, updates=24)
    run.fit()
    assert run.files == {LAST}
    assert same(clone_parameters(load_algorithm(tmp_path / LAST)), clone_parameters(run.module))


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    run = LearnerRun(tmp_path, updates=8)
    run.fit()
    before = (tmp_path / LAST).read_bytes()
    trainer = run.learner._trainer
    assert trainer is not None

    def half(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    trainer.save_checkpoint = half  # type: ignore[method-assign, assignment]
    with pytest.raises(OSError, match="disk full"):
        run.learner.save(tmp_path / LAST)
    assert (tmp_path / LAST).read_bytes() == before


def test_progress_lands_in_the_checkpoint(tmp_path: Path) -> None:
    run = LearnerRun(tmp_path, updates=8)
    run.learner.note_progress(1234, {"episodes": 7, "best": 1.5})
    run.fit()
    assert read_checkpoint(tmp_path / LAST)["squall"] == {
        "algorithm": "dqn",
        "env_steps": 1234,
        "recent_returns": [],
        "returns_seen": 0,
        "run": {"episodes": 7, "best": 1.5},
    }


def test_the_last_checkpoint_is_never_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner.learner, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    run = LearnerRun(tmp_path, updates=16)
    seen: list[int] = []
    save = run.learner.save

    def remembered(path: Path) -> None:
        save(path)
        seen.append(run.global_step(LAST))

    monkeypatch.setattr(run.learner, "save", remembered)
    run.fit()
    assert seen[:-1] == list(range(1, 17))
    assert run.files == {LAST}


# Resumed learners.


def test_a_learner_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    first = LearnerRun(tmp_path / "a", updates=56, checkpoint_every=50, publish_every=20)
    first.learner.note_progress(66, {"episodes": 7})
    first.fit()
    checkpoint = tmp_path / "a" / "step-0000000050.ckpt"
    second = LearnerRun(
        tmp_path / "b", updates=48, version=first.weights.versions[-1], checkpoint_every=40, publish_every=20
    )
    report = second.fit(resume=checkpoint)
    assert same(loaded(second.weights.published[0]), clone_parameters(load_algorithm(checkpoint).policy))
    assert second.weights.versions == [3, 4, 5], "at 50, 60, and 80 updates"
    assert report.updates == 98
    assert second.files == {"step-0000000080.ckpt", LAST}
    assert second.global_step(LAST) == 98
    assert (second.module.env_steps, second.module.run_progress) == (66, {"episodes": 7})
    steps = {float(s["step"]) for s in read_checkpoint(tmp_path / "b" / LAST)["optimizer_states"][0]["state"].values()}
    assert steps == {98.0}


def test_a_resumed_learner_syncs_where_an_unbroken_one_would(tmp_path: Path) -> None:
    """With the same batches, an interrupted and resumed run ends with bitwise the same weights as an unbroken run."""
    whole = LearnerRun(tmp_path / "whole", updates=80)
    half = LearnerRun(tmp_path / "half", updates=80)
    other_half = LearnerRun(tmp_path / "other", updates=80)
    batches = [reply.batch for _ in range(20) if (reply := sample(whole)) is not None]
    for run, part in ((whole, batches), (half, batches[:11]), (other_half, batches[11:])):
        run.replay.sample = replies(part)  # type: ignore[method-assign]
    whole.fit()
    half.fit()
    other_half.fit(resume=half.folder / LAST)
    assert (half.learner.report().updates, other_half.learner.report().updates) == (44, 80)
    assert same(clone_parameters(other_half.module), clone_parameters(whole.module))


def sample(run: LearnerRun) -> Any:
    return run.replay.sample(4, 8, stop=threading.Event())


def replies(batches: list[Any]) -> Any:
    left = iter(batches)
    return lambda k, batch_size, stop, ahead: SimpleNamespace(batch=next(left, None), wait=None, returns=Moments())


# Files and names that are refused.


def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    contents: dict[str, Callable[[Path], Any]] = {
        "missing": lambda path: None,
        "empty": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_text("not a checkpoint"),
        "folder": lambda path: path.mkdir(),
        "other": lambda path: torch.save({"state_dict": {}}, path),
        "list": lambda path: torch.save([1, 2], path),
        "tensor": lambda path: torch.save(torch.zeros(2), path),
        "half": lambda path: path.write_bytes(whole(tmp_path)[:2000]),
    }
    for name, write in contents.items():
        path = tmp_path / f"{name}.ckpt"
        write(path)
        with pytest.raises(ConfigurationError, match=rf"{name}\.ckpt is not a Squall checkpoint"):
            load_algorithm(path)


def whole(folder: Path) -> bytes:
    torch.save({"squall": {"algorithm": "dqn"}, "state_dict": {"weight": torch.zeros(1000)}}, folder / "whole")
    return (folder / "whole").read_bytes()


def test_a_checkpoint_of_another_algorithm_is_refused(tmp_path: Path) -> None:
    torch.save({"squall": {"algorithm": "sarsa"}}, tmp_path / "a.ckpt")
    with pytest.raises(ConfigurationError, match="unknown algorithm 'sarsa'; there are dqn"):
        load_algorithm(tmp_path / "a.ckpt")


def test_an_unknown_algorithm_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="unknown algorithm 'sarsa'; there are dqn"):
        make_algorithm("sarsa", {})
    assert isinstance(make_algorithm("dqn", {"env": CARTPOLE}), DQN)
