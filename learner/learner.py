"""Learner: runs a Trainer over an algorithm, publishes its weights, writes and resumes checkpoints.

All state of the fit is touched by one thread only. Others put requests on a queue, which that thread looks at
after each training step and while it waits for data.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import ray
import torch

from actors.weights import Weights, pack
from learner.acceleration import keep_freed_memory, trainer_precision
from learner.checkpoints import LAST, make_algorithm
from replay.client import ReplayClient, TrajectoryClient
from replay.remote import GONE, RemoteActor, actor_class, is_ready
from replay.seeds import integer_seed, spawn_seed

_SECONDS_FOR_STORE = 60.0
_VERSIONS_UNHEARD = 1_000
_SECONDS_BETWEEN_CHECKPOINTS = 30.0
_SECONDS_BEFORE_PUBLISHING_AGAIN = 0.5


@dataclass(frozen=True)
class LearnerSpec:
    """What a `Learner` is made from.

    Attributes:
        algorithm: a name in `ALGORITHMS`.
        hyperparameters: the constructor's arguments, `env` included, as plain values.
        checkpoints: folder of the checkpoints.
        checkpoint_every: updates between step-numbered checkpoints.
        keep_checkpoints: step-numbered checkpoints kept.
        publish_every: updates between published versions of the weights.
        precision: Lightning's name of the precision, or "auto".
        on_gpu: whether it computes on a GPU; None takes one where there is one.
    """

    algorithm: str
    hyperparameters: Mapping[str, Any]
    checkpoints: str
    checkpoint_every: int
    keep_checkpoints: int
    publish_every: int
    precision: str
    on_gpu: bool | None = None

    @property
    def gpu(self) -> bool:
        """Whether a learner in this process computes on a GPU."""
        return torch.cuda.is_available() if self.on_gpu is None else self.on_gpu


@dataclass(frozen=True)
class LearnerReport:
    """What a learner says of itself.

    Attributes:
        pid: of its process.
        node: host it runs on.
        state: "starting", "learning", "waiting", "done" or "stopped".
        updates: updates made in the run, those before a resume included.
        weights_version: published last.
        metrics: what the algorithm logged last.
        seconds_waited: in which it made no updates, because there was no batch.
        waiting_for: what it waits for, or None.
        checkpoint_updates: updates in the newest checkpoint.
        device: where it computes.
    """

    pid: int
    node: str
    state: str
    updates: int
    weights_version: int
    metrics: dict[str, float]
    seconds_waited: float
    waiting_for: str | None
    checkpoint_updates: int
    device: str


class Learner:
    """The learner process: `fit` returns when stopped, or when the replay server has nothing more.

    The other calls may come from another thread meanwhile.
    """

    def __init__(
        self,
        spec: LearnerSpec,
        *,
        replay: ReplayClient | TrajectoryClient,
        weights: RemoteActor,
        threads: int | None = None,
    ) -> None:
        """Make the module.

        Args:
            spec: what to learn.
            replay: where batches come from.
            weights: the weight store.
            threads: PyTorch threads of this process; None leaves them.

        Raises:
            ConfigurationError: the algorithm refuses its hyper-parameters.
        """
        gc.freeze()  # what imports made is not looked through again while updates are made
        keep_freed_memory()
        # Threads that more than one of this process's threads asks for are more than there are cores, and OpenMP's
        # workers then sleep between kernels. So they are for `fit` alone, which Ray runs in a thread of its own.
        self._threads = torch.get_num_threads() if threads is None else threads
        torch.set_num_threads(1)
        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        self.spec = spec
        self._module = make_algorithm(spec.algorithm, spec.hyperparameters)
        self._weights = weights
        self._experience = self._module.make_remote_experience(replay)
        self._experience.while_waiting = self._serve
        self._experience.for_gpu = spec.gpu
        if self._threads == 1:  # with more, they and the workers have the cores
            self._experience.precompute_targets = self._module.precompute_targets
        self._module.experience = self._experience
        self._requests: queue.Queue[tuple[Callable[[], Any], Future[Any]]] = queue.Queue()
        self._trainer: pl.Trainer | None = None
        self._publishing: Any = None
        self._version = -1
        self._published_updates = -1
        self._undelivered: Weights | None = None
        self._deliver_after = self._save_after = 0.0
        self._checkpointed = 0
        self._stop = threading.Event()
        self._state = "starting"

    def fit(self, resume: str | None = None, version: int = -1) -> LearnerReport:
        """Learn until stopped, or until the run's experience is used up; write a last checkpoint.

        Args:
            resume: path of a checkpoint to go on from.
            version: the newest version of the weights that anybody heard of.

        Raises:
            Exception: what the algorithm or the replay server met.
        """
        torch.set_num_threads(self._threads)
        checkpoints = Path(self.spec.checkpoints)
        checkpoints.mkdir(parents=True, exist_ok=True)
        self._version = version
        self._trainer = pl.Trainer(
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="gpu" if self.spec.gpu else "cpu",
            devices=1,
            callbacks=[_LearnerCallback(self)],
            **trainer_precision(self.spec.precision, self._module, gpu=self.spec.gpu),
        )
        try:
            self._trainer.fit(self._module, self._experience, ckpt_path=resume, weights_only=True)
            self.save(checkpoints / LAST)
            self._state = "stopped" if self._stop.is_set() else "done"
        finally:
            self._experience.close()
            self._refuse_requests()
        return self.report()

    # Called by the callback and by the experience, in the thread of `fit`.

    def on_start(self) -> None:
        """Publish the first weights of this learner, numbered after whatever the store holds."""
        # Seeded by the updates made, or a resumed fit would draw the same noise again.
        torch.manual_seed(integer_seed(spawn_seed(self._module.seed, "updates", 0, self._updates)))
        held: dict[str, int] = self._weights.call("report", seconds=_SECONDS_FOR_STORE)
        # Workers refuse what is not newer. A new store knows no version, and the newest heard of may be a little old.
        self._version = max(held["version"], self._version + _VERSIONS_UNHEARD if self._version >= 0 else -1)
        self._checkpointed = self._updates
        self._save_after = time.monotonic() + _SECONDS_BETWEEN_CHECKPOINTS
        self.publish()
        self._state = "learning"

    def on_update(self) -> None:
        """Publish and checkpoint when their updates have come."""
        if self._updates % self.spec.publish_every == 0:
            self.publish()
        if self._updates % self.spec.checkpoint_every == 0:
            self._save_numbered()
        elif time.monotonic() > self._save_after:
            # An on-policy run may make few updates in all; what a death costs is told in seconds.
            self.save(Path(self.spec.checkpoints) / LAST)

    def on_step(self) -> None:
        """Look at what others asked for, and stop if the experience ended or somebody said so."""
        self._serve()
        assert self._trainer is not None
        if self._stop.is_set() or self._experience.finished:
            self._trainer.should_stop = True

    def _serve(self) -> None:
        if self._undelivered is not None and time.monotonic() > self._deliver_after:
            self._deliver(self._undelivered)
        while not self._requests.empty():
            work, answer = self._requests.get()
            try:
                answer.set_result(work())
            except Exception as error:
                answer.set_exception(error)

    def _refuse_requests(self) -> None:
        self._stop.set()
        while not self._requests.empty():
            self._requests.get()[1].set_exception(RuntimeError("the learner has ended"))

    def publish(self) -> Weights:
        """Send the acting module's weights to the store, as a new version."""
        self._version += 1
        weights = pack(self._module.policy, self._version)
        self._deliver(weights)
        self._published_updates = self._updates
        self._experience.published(self._version)
        return weights

    def _deliver(self, weights: Weights) -> None:
        """Send weights to the store; while there is none they are kept, and sent by `_serve`."""
        self._undelivered = None
        try:
            if self._publishing is not None and is_ready(self._publishing):
                ray.get(self._publishing)
        except GONE:
            self._weights.forget()
        try:
            self._publishing = self._weights.later("publish", weights)
        except (*GONE, ValueError):
            # There is no store, or not yet: the coordinator makes one.
            self._weights.forget()
            self._publishing = None
            self._undelivered = weights
            self._deliver_after = time.monotonic() + _SECONDS_BEFORE_PUBLISHING_AGAIN

    def save(self, path: Path) -> None:
        """Write a checkpoint; a reader never sees half of one."""
        assert self._trainer is not None
        temporary = path.with_suffix(".tmp")
        self._trainer.save_checkpoint(temporary)
        os.replace(temporary, path)
        self._checkpointed = self._updates
        if path.name == LAST:
            self._save_after = time.monotonic() + _SECONDS_BETWEEN_CHECKPOINTS

    def _save_numbered(self) -> None:
        checkpoints = Path(self.spec.checkpoints)
        self.save(checkpoints / f"step-{self._updates:010d}.ckpt")
        self.save(checkpoints / LAST)
        for old in sorted(checkpoints.glob("step-*.ckpt"))[: -self.spec.keep_checkpoints]:
            old.unlink(missing_ok=True)

    @property
    def _updates(self) -> int:
        return 0 if self._trainer is None else self._trainer.global_step

    # Called by others, in other threads.

    def _ask(self, work: Callable[[], Any], seconds: float) -> Any:
        answer: Future[Any] = Future()
        if self._stop.is_set():
            raise RuntimeError("the learner is stopping")
        self._requests.put((work, answer))
        return answer.result(seconds)

    def checkpoint(self, name: str = LAST, seconds: float = 60.0) -> Weights:
        """Write a checkpoint now; return the weights in it, which are published as a version.

        Raises:
            TimeoutError: the learner did not come to it in time.
        """

        def work() -> Weights:
            self.save(Path(self.spec.checkpoints) / name)
            # Published again they would be a new version, for which on-policy experience starts anew.
            if self._published_updates == self._updates:
                return pack(self._module.policy, self._version)
            return self.publish()

        weights: Weights = self._ask(work, seconds)
        return weights

    def publish_again(self, seconds: float = 60.0) -> int:
        """Publish now, because the weight store is a new one; return the version."""

        def work() -> Weights:
            # The handle is of the store that died, and takes calls for it without a word.
            self._weights.forget()
            self._publishing = None
            return self.publish()

        weights: Weights = self._ask(work, seconds)
        return weights.version

    def note_progress(self, env_steps: int, progress: dict[str, Any]) -> None:
        """Take note of how far the run is, in plain values, for the checkpoints."""
        self._module.env_steps, self._module.run_progress = env_steps, progress

    def stop(self) -> None:
        """Ask `fit` to write its last checkpoint and return."""
        self._stop.set()
        self._experience.interrupt()

    def report(self) -> LearnerReport:
        """Return what `squall status` shows."""
        waiting = self._experience.waiting_for if self._state == "learning" else None
        return LearnerReport(
            pid=os.getpid(),
            node=socket.gethostname(),
            state="waiting" if waiting else self._state,
            updates=self._updates,
            weights_version=self._version,
            metrics={name: float(value) for name, value in self._module.latest_metrics.items()},
            seconds_waited=self._experience.seconds_waited,
            waiting_for=waiting,
            checkpoint_updates=self._checkpointed,
            device=str(self._module.device),
        )


class _LearnerCallback(pl.Callback):
    """The one place where a fit looks at what others asked for."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._learner.on_start()

    def on_update_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._learner.on_update()

    def on_train_batch_end(self, *_: Any) -> None:
        self._learner.on_step()

    def on_train_epoch_end(self, *_: Any) -> None:
        self._learner.on_step()


LearnerActor = actor_class(Learner, max_concurrency=3)
