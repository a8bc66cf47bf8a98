"""Tests of requests to a learner from other threads: checkpoints and repeated publications."""

from __future__ import annotations

import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from actors.weights import WeightStore
from learner.checkpoints import LAST, load_algorithm
from learner.learner import LearnerReport
from replay.errors import DeadlineExceeded
from tests.learner.runs import LearnerRun, Pool, eventually, loaded
from tests.learner.toys import clone_parameters, make_push, same


def test_a_checkpoint_is_answered_while_the_learner_waits(waiting: tuple[LearnerRun, Future[LearnerReport]]) -> None:
    run, _ = waiting
    run.learner.note_progress(5, {})
    weights = run.learner.checkpoint("candidate.ckpt", seconds=20.0)
    assert run.files == {"candidate.ckpt"}
    written = load_algorithm(run.folder / "candidate.ckpt")
    assert written.env_steps == 5
    # No update was made since the weights were published: a new version would make on-policy experience stale.
    assert weights.version == 0
    assert run.weights.versions == [0]
    run.learner.checkpoint(seconds=20.0)
    assert run.files == {"candidate.ckpt", LAST}


def test_a_checkpoint_made_while_waiting_can_be_resumed(
    waiting: tuple[LearnerRun, Future[LearnerReport]], tmp_path: Path
) -> None:
    run, _ = waiting
    run.learner.checkpoint("early.ckpt", seconds=20.0)
    second = LearnerRun(tmp_path / "b", updates=48)
    assert second.fit(resume=run.folder / "early.ckpt").updates == 48


def test_a_checkpoint_made_between_two_waits_can_be_resumed(tmp_path: Path, background: Pool) -> None:
    """The checkpoint is made in the middle of an epoch, while the learner waits for a batch."""
    run = LearnerRun(tmp_path / "a", updates=None)
    pushes = (make_push(run.replay.server.spec.table.layout, n) for n in range(3))
    run.replay.pushes = pushes
    fit = background(run.fit)
    try:
        # 8 inserts allow 8 updates, and the limiter's tolerance allows 8 more.
        assert eventually(lambda: run.learner.report().updates == 16 and run.learner.report().state == "waiting")
        run.learner.checkpoint("mid.ckpt", seconds=20.0)
    finally:
        run.learner.stop()
    assert fit.result(20.0).updates == 16
    second = LearnerRun(tmp_path / "b", updates=88, batches_per_epoch=20)
    assert second.fit(resume=tmp_path / "a" / "mid.ckpt").updates == 104


def test_publish_again_sends_the_weights_to_a_new_store(waiting: tuple[LearnerRun, Future[LearnerReport]]) -> None:
    run, _ = waiting
    run.weights.store = WeightStore()
    assert run.learner.publish_again(seconds=20.0) == 1
    assert run.weights.store.report()["version"] == 1


def test_requests_are_answered_between_steps_too(tmp_path: Path, background: Pool) -> None:
    run = LearnerRun(tmp_path, updates=2_000)
    fit = background(run.fit)
    assert eventually(lambda: run.learner.report().updates > 0)
    weights = run.learner.checkpoint("candidate.ckpt", seconds=20.0)
    updates = run.global_step("candidate.ckpt")
    assert 0 < updates < 2_000
    assert updates % 4 == 0
    assert same(loaded(weights), clone_parameters(load_algorithm(tmp_path / "candidate.ckpt").policy))
    run.learner.stop()
    assert fit.result(20.0).state == "stopped"


def test_a_request_that_fails_fails_for_who_asked_alone(waiting: tuple[LearnerRun, Future[LearnerReport]]) -> None:
    run, fit = waiting
    (run.folder / "blocked").write_text("no folder")
    with pytest.raises(OSError, match="blocked"):
        run.learner.checkpoint("blocked/candidate.ckpt", seconds=20.0)
    # No update was made meanwhile: these are the weights that were published at the start.
    assert run.learner.checkpoint("candidate.ckpt", seconds=20.0).version == 0
    assert not fit.done()


def test_a_request_that_nobody_comes_to_times_out(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError):
        LearnerRun(tmp_path).learner.checkpoint(seconds=0.01)


def test_a_request_before_the_fit_is_answered_by_it(tmp_path: Path, background: Pool) -> None:
    run = LearnerRun(tmp_path, updates=40)
    request = background(lambda: run.learner.checkpoint("early.ckpt", seconds=20.0))
    assert eventually(lambda: not run.learner._requests.empty())
    run.fit()
    assert request.result(20.0).version <= 1
    assert run.files == {"early.ckpt", LAST}


@pytest.mark.parametrize("ends", ["done", "stopped", "failed"])
def test_a_request_after_the_end_is_refused_at_once(ends: str, tmp_path: Path) -> None:
    run = LearnerRun(tmp_path, updates=8)
    if ends == "stopped":
        run.learner.stop()
    if ends == "failed":
        run.replay.failure = DeadlineExceeded("waited 300 s for experience")
        with pytest.raises(DeadlineExceeded):
            run.fit()
    else:
        assert run.fit().state == ends
    for request in (run.learner.checkpoint, run.learner.publish_again):
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="the learner is stopping"):
            request()
        assert time.monotonic() - start < 1.0


def test_a_request_that_the_end_overtakes_is_refused(tmp_path: Path, background: Pool) -> None:
    run = LearnerRun(tmp_path)
    run.replay.failure = ValueError("a broken table")
    request = background(lambda: run.learner.checkpoint(seconds=20.0))
    assert eventually(lambda: not run.learner._requests.empty())
    with pytest.raises(ValueError, match="a broken table"):
        run.fit()
    with pytest.raises(RuntimeError, match="the learner has ended"):
        request.result(20.0)
