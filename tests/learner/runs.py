"""A learner, its replay server, and its weight store in the test's process."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from actors.weights import Weights, WeightStore, unpack
from learner import DQN
from learner.checkpoints import read_checkpoint
from learner.learner import Learner, LearnerReport, LearnerSpec
from replay.server import ReplayServer
from tests.learner.toys import CARTPOLE, InProcessReplay, clone_parameters, make_push

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


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


def loaded(weights: Weights) -> list[torch.Tensor]:
    policy = DQN(**HYPERPARAMETERS).policy_spec.build()
    unpack(weights, policy)
    return clone_parameters(policy)
