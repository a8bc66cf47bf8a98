"""Tests on Ray that no update uses a trajectory older than `max_policy_lag`, measured in the data itself."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from actors.on_policy import OnPolicyActor
from actors.weights import WeightClient, WeightStoreActor
from learner import AdvantageActorCritic
from learner.batches import TrajectoryBatch
from learner.learner import Learner, LearnerSpec
from replay.client import TrajectoryClient
from replay.remote import RemoteActor
from replay.trajectory_server import TrajectoryActor

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

WORKERS, STEPS = 2, 1_200


class Run:
    """A learner in this process, with workers, trajectory queue, and weight store in their own processes."""

    def __init__(self, folder: Path, lag: int) -> None:
        hyperparameters: dict[str, Any] = {
            "env": "CartPole-v1", "batch_size": 32, "unroll_length": 4, "num_envs": 4, "hidden_sizes": (16,),
            "lr": 0.05, "optimizer": "sgd", "max_policy_lag": lag, "normalize_observations": True, "seed": 3,
        }  # fmt: skip
        module = AdvantageActorCritic(**hyperparameters)
        run = f"lag-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        names = {role: RemoteActor(f"{run}/{role}") for role in ("replay", "weights")}
        client = TrajectoryClient(names["replay"], deadline_seconds=60.0)
        self.queue = TrajectoryActor.options(name=names["replay"].name).remote(
            module.experience_spec(), max_env_steps=STEPS
        )
        self.store = WeightStoreActor.options(name=names["weights"].name).remote(put=ray.put)
        spec = LearnerSpec("a2c", hyperparameters, str(folder), 1000, 1, 1, "32-true")
        self.learner = Learner(spec, replay=client, weights=names["weights"])
        self.workers = [
            OnPolicyActor.remote(
                module.rollout_spec(), queue=client, worker=i, workers=WORKERS, incarnation=0,
                weights=WeightClient(names["weights"]), threads=1,
            )
            for i in range(WORKERS)
        ]  # fmt: skip
        self.lags: list[int] = []
        self.differences: list[float] = []

    def train(self) -> None:
        """Train to the end of the run; record each batch's lag and the difference of its log-probabilities."""
        module, update = self.learner._module, self.learner._module.update

        def recorded(batch: TrajectoryBatch) -> dict[str, torch.Tensor]:
            self.lags.append(self.learner._version - batch.version)
            with torch.no_grad():
                output = module.policy(batch.visited)
                now, _ = module.policy.log_probability(output, batch.action[batch.valid])  # type: ignore[operator]
            self.differences.append(float((now - batch.log_probability[batch.valid]).abs().max()))
            return update(batch)

        module.update = recorded  # type: ignore[method-assign]
        running = [worker.run.remote() for worker in self.workers]
        self.report = self.learner.fit()
        ray.get(running, timeout=60)

    def end(self) -> None:
        for actor in (self.queue, self.store, *self.workers):
            ray.kill(actor)


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Run]:
    started = Run(tmp_path, request.param)
    yield started
    started.end()


@pytest.mark.parametrize("run", [0], indirect=True)
def test_with_a_lag_of_0_every_action_is_the_learners_own(run: Run) -> None:
    run.train()
    assert set(run.lags) == {0}
    assert math.isclose(max(run.differences), 0.0, abs_tol=1e-5)
    assert run.report.updates == len(run.lags) > STEPS / 32
    stats = ray.get(run.queue.stats.remote())
    assert stats.counters.samples == stats.counters.env_steps >= STEPS
    assert stats.discarded_steps == 0


@pytest.mark.parametrize("run", [2], indirect=True)
def test_with_a_lag_of_2_some_are_older_and_none_older_than_that(run: Run) -> None:
    run.train()
    assert max(run.lags) in (1, 2)
    assert min(run.lags) >= 0
    # This shows that the test above can fail: weights of an older version give other probabilities.
    assert max(run.differences) > 1e-3
