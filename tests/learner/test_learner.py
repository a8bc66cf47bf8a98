"""Tests of the learner: ends of a fit, reports, random numbers, threads, and a learner in its own process."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import RayTaskError

import learner.learner
from actors.weights import Weights, WeightStoreActor
from learner import DQN
from learner.checkpoints import LAST, load_algorithm
from learner.learner import LearnerActor, LearnerReport, LearnerSpec
from replay.client import ReplayClient
from replay.errors import DeadlineExceeded
from replay.messages import Push
from replay.remote import RemoteActor
from replay.server import ReplayActor
from tests.learner.runs import HYPERPARAMETERS, LearnerRun, Pool, eventually, loaded
from tests.learner.toys import clone_parameters, make_push, same

# Ends.


def test_stop_ends_a_wait_with_a_last_checkpoint(waiting: tuple[LearnerRun, Future[LearnerReport]]) -> None:
    run, fit = waiting
    start = time.monotonic()
    run.learner.stop()
    report = fit.result(20.0)
    assert time.monotonic() - start < 3.0
    assert report.state == "stopped"
    assert run.files == {LAST}
    assert report.checkpoint_updates == report.updates == 0


def test_stop_ends_learning_with_a_last_checkpoint(tmp_path: Path, background: Pool) -> None:
    run = LearnerRun(tmp_path, updates=100_000)
    fit = background(run.fit)
    assert eventually(lambda: run.learner.report().updates >= 40)
    run.learner.stop()
    report = fit.result(20.0)
    assert report.state == "stopped"
    assert 40 <= report.updates < 100_000
    assert run.global_step(LAST) == report.updates == report.checkpoint_updates


def test_stop_before_the_fit_makes_no_update(tmp_path: Path) -> None:
    run = LearnerRun(tmp_path)
    run.learner.stop()
    report = run.fit()
    assert (report.state, report.updates) == ("stopped", 0)
    assert run.files == {LAST}


def test_what_replay_meets_ends_the_fit_and_its_thread(tmp_path: Path) -> None:
    run = LearnerRun(tmp_path, updates=1_000)
    run.replay.failure = DeadlineExceeded("waited 300 s for experience")
    with pytest.raises(DeadlineExceeded, match="waited 300 s"):
        run.fit()
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
    assert run.files == set(), "a failed fit writes no checkpoint"


def test_what_an_update_meets_ends_the_fit_and_the_thread_that_fetches(tmp_path: Path) -> None:
    run = LearnerRun(tmp_path, updates=1_000)

    def fail(batch: Any) -> None:
        raise FloatingPointError("the loss is NaN")

    run.module.update = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(FloatingPointError):
        run.fit()
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_a_run_that_is_finished_is_done(tmp_path: Path) -> None:
    run = LearnerRun(tmp_path, updates=104)
    report = run.fit()
    assert (report.state, report.updates, report.waiting_for) == ("done", 104, None)
    assert (report.pid, report.device) == (os.getpid(), "cpu")
    assert report.metrics["train/loss"] > 0.0
    assert run.learner._trainer is not None
    assert not run.learner._trainer.callback_metrics, "a learner does not use Lightning's log"


# Reports.


def test_a_report_says_what_is_waited_for(waiting: tuple[LearnerRun, Future[LearnerReport]]) -> None:
    report = waiting[0].learner.report()
    assert (report.state, report.updates, report.metrics) == ("waiting", 0, {})
    assert report.waiting_for == "experience: 0 of the first 16 items inserted"


def test_a_report_before_the_fit(tmp_path: Path) -> None:
    report = LearnerRun(tmp_path).learner.report()
    assert (report.state, report.updates, report.weights_version, report.metrics) == ("starting", 0, -1, {})


def test_reports_can_be_asked_for_at_any_moment(tmp_path: Path, background: Pool) -> None:
    run = LearnerRun(tmp_path, updates=160, publish_every=3)
    over = threading.Event()

    def poll() -> int:
        reports = 0
        while not over.is_set():
            run.learner.report()
            reports += 1
        return reports

    polling = background(poll)
    try:
        run.fit()
    finally:
        over.set()
    assert polling.result(20.0) > 10


# Random numbers and threads.


def noise_of(run: LearnerRun) -> list[float]:
    """Return a list that receives one random number per update of the run's learner."""
    sampled: list[float] = []
    update = run.module.update

    def sampling(batch: Any) -> Any:
        sampled.append(float(torch.rand(())))
        return update(batch)

    run.module.update = sampling  # type: ignore[method-assign]
    return sampled


def test_one_seed_and_the_same_data_give_the_same_weights_and_noise(tmp_path: Path) -> None:
    ends, noises = [], []
    for n, seed in enumerate((0, 0, 1)):
        run = LearnerRun(tmp_path / str(n), updates=24, seed=seed)
        noises.append(noise_of(run))
        torch.manual_seed(n)
        run.fit()
        ends.append(clone_parameters(run.module))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])
    assert noises[0] == noises[1]
    assert not set(noises[0]) & set(noises[2])


def test_a_resumed_learner_draws_noise_of_its_own(tmp_path: Path) -> None:
    first, second = LearnerRun(tmp_path / "a", updates=24), LearnerRun(tmp_path / "b", updates=24)
    noises = [noise_of(first), noise_of(second)]
    first.fit()
    second.fit(resume=tmp_path / "a" / LAST)
    assert not set(noises[0]) & set(noises[1])


def test_threads_are_for_the_fit_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If other threads of the process also had OpenMP threads, there would be more threads than cores."""
    seen: list[int] = []
    monkeypatch.setattr(learner.learner.torch, "set_num_threads", seen.append)
    made = learner.learner.Learner(
        LearnerSpec("dqn", HYPERPARAMETERS, str(tmp_path), 100, 1, 10, "32-true"),
        replay=object(),  # type: ignore[arg-type]
        weights=RemoteActor("nobody"),
        threads=2,
    )
    assert seen == [1]
    monkeypatch.setattr(learner.learner.pl, "Trainer", lambda **_: (_ for _ in ()).throw(RuntimeError("enough")))
    with pytest.raises(RuntimeError, match="enough"):
        made.fit()
    assert seen == [1, 2]


# With a real replay server and weight store on Ray.


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_learner_in_a_process_of_its_own(tmp_path: Path) -> None:
    spec = DQN(**HYPERPARAMETERS).experience_spec()
    names = {role: f"learner-under-test-{os.getpid()}/{role}" for role in ("replay", "weights")}
    replay = ReplayActor.options(name=names["replay"]).remote(spec, run_seed=0)
    weights = WeightStoreActor.options(name=names["weights"]).remote(put=ray.put)
    learner_spec = LearnerSpec("dqn", HYPERPARAMETERS, str(tmp_path), 8, 2, 4, "32-true")
    handle = LearnerActor.remote(
        learner_spec,
        replay=ReplayClient(RemoteActor(names["replay"])),
        weights=RemoteActor(names["weights"]),
        threads=1,
    )
    try:
        fit = handle.fit.remote()
        # One thread waits for data while another serves requests.
        early: Weights = ray.get(handle.checkpoint.remote("early.ckpt"), timeout=60.0)
        assert early.version == 0
        assert same(loaded(early), clone_parameters(load_algorithm(tmp_path / "early.ckpt").policy))
        client = ReplayClient(RemoteActor(names["replay"]), deadline_seconds=30.0)
        for n in range(5):
            reply = client.insert(_push(spec, n))
            assert reply is not None
            assert reply.accepted
        ray.get(replay.finish.remote())
        report: LearnerReport = ray.get(fit, timeout=60.0)
        assert (report.state, report.updates) == ("done", 24)
        assert report.pid != os.getpid()
        assert report.weights_version == 24 // 4
        assert {path.name for path in tmp_path.glob("*.ckpt")} == {
            "early.ckpt", "step-0000000016.ckpt", "step-0000000024.ckpt", LAST,
        }  # fmt: skip
        (reference,) = ray.get(weights.newer_than.remote(-1))
        newest: Weights = ray.get(reference)
        assert newest.version == report.weights_version
        assert same(loaded(newest), clone_parameters(load_algorithm(tmp_path / LAST).policy))
        with pytest.raises(RayTaskError, match="the learner is stopping"):
            ray.get(handle.checkpoint.remote(), timeout=20.0)
    finally:
        for actor in (handle, replay, weights):
            ray.kill(actor)


def _push(spec: Any, sequence: int) -> Push:
    return make_push(spec.table.layout, sequence)
