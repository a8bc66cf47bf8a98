"""Progress of a run that survives a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from replay.server import Counters
from services.supervision import progress as progress_module
from services.supervision.progress import BEST_RETURN, Progress


def test_the_best_score_is_remembered_without_a_last_checkpoint(tmp_path: Path) -> None:
    (tmp_path / BEST_RETURN).write_text(json.dumps({"return_mean": 68.0, "env_steps": 4032}))
    progress = Progress.resumed(tmp_path / "last.ckpt")
    assert (progress.best_return, progress.resume_count, progress.counters.env_steps) == (68.0, 1, 0)


def test_a_run_that_left_nothing_begins_anew(tmp_path: Path) -> None:
    assert Progress.resumed(tmp_path / "last.ckpt") == Progress(resume_count=1)


def test_checkpoints_keep_the_key_of_the_number_of_resumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Earlier versions wrote it as `generation`, and read it there."""
    saved = Progress(Counters(env_steps=7), resume_count=3).plain()
    assert saved["generation"] == 3
    assert "resume_count" not in saved
    monkeypatch.setattr(progress_module, "read_checkpoint", lambda _: {"squall": {"run": saved}})
    (tmp_path / "last.ckpt").touch()
    resumed = Progress.resumed(tmp_path / "last.ckpt")
    assert (resumed.resume_count, resumed.counters.env_steps) == (4, 7)
