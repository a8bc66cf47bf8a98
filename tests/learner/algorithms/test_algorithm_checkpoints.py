"""Tests of an algorithm's checkpoints: their content, loaded algorithms, and resumed fits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from actors.environments import DiscreteActions, EnvironmentSpec
from learner import DQN, SAC
from learner.algorithms import Algorithm
from learner.checkpoints import load_algorithm, read_checkpoint
from tests.learner.toys import (
    CARTPOLE,
    EVERY_ALGORITHM,
    Batches,
    UpdateWatcher,
    clone_parameters,
    quiet_trainer,
    random_batch,
    same,
    small,
    small_dqn,
    toy,
)


def test_a_checkpoint_holds_plain_values(tmp_path: Path) -> None:
    module = small_dqn(num_envs=2, seed=0)
    module.run_progress = {"episodes": 3}
    trainer = quiet_trainer(max_steps=50)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["squall"] == {
        "algorithm": "dqn",
        "env_steps": module.env_steps,
        "recent_returns": list(module.recent_returns),
        "returns_seen": 0,
        "run": {"episodes": 3},
    }
    assert module.env_steps > 50
    assert content["hyper_parameters"] == dict(module.hparams)
    assert content["hyper_parameters"]["env"] == CARTPOLE.plain()


OUTSIDE = EnvironmentSpec(None, (4,), "float32", 1, DiscreteActions(2), description="a robot")


@pytest.mark.parametrize("env", ["CartPole-v1", CARTPOLE, OUTSIDE], ids=["id", "specification", "outside"])
def test_a_checkpoint_loads_by_itself(env: str | EnvironmentSpec, tmp_path: Path) -> None:
    module = small_dqn(env, hidden_sizes=(12, 5), learning_rate=0.01, sync_rate=3, gamma=0.5, seed=0)
    trainer = quiet_trainer(max_steps=4)
    trainer.fit(module, Batches([random_batch(16, seed=n) for n in range(4)]))
    module.env_steps = 1234
    module.run_progress = {"best": 1.5}
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for loaded in (
        DQN.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True),
        cast(DQN, load_algorithm(tmp_path / "a.ckpt")),
    ):
        assert same(clone_parameters(loaded), clone_parameters(module))
        assert not same(clone_parameters(loaded.q_network), clone_parameters(loaded.target_network))
        assert dict(loaded.hparams) == dict(module.hparams)
        assert loaded.environment == module.environment
        assert (loaded.env_steps, loaded.run_progress) == (1234, {"best": 1.5})
        assert loaded.policy_spec == module.policy_spec


def test_returns_come_back_once_and_no_more_than_are_kept(tmp_path: Path) -> None:
    module = small_dqn(avg_reward_len=5)
    module.recent_returns.extend([1.0, 2.0, 3.0])
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, Batches([random_batch(8)]))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert list(DQN.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True).recent_returns) == [1.0, 2.0, 3.0]
    module.recent_returns.append(4.0)
    quiet_trainer(max_steps=2).fit(module, Batches([random_batch(8)]), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert list(module.recent_returns) == [1.0, 2.0, 3.0]
    assert module.recent_returns.maxlen == 5


class WithMomentum(DQN):
    """A variant with its own argument."""

    def __init__(self, env: Any, *, momentum: float = 0.5, **options: Any) -> None:
        super().__init__(env, **options)


def test_a_variants_own_arguments_are_kept_too(tmp_path: Path) -> None:
    module = WithMomentum(CARTPOLE, momentum=0.25, gamma=0.5)
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, Batches([random_batch(8)]))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = WithMomentum.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert (loaded.hparams["momentum"], loaded.hparams["gamma"]) == (0.25, 0.5)


@pytest.mark.parametrize("cls", EVERY_ALGORITHM)
def test_a_checkpoint_of_every_algorithm_loads_by_itself(cls: type[Algorithm], tmp_path: Path) -> None:
    module = small(cls, toy(box=2 * (cls is SAC)), normalize_observations=True, normalize_rewards=True, gamma=0.5)
    trainer = quiet_trainer(max_steps=2)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = load_algorithm(tmp_path / "a.ckpt")
    assert type(loaded) is cls
    assert dict(loaded.hparams) == dict(module.hparams)
    assert (loaded.env_steps, loaded._returns_seen) == (module.env_steps, module._returns_seen)
    assert loaded.return_std == module.return_std != 1.0
    state, other = module.state_dict(), loaded.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
    observation = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    greedy = [it.policy.act(observation, step=0, greedy=True).action for it in (module.eval(), loaded.eval())]
    np.testing.assert_array_equal(*greedy)


# Resumed fits.


class StartWatcher(pl.Callback):
    """Records the state at the start of a fit."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.global_step = trainer.global_step
        self.optimizer = copy.deepcopy(trainer.optimizers[0].state_dict())
        self.parameters = clone_parameters(pl_module)


class SaveAtBatchEnd(pl.Callback):
    """Saves at the end of the first training step that reaches 40 updates."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step >= 40 and not self.path.exists():
            trainer.save_checkpoint(self.path)


class SaveAtEpochEnd(SaveAtBatchEnd):
    """Saves at the end of the first epoch that reaches 40 updates."""

    on_train_batch_end = pl.Callback.on_train_batch_end  # type: ignore[assignment]

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        SaveAtBatchEnd.on_train_batch_end(self, trainer)


@pytest.mark.parametrize("k", [1, 32])
@pytest.mark.parametrize("when", ["within a step", "after a step", "after an epoch", "after the fit"])
def test_a_resumed_fit_goes_on_and_stops_at_the_exact_update(when: str, k: int, tmp_path: Path) -> None:
    options = {"updates_per_training_step": k, "batches_per_epoch": 64, "learning_rate": 0.01, "sync_rate": 30}
    path = tmp_path / "a.ckpt"
    callbacks: dict[str, Callable[[], pl.Callback]] = {
        "within a step": lambda: UpdateWatcher(lambda t, m: t.save_checkpoint(path) if t.global_step == 40 else None),
        "after a step": lambda: SaveAtBatchEnd(path),
        "after an epoch": lambda: SaveAtEpochEnd(path),
        "after the fit": lambda: UpdateWatcher(),
    }
    trainer = quiet_trainer(callbacks[when](), max_steps=70)
    trainer.fit(small_dqn(**options))
    if when == "after the fit":
        trainer.save_checkpoint(path)
    saved = read_checkpoint(path)
    resumed_at = {"within a step": 40, "after a step": 40 if k == 1 else 64, "after an epoch": 64, "after the fit": 70}[
        when
    ]
    assert saved["global_step"] == resumed_at

    module = small_dqn(**options)
    start, watcher = StartWatcher(), UpdateWatcher()
    trainer = quiet_trainer(start, watcher, max_steps=150)
    trainer.fit(module, ckpt_path=path, weights_only=True)
    assert start.global_step == resumed_at
    assert same(start.parameters, [saved["state_dict"][name] for name, _ in module.named_parameters()])
    moments = [state["exp_avg"] for state in start.optimizer["state"].values()]
    assert same(moments, [state["exp_avg"] for state in saved["optimizer_states"][0]["state"].values()])
    assert {float(state["step"]) for state in start.optimizer["state"].values()} == {resumed_at}
    assert watcher.steps == list(range(resumed_at + 1, 151))
    assert trainer.global_step == 150
    # One step per update, except for the k updates that the limiter's tolerance allows.
    assert module.env_steps >= saved["squall"]["env_steps"] + 150 - resumed_at - k
    assert module.experience is not None
    assert module.experience.env_steps == module.env_steps  # type: ignore[union-attr]
