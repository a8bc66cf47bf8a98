"""Tests of the common parts of all algorithms: counted updates, and one training step of each algorithm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from learner import DQN, SAC, AdvantageActorCritic, Reinforce, VanillaPolicyGradient
from learner.algorithms import Algorithm
from learner.batches import TransitionBatch
from learner.experience import LocalExperience
from replay.errors import ConfigurationError
from tests.learner.toys import (
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

# The Trainer: at which update a run stops, writes checkpoints, and copies its target network.


@pytest.mark.parametrize("k", [1, 32])
def test_max_steps_counts_updates(k: int) -> None:
    module = small_dqn(updates_per_training_step=k)
    steps = count_optimizer_steps(module)
    watcher = UpdateWatcher()
    trainer = quiet_trainer(watcher, max_steps=100)
    trainer.fit(module)
    assert trainer.global_step == len(steps) == 100
    assert watcher.steps == list(range(1, 101))


def count_optimizer_steps(module: DQN) -> list[int]:
    """Return a list that grows by one per step of PyTorch's optimizer."""
    steps: list[int] = []
    configure = module.configure_optimizers

    def configured() -> torch.optim.Optimizer:
        optimizer = configure()
        optimizer.register_step_post_hook(lambda *_: steps.append(len(steps)))
        return optimizer

    module.configure_optimizers = configured  # type: ignore[method-assign]
    return steps


@pytest.mark.parametrize("k", [1, 32])
def test_the_target_network_syncs_every_sync_rate_updates(k: int) -> None:
    module = small_dqn(updates_per_training_step=k, sync_rate=30, learning_rate=0.01)
    online, target = [clone_parameters(module.q_network)], [clone_parameters(module.target_network)]

    def look(trainer: pl.Trainer, module: DQN) -> None:
        online.append(clone_parameters(module.q_network))
        target.append(clone_parameters(module.target_network))

    quiet_trainer(UpdateWatcher(look), max_steps=100).fit(module)
    assert len(target) == 101
    assert not any(same(online[n], online[n + 1]) for n in range(100))
    assert [same(target[n], online[n - n % 30]) for n in range(101)] == [True] * 101


@pytest.mark.parametrize("k", [1, 32])
def test_a_callback_checkpoints_at_exact_updates(k: int, tmp_path: Path) -> None:
    online: dict[int, list[Tensor]] = {}

    def look(trainer: pl.Trainer, module: DQN) -> None:
        if trainer.global_step % 40 == 0:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")
            online[trainer.global_step] = clone_parameters(module)

    quiet_trainer(UpdateWatcher(look), max_steps=100).fit(small_dqn(updates_per_training_step=k, learning_rate=0.01))
    assert {path.stem for path in tmp_path.iterdir()} == {"40", "80"}
    for update, parameters in online.items():
        content = torch.load(tmp_path / f"{update}.ckpt", weights_only=True)
        assert content["global_step"] == update
        assert same(parameters, [content["state_dict"][name] for name, _ in small_dqn().named_parameters()])


def test_an_update_is_the_same_alone_and_among_k() -> None:
    """`[B]`, `[1, B]`, and `[k, B]` give bitwise the same parameters."""
    together = random_batch(4, 16)
    alone = together.split()
    with_one = [batch.map(lambda tensor: tensor[None]) for batch in alone]
    ends = []
    for batches in ([together], alone, with_one):
        module = small_dqn(learning_rate=0.01, sync_rate=3)
        trainer = quiet_trainer(max_steps=4)
        trainer.fit(module, Batches(batches))
        assert trainer.global_step == 4
        ends.append(clone_parameters(module))
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


def test_without_max_steps_an_epoch_is_batches_per_epoch_updates() -> None:
    module = small_dqn(batches_per_epoch=64, updates_per_training_step=32)
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module)
    assert trainer.global_step == 128


@pytest.mark.parametrize(("k", "length"), [(1, 1000), (8, 125), (32, 32)])
def test_a_dataloader_is_an_epoch_of_k_batches_each(k: int, length: int) -> None:
    module = small_dqn(updates_per_training_step=k)
    experience = module.train_dataloader()
    assert isinstance(experience, LocalExperience)
    assert len(experience) == length
    assert module.train_dataloader() is experience


def test_train_batch_generates_without_end() -> None:
    module = small_dqn(batches_per_epoch=2, updates_per_training_step=2)
    batches = module.train_batch()
    batches_made = [next(batches) for _ in range(5)]
    assert {(type(batch), tuple(batch.observation.shape)) for batch in batches_made} == {(TransitionBatch, (2, 8, 4))}


# Every algorithm.

CONTINUOUS: list[type[Algorithm]] = [Reinforce, VanillaPolicyGradient, AdvantageActorCritic, SAC]


@pytest.mark.parametrize("observes", ["image", "vector", "discrete"])
@pytest.mark.parametrize("cls", EVERY_ALGORITHM)
def test_one_training_step_changes_what_learns(cls: type[Algorithm], observes: str) -> None:
    module = small(cls, toy(observes=observes, box=2 * (cls is SAC)))
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module)
    assert trainer.global_step == 1
    changed = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert any(name.startswith("policy.") for name in changed)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    own = {SAC: {"critics.", "target_", "log_alpha"}, AdvantageActorCritic: {"critic."}}.get(cls, set())
    assert all(any(name.startswith(prefix) for name in changed) for prefix in own)


@pytest.mark.parametrize("box", [1, 6])
@pytest.mark.parametrize("cls", CONTINUOUS)
def test_one_training_step_with_actions_in_a_box(cls: type[Algorithm], box: int) -> None:
    module = small(cls, toy(box=box), num_envs=2)
    before = clone_parameters(module.policy)
    seen: list[Any] = []

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch)

    quiet_trainer(Keep(), max_steps=1).fit(module)
    assert not same(before, clone_parameters(module.policy))
    assert seen[0].action.shape[-1] == box
    assert seen[0].action.dtype == torch.float32


@pytest.mark.parametrize("cls", [cls for cls in EVERY_ALGORITHM if cls not in CONTINUOUS])
def test_value_based_algorithms_refuse_a_box_by_name(cls: type[Algorithm]) -> None:
    complaint = rf"^{cls.__name__} needs a Discrete action space; SquallToy-v0 has Box\(-2.0, 2.0, \(2,\), float32\)$"
    with pytest.raises(ConfigurationError, match=complaint):
        cls(toy(box=2))
