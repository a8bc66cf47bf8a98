"""The learner process: runs a Trainer, publishes weights to the weight store, writes and resumes checkpoints.

Only the thread of `fit` accesses the state of the fit. Other threads put requests into a queue, which the thread of
`fit` serves after each training step and while it waits for data.
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

_STORE_DEADLINE_SECONDS = 60.0
_VERSION_GAP = 1_000  # versions that may have been published since the caller's newest known version
_SECONDS_BETWEEN_CHECKPOINTS = 30.0
_PUBLISH_RETRY_SECONDS = 0.5


@dataclass(frozen=True)
class LearnerSpec:
    """The specification of a `Learner`.

    Attributes:
        algorithm: key of `ALGORITHMS`.
        hyperparameters: the algorithm's arguments, including `env`, as plain values.
        checkpoints: folder of the checkpoints.
        checkpoint_every: updates between numbered checkpoints.
        keep_checkpoints: number of numbered checkpoints to keep.
        publish_every: updates between published versions of the weights.
        precision: Lightning's name of the precision, or "auto".
        on_gpu: whether to use a GPU; None uses a GPU if the process has one.
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
        """Whether a learner in this process uses a GPU."""
        return torch.cuda.is_available() if self.on_gpu is None else self.on_gpu


@dataclass(frozen=True)
class LearnerReport:
    """The learner's status report.

    Attributes:
        pid: process ID.
        node: host name.
        state: "starting", "learning", "waiting", "done", or "stopped".
        updates: updates made in the run, including those before a resume.
        weights_version: last published version of the weights.
        metrics: last logged metrics of the algorithm.
        seconds_waited: time spent waiting for batches.
        waiting_for: reason why the learner waits, or None.
        checkpoint_updates: number of updates in the newest checkpoint.
        device: device of the networks.
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
    """Trains an algorithm on experience from a server. `fit` returns at the end of the run, or after `stop`.

    During `fit`, other threads may call `checkpoint`, `publish_again`, `note_progress`, `stop`, and `report`.
    """

    def __init__(
        self,
        spec: LearnerSpec,
        *,
        replay: ReplayClient | TrajectoryClient,
        weights: RemoteActor,
        threads: int | None = None,
    ) -> None:
        """Create the algorithm.

        Args:
            spec: specification of the learner.
            replay: client of the server that provides batches.
            weights: the weight store.
            threads: PyTorch threads of `fit`; None keeps PyTorch's setting.

        Raises:
            ConfigurationError: invalid hyper-parameters.
        """
        gc.freeze()  # so that the garbage collector does not traverse the imported modules during updates
        keep_freed_memory()
        # If several threads of this process had OpenMP threads, there would be more threads than cores, and OpenMP's
        # threads would sleep between kernels. Therefore only `fit`, which Ray runs in its own thread, uses them.
        self._threads = torch.get_num_threads() if threads is None else threads
        torch.set_num_threads(1)
        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        self.spec = spec
        self._module = make_algorithm(spec.algorithm, spec.hyperparameters)
        self._weights = weights
        self._experience = self._module.make_remote_experience(replay)
        self._experience.while_waiting = self._serve
        self._experience.pin_memory = spec.gpu
        if self._threads == 1:  # with more threads, no core is free for the prefetch thread
            self._experience.precompute_targets = self._module.precompute_targets
        self._module.experience = self._experience
        self._requests: queue.Queue[tuple[Callable[[], Any], Future[Any]]] = queue.Queue()
        self._trainer: pl.Trainer | None = None
        self._publishing: Any = None
        self._version = -1
        self._published_updates = -1
        self._unsent: Weights | None = None
        self._send_after = self._save_after = 0.0
        self._checkpointed = 0
        self._stop = threading.Event()
        self._state = "starting"

    def fit(self, resume: str | None = None, version: int = -1) -> LearnerReport:
        """Train until the end of the run or until `stop`, then write the last checkpoint.

        Args:
            resume: path of the checkpoint to resume, or None.
            version: newest version of the weights that the caller knows.

        Raises:
            Exception: an error of the algorithm, or of the server.
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

    # Called by the callback and by the experience, in the thread of `fit`:

    def on_start(self) -> None:
        """Publish this learner's first weights, with a version number higher than the store's."""
        # The number of updates is part of the seed: otherwise a resumed fit would sample the same noise again.
        torch.manual_seed(integer_seed(spawn_seed(self._module.seed, "updates", 0, self._updates)))
        stored: dict[str, int] = self._weights.call("report", seconds=_STORE_DEADLINE_SECONDS)
        # Workers ignore a version that is not newer. A recreated store has no version, and the caller's newest known
        # version may be stale.
        self._version = max(stored["version"], self._version + _VERSION_GAP if self._version >= 0 else -1)
        self._checkpointed = self._updates
        self._save_after = time.monotonic() + _SECONDS_BETWEEN_CHECKPOINTS
        self.publish()
        self._state = "learning"

    def on_update(self) -> None:
        """Publish weights and write checkpoints when they are due after this update."""
        if self._updates % self.spec.publish_every == 0:
            self.publish()
        if self._updates % self.spec.checkpoint_every == 0:
            self._save_numbered()
        elif time.monotonic() > self._save_after:
            # Bound the training time that a failure loses, because an on-policy run may make few updates in total.
            self.save(Path(self.spec.checkpoints) / LAST)

    def on_step(self) -> None:
        """Serve requests, and stop the Trainer after `stop` or at the end of the experience."""
        self._serve()
        assert self._trainer is not None
        if self._stop.is_set() or self._experience.finished:
            self._trainer.should_stop = True

    def _serve(self) -> None:
        """Retry sending weights that could not be sent, and serve the requests of other threads."""
        if self._unsent is not None and time.monotonic() > self._send_after:
            self._send(self._unsent)
        while not self._requests.empty():
            function, future = self._requests.get()
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def _refuse_requests(self) -> None:
        self._stop.set()
        while not self._requests.empty():
            self._requests.get()[1].set_exception(RuntimeError("the learner has ended"))

    def publish(self) -> Weights:
        """Send the acting module's weights to the store as a new version; return them."""
        self._version += 1
        weights = pack(self._module.policy, self._version)
        self._send(weights)
        self._published_updates = self._updates
        self._experience.on_publish(self._version)
        return weights

    def _send(self, weights: Weights) -> None:
        """Send weights to the store. If there is no store, keep them for `_serve`, which tries again."""
        self._unsent = None
        try:
            if self._publishing is not None and is_ready(self._publishing):
                ray.get(self._publishing)
        except GONE:
            self._weights.forget()
        try:
            self._publishing = self._weights.later("publish", weights)
        except (*GONE, ValueError):
            # There is no store until the coordinator recreates it.
            self._weights.forget()
            self._publishing = None
            self._unsent = weights
            self._send_after = time.monotonic() + _PUBLISH_RETRY_SECONDS

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically: `path` never contains an incomplete checkpoint."""
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

    # Called by other threads:

    def _request(self, function: Callable[[], Any], seconds: float) -> Any:
        """Return the result of a function that the thread of `fit` calls, within a deadline in seconds."""
        future: Future[Any] = Future()
        if self._stop.is_set():
            raise RuntimeError("the learner is stopping")
        self._requests.put((function, future))
        return future.result(seconds)

    def checkpoint(self, name: str = LAST, seconds: float = 60.0) -> Weights:
        """Write a checkpoint now; return the weights in it, which are also a published version.

        Raises:
            TimeoutError: the learner did not serve the request within `seconds`.
        """

        def save_and_publish() -> Weights:
            self.save(Path(self.spec.checkpoints) / name)
            # Weights that are already published keep their version: a new version would restart on-policy experience.
            if self._published_updates == self._updates:
                return pack(self._module.policy, self._version)
            return self.publish()

        weights: Weights = self._request(save_and_publish, seconds)
        return weights

    def publish_again(self, seconds: float = 60.0) -> int:
        """Publish now, because the weight store was recreated; return the version."""

        def forget_and_publish() -> Weights:
            # The old handle would accept calls without an error, although its store has exited.
            self._weights.forget()
            self._publishing = None
            return self.publish()

        weights: Weights = self._request(forget_and_publish, seconds)
        return weights.version

    def note_progress(self, env_steps: int, progress: dict[str, Any]) -> None:
        """Store the run's progress, as plain values, for the checkpoints."""
        self._module.env_steps, self._module.run_progress = env_steps, progress

    def stop(self) -> None:
        """Make `fit` write the last checkpoint and return."""
        self._stop.set()
        self._experience.interrupt()

    def report(self) -> LearnerReport:
        """Return the status report, which `squall status` displays."""
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
    """Calls the learner's hooks during a fit."""

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
