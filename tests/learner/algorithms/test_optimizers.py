"""Tests of an algorithm's optimizer: gradient clipping, learning rates, and options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from learner import DQN, SAC, AdvantageActorCritic
from learner.algorithms import Algorithm
from learner.checkpoints import read_checkpoint
from tests.learner.toys import Batches, UpdateWatcher, box_batch, quiet_trainer, small, small_dqn, small_sac, toy


@pytest.mark.parametrize("longest", [None, 0.01])
def test_each_group_of_the_optimizer_is_clipped_by_itself(longest: float | None) -> None:
    """With a learning rate of 1, the step of SGD equals the clipped gradient."""
    rates = {"policy_learning_rate": 1.0, "q_learning_rate": 1.0}
    module = small_sac(optimizer="sgd", max_grad_norm=longest, init_alpha=5.0, sync_rate=99, **rates)
    parts = [list(module.policy.parameters()), list(module.critics.parameters()), [module.log_alpha]]
    before = [[p.detach().clone() for p in part] for part in parts]
    quiet_trainer(max_steps=1).fit(module, Batches([box_batch(64)]))
    lengths = [
        torch.cat([(new.detach() - old).ravel() for new, old in zip(part, olds, strict=True)]).norm().item()
        for part, olds in zip(parts, before, strict=True)
    ]
    if longest is None:
        assert min(lengths) > 0.1
    else:
        assert lengths == pytest.approx([longest] * 3, rel=1e-3)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("linear", lambda step: max(1 - step / 100, 0.0)),
        ("cosine", lambda step: (1 + np.cos(np.pi * min(step / 100, 1.0))) / 2),
        ("constant", lambda step: 1.0),
    ],
)
def test_the_learning_rate_follows_the_environment_steps(schedule: str, factor: Callable[[int], float], k: int) -> None:
    """The schedule counts all steps before the update, including the warm start."""
    module = small_dqn(
        "SquallTally-v0", learning_rate=0.1, learning_rate_schedule=schedule, learning_rate_last_frame=100,
        updates_per_training_step=k, num_envs=2,
    )  # fmt: skip
    seen: list[tuple[int, float]] = []
    watcher = UpdateWatcher(lambda t, m: seen.append((m.experience.env_steps, t.optimizers[0].param_groups[0]["lr"])))
    quiet_trainer(watcher, max_steps=120).fit(module)
    assert [rate for _, rate in seen] == pytest.approx([0.1 * factor(step) for step, _ in seen], abs=1e-12)
    assert 16 <= seen[0][0] < 40
    assert seen[-1][0] > 100
    assert len({step for step, _ in seen}) > 10


def test_without_a_last_frame_the_learning_rate_is_constant() -> None:
    seen = set()
    watcher = UpdateWatcher(lambda t, m: seen.add(t.optimizers[0].param_groups[0]["lr"]))
    quiet_trainer(watcher, max_steps=5).fit(small_dqn(learning_rate=0.125))
    assert seen == {0.125}


def test_a_resumed_fit_keeps_the_first_learning_rate(tmp_path: Path) -> None:
    """A resumed schedule starts from the initial rate, not from the reduced rate in the checkpoint."""
    options = {"learning_rate": 0.1, "learning_rate_schedule": "linear", "learning_rate_last_frame": 200}
    trainer = quiet_trainer(max_steps=60)
    trainer.fit(small_dqn("SquallTally-v0", **options))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    groups = read_checkpoint(tmp_path / "a.ckpt")["optimizer_states"][0]["param_groups"]
    assert [group["initial_lr"] for group in groups] == [0.1]
    assert groups[0]["lr"] < 0.08
    seen: list[tuple[int, float]] = []
    watcher = UpdateWatcher(lambda t, m: seen.append((m.env_steps, t.optimizers[0].param_groups[0]["lr"])))
    again = quiet_trainer(watcher, max_steps=80)
    again.fit(small_dqn("SquallTally-v0", **options), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert seen[0][0] >= 60
    assert [rate for _, rate in seen] == pytest.approx([0.1 * (1 - step / 200) for step, _ in seen], abs=1e-12)


@pytest.mark.parametrize("cls", [DQN, SAC, AdvantageActorCritic])
def test_options_reach_the_optimizer_and_the_activation_the_networks(cls: type[Algorithm]) -> None:
    module = small(cls, toy(box=2 * (cls is SAC)), optimizer_options={"eps": 1e-3}, activation="tanh")
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    assert {group["eps"] for group in optimizer.param_groups} == {1e-3}
    kinds = [type(layer) for layer in module.modules()]
    assert torch.nn.Tanh in kinds
    assert torch.nn.ReLU not in kinds
    assert module.policy_spec.activation == "tanh"
