"""Tests of the learner: publishing, checkpoints, requests, stops, and resumes. Replay and store run in this process."""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import ray
import torch
from pytorch_lightning.plugins import Precision
from ray.exceptions import ActorDiedError, RayTaskError

import learner.learner
from actors.weights import Weights, WeightStore, WeightStoreActor, unpack
from learner import DQN
from learner.acceleration import BarePrecision, choose_precision
from learner.checkpoints import LAST, load_algorithm, make_algorithm, read_checkpoint
from learner.learner import Learner, LearnerActor, LearnerReport, LearnerSpec
from replay.client import ReplayClient
from replay.errors import ConfigurationError, DeadlineExceeded
from replay.messages import Push
from replay.remote import RemoteActor
from replay.server import ReplayActor, ReplayServer
from replay.types import Moments
from tests.learner.toys import CARTPOLE, InProcessReplay, clone_parameters, make_push, same

HYPERPARAMETERS = {
    "env": CARTPOLE.plain(), "seed": 0, "batch_size": 8, "replay_size": 1_000, "warm_start_size": 16,
    "segment_length": 8, "hidden_sizes": [8], "updates_per_training_step": 4, "batches_per_epoch": 40,
    "learning_rate": 0.01, "sync_rate": 30,
}  # fmt: skip


class Store:
    """A `WeightStore` with the interface of a `RemoteActor`. Records the published weights."""

    def __init__(self, version: int = -1) -> None:
        self.store = WeightStore()
        self.store._version = version
        self.published: list[Weights] = []
        self.failure: Exception | None = None
        self.forgotten = 0
        self.reference: Any = None

    def call(self, method: str, *arguments: Any, seconds: float) -> Any:
        return getattr(self.store, method)(*arguments)

    def later(self, method: str, weights: Weights) -> Any:
        assert method == "publish"
        if self.failure is not None:
            raise self.failure
        assert self.store.publish(weights) == weights.version
        self.published.append(weights)
        return self.reference

    def forget(self) -> None:
        self.forgotten += 1

    @property
    def versions(self) -> list[int]:
        return [weights.version for weights in self.published]


class LearnerRun:
    """A learner with its replay server and weight store. There is data for `updates` updates, or none if it is None."""

    def __init__(
        self, folder: Path, updates: int | None = 104, version: int = -1, threads: int = 1, **options: Any
    ) -> None:
        keys = {"checkpoint_every": 10_000, "keep_checkpoints": 3, "publish_every": 10_000}
        keys = {key: options.pop(key, default) for key, default in keys.items()}
        hyperparameters = {**HYPERPARAMETERS, **options}
        spec = DQN(**hyperparameters).experience_spec()
        # Each insert after the first 16 allows one update on 8 samples; a push has 8 inserts.
        assert updates is None or updates % 8 == 0
        server = ReplayServer(spec, run_seed=0, max_env_steps=None if updates is None else 16 + updates)
        pushes = (make_push(spec.table.layout, n) for n in itertools.count())
        self.replay = InProcessReplay(server, pushes if updates is not None else None)
        self.weights = Store(version)
        self.folder = folder
        self.learner = Learner(
            LearnerSpec("dqn", hyperparameters, str(folder), precision="32-true", **keys),
            replay=self.replay,  # type: ignore[arg-type]
            weights=self.weights,  # type: ignore[arg-type]
            threads=threads,
        )
        self.module = self.learner._module

    def fit(self, resume: Path | None = None) -> LearnerReport:
        return self.learner.fit(None if resume is None else str(resume))

    def global_step(self, name: str) -> int:
        return int(read_checkpoint(self.folder / name)["global_step"])

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


Pool = Callable[[Callable[[], Any]], "Future[Any]"]


@pytest.fixture
def background() -> Iterator[Pool]:
    """Yield a function that runs another in a thread; at the end of the test, wait for all threads."""
    with ThreadPoolExecutor(8) as pool:
        yield lambda function: pool.submit(function)


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


@pytest.fixture
def waiting(tmp_path: Path, background: Pool) -> Iterator[tuple[LearnerRun, Future[LearnerReport]]]:
    """A learner during its fit, whose replay is empty."""
    run = LearnerRun(tmp_path, updates=None)
    fit = background(run.fit)
    try:
        assert eventually(lambda: run.learner.report().state == "waiting" or fit.done())
        yield run, fit
    finally:
        run.learner.stop()


# Publishing.


def loaded(weights: Weights) -> list[torch.Tensor]:
    policy = DQN(**HYPERPARAMETERS).policy_spec.build()
    unpack(weights, policy)
    return clone_parameters(policy)


def test_the_first_weights_are_version_0_and_the_initial_ones(tmp_path: Path) -> None:
    run = LearnerRun(tmp_path, updates=8)
    initial = clone_parameters(run.module.policy)
    run.fit()
    assert run.weights.versions == [0]
    assert same(loaded(run.weights.published[0]), initial)
    assert not same(loaded(run.weights.published[0]), clone_parameters(run.module.policy))


def test_weights_are_published_every_so_many_updates(tmp_path: Path) -> None:
    run = LearnerRun(tmp_path, updates=104, publish_every=25)
    at: list[tuple[int, list[torch.Tensor]]] = []
    later = run.weights.later

    def watched(method: str, weights: Weights) -> Any:
        at.append((run.learner._updates, clone_parameters(run.module.policy)))
        return later(method, weights)

    run.weights.later = watched  # type: ignore[method-assign]
    report = run.fit()
    assert [updates for updates, _ in at] == [0, 25, 50, 75, 100]
    assert run.weights.versions == [0, 1, 2, 3, 4]
    assert report.weights_version == 4
    for weights, (_, parameters) in zip(run.weights.published, at, strict=True):
        assert same(loaded(weights), parameters)


def test_versions_go_on_from_what_the_store_holds(tmp_path: Path) -> None:
    run = LearnerRun(tmp_path, updates=8, version=41, publish_every=4)
    run.fit()
    assert run.weights.versions == [42, 43, 44]


def test_a_new_store_beside_a_new_learner_gets_versions_that_workers_take_for_newer(tmp_path: Path) -> None:
    run = LearnerRun(tmp_path, updates=8, version=-1, publish_every=4)
    run.learner.fit(None, 270)
    assert run.weights.versions[0] > 270
    assert run.weights.versions == sorted(set(run.weights.versions))


@pytest.mark.parametrize("error", [ValueError("no actor of that name"), ActorDiedError()])
def test_a_store_that_is_gone_stops_nobody(error: Exception, tmp_path: Path) -> None:
    run = LearnerRun(tmp_path, updates=40, publish_every=10)
    run.weights.failure = error
    assert run.fit().updates == 40
    assert run.weights.forgotten == 5
    assert run.weights.versions == []


def test_a_publication_that_failed_on_its_way_is_noticed_at_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = LearnerRun(tmp_path, updates=40, publish_every=10)
    run.weights.reference = "in flight"
    outcomes = iter([ActorDiedError(), None, None, None])

    def get(reference: Any) -> None:
        assert reference == "in flight"
        outcome = next(outcomes)
        if outcome is not None:
            raise outcome

    monkeypatch.setattr(learner.learner, "is_ready", lambda reference: True)
    monkeypatch.setattr(learner.learner.ray, "get", get)
    run.fit()
    assert run.weights.forgotten == 1
    assert run.weights.versions == [0, 1, 2, 3, 4], "later versions go to the new store"


def test_a_slow_store_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = LearnerRun(tmp_path, updates=8, publish_every=2)
    run.weights.reference = "in flight"
    monkeypatch.setattr(learner.learner, "is_ready", lambda reference: False)
    monkeypatch.setattr(learner.learner.ray, "get", lambda reference: pytest.fail("the learner waited"))
    run.fit()
    assert run.weights.versions == [0, 1, 2, 3, 4]


# Checkpoints.


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


def test_weights_are_kept_while_there_is_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner.learner, "_PUBLISH_RETRY_SECONDS", 0.0)
    run = LearnerRun(tmp_path, updates=16)
    run.weights.failure = ValueError("no actor of that name")
    serve = run.learner._serve

    def serve_and_recover() -> None:
        serve()
        run.weights.failure = None

    monkeypatch.setattr(run.learner, "_serve", serve_and_recover)
    run.fit()
    # There was no store for the first version, which was sent as soon as there was one.
    assert run.weights.versions[0] == 0


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


# Requests from other threads.


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


# Random numbers, precision, and precomputed targets.


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


def test_an_unknown_algorithm_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="unknown algorithm 'sarsa'; there are dqn"):
        make_algorithm("sarsa", {})
    assert isinstance(make_algorithm("dqn", {"env": CARTPOLE}), DQN)


@pytest.mark.parametrize(
    ("cuda", "bf16", "amx", "avx512", "chosen"),
    [
        (True, True, False, False, "bf16-mixed"),
        (True, False, True, True, "32-true"),
        (False, False, True, False, "bf16-mixed"),
        (False, False, False, True, "bf16-mixed"),
        (False, True, False, False, "32-true"),
    ],
)
def test_precision_is_chosen_for_the_hardware(
    cuda: bool, bf16: bool, amx: bool, avx512: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 and not including_emulation)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert choose_precision("auto", images=True) == chosen
    assert choose_precision("auto", images=False) == "32-true"
    assert choose_precision("16-mixed", images=False) == "16-mixed"


def test_single_precision_without_hooks_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare, hooked = LearnerRun(tmp_path / "bare", max_grad_norm=0.1), LearnerRun(tmp_path / "hooked", max_grad_norm=0.1)
    bare.fit()
    monkeypatch.setattr("learner.learner.trainer_precision", lambda *_, **__: {"precision": "32-true"})
    hooked.fit()
    assert [type(run.learner._trainer.precision_plugin) for run in (bare, hooked)] == [BarePrecision, Precision]  # type: ignore[union-attr]
    assert bare.global_step(LAST) == hooked.global_step(LAST) == 104
    assert same(*(list(run.module.policy.parameters()) for run in (bare, hooked)))
    assert not same(*(list(module.policy.parameters()) for module in (bare.module, DQN(**HYPERPARAMETERS))))


def test_single_precision_without_hooks_calls_a_closure_before_the_optimizer() -> None:
    called: list[str] = []

    class Optimizer:
        def step(self, **options: Any) -> str:
            called.append(f"step {options}")
            return "done"

    done = BarePrecision().optimizer_step(Optimizer(), pl.LightningModule(), lambda: called.append("closure"), lr=2)
    assert (done, called) == ("done", ["closure", "step {'lr': 2}"])


def test_a_learner_that_precomputes_targets_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = LearnerRun(tmp_path / "ahead")
    plain = LearnerRun(tmp_path / "plain", threads=2)  # with two threads, targets are not precomputed
    precomputed: dict[str, list[bool]] = {"ahead": [], "plain": []}
    for name, run in (("ahead", ahead), ("plain", plain)):
        values = run.module.target_values

        def counted(batch: Any, name: str = name, values: Any = values, module: Any = run.module) -> Any:
            valid = batch.target_values_ahead is not None and batch.target_syncs == module._target_syncs
            precomputed[name].append(valid)
            return values(batch)

        monkeypatch.setattr(run.module, "target_values", counted)
        run.fit()
    assert len(precomputed["ahead"]) == len(precomputed["plain"]) == 104
    # The network is copied 3 times, every 30 updates. Each copy makes the values of at most 3 calls of 4 batches stale:
    # those of the present call and of two prefetched calls.
    assert sum(precomputed["ahead"]) >= 104 - 3 * 12
    assert not any(precomputed["plain"])
    assert same(*(list(run.module.policy.parameters()) for run in (ahead, plain)))


@pytest.mark.parametrize("hook", ["on_before_backward", "on_after_backward", "on_before_optimizer_step"])
def test_a_module_that_listens_to_a_hook_hears_of_every_update(
    hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called_at: list[int] = []
    monkeypatch.setattr(DQN, hook, lambda self, *_: called_at.append(self.global_step), raising=False)
    LearnerRun(tmp_path, updates=24).fit()
    assert called_at == list(range(24))


def test_bfloat16_learns_too(tmp_path: Path) -> None:
    run = LearnerRun(tmp_path, updates=8)
    before = clone_parameters(run.module.policy)
    spec = LearnerSpec("dqn", HYPERPARAMETERS, str(tmp_path), 100, 1, 100, "bf16-mixed")
    half = Learner(spec, replay=run.replay, weights=Store())  # type: ignore[arg-type]
    assert half.fit().updates == 8
    after = clone_parameters(half._module.policy)
    assert {parameter.dtype for parameter in after} == {torch.float32}
    assert not same(before, after)


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


FAULTS = """
import resource
import torch
from learner.learner import keep_freed_memory

torch.set_num_threads(1)
keep_freed_memory()

def update():
    activations = [torch.ones(2**20) for _ in range(8)]  # 4 MiB each; allocated and freed together

for _ in range(20):
    update()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    update()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 50)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_memory_that_an_update_frees_is_there_for_the_next() -> None:
    """Without `keep_freed_memory` there are nearly always 7,000 faults or more, but sometimes none."""
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
        assert float(done.stdout) < 50


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
