"""Tests of SAC: the reference page's interface, counted updates, acting, seeds, and checkpoints."""

from __future__ import annotations

import copy
import inspect
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from actors.environments import ContinuousActions, EnvironmentSpec, SingleEnvironment
from learner import SAC
from learner.checkpoints import load_algorithm
from replay.errors import ConfigurationError
from tests.learner.toys import (
    CARTPOLE,
    PENDULUM,
    Batches,
    UpdateWatcher,
    box_batch,
    clone_parameters,
    quiet_trainer,
    same,
    small_sac,
    toy,
)

# As on the reference page, in its order.
REFERENCE = {
    "env": inspect.Parameter.empty,
    "eps_start": 1.0,
    "eps_end": 0.02,
    "eps_last_frame": 150_000,
    "sync_rate": 1,
    "gamma": 0.99,
    "policy_learning_rate": 0.0003,
    "q_learning_rate": 0.0003,
    "target_alpha": 0.005,
    "batch_size": 128,
    "replay_size": 1_000_000,
    "warm_start_size": 10_000,
    "avg_reward_len": 100,
    "min_episode_reward": -21,
    "seed": 123,
    "batches_per_epoch": 10_000,
    "n_steps": 1,
}
METHODS = {
    "add_model_specific_args": ["arg_parser"],
    "forward": ["x"],
    "loss": ["batch"],
    "run_n_episodes": ["env", "n_epsiodes", "n_episodes"],
    "soft_update_target": ["q_net", "target_net"],
    "test_dataloader": [],
    "train_batch": [],
    "train_dataloader": [],
    "training_step": ["batch", "_"],
}


def test_the_constructor_is_the_reference_pages() -> None:
    parameters = inspect.signature(SAC).parameters.values()
    positional = [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(REFERENCE.items())


def test_the_methods_are_the_reference_pages() -> None:
    module = small_sac()
    assert {name: list(inspect.signature(getattr(module, name)).parameters) for name in METHODS} == METHODS
    assert inspect.signature(module.run_n_episodes).parameters["n_epsiodes"].default == 1


@pytest.mark.parametrize(("name", "value"), [("eps_start", 0.5), ("eps_end", 0.1), ("eps_last_frame", 7)])
def test_what_does_nothing_warns_when_it_is_changed_and_only_then(name: str, value: float) -> None:
    with pytest.warns(UserWarning, match=f"^{name} have no effect in SAC: the policy explores by itself"):
        SAC(PENDULUM, **{name: value})  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SAC(PENDULUM, eps_start=1.0, eps_end=0.02, eps_last_frame=150_000, sync_rate=2, gamma=0.5)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"init_alpha": 0}, "^init_alpha must be positive, got 0$"),
        ({"init_alpha": -1}, "^init_alpha must not be negative, got -1$"),
        ({"target_alpha": 1.5}, r"^target_alpha must lie in \[0, 1\], got 1.5$"),
        ({"policy_learning_rate": 0}, "^policy_learning_rate must be positive, got 0$"),
        ({"q_learning_rate": -1}, "^q_learning_rate must be positive, got -1$"),
        ({"replay_size": 200}, "the first sample waits for 10000 transitions, but the replay holds only 200"),
    ],
)
def test_what_cannot_work_is_refused_by_name(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        SAC(PENDULUM, **options)


def test_discrete_actions_and_boxes_without_bounds_are_refused() -> None:
    with pytest.raises(ConfigurationError) as error:
        SAC("CartPole-v1")
    assert str(error.value) == "SAC needs a Box action space; CartPole-v1 has Discrete(2)"
    with pytest.raises(ConfigurationError, match=r"SAC needs a Box action space; CartPole-v1 has DiscreteActions\("):
        SAC(CARTPOLE)
    infinite = EnvironmentSpec(None, (3,), "float32", 1, ContinuousActions((1,), (-np.inf,), (2.0,)))
    with pytest.raises(ConfigurationError, match=r"finite bounds of actions, got low \(-inf,\)"):
        SAC(infinite)


def test_it_trains_and_tests_with_the_pages_defaults() -> None:
    module = SAC("Pendulum-v1", warm_start_size=128)
    trainer = quiet_trainer(max_steps=3)
    trainer.fit(module)
    assert trainer.global_step == 3
    module = small_sac(toy(box=1))
    assert list(quiet_trainer().test(module, verbose=False)[0]) == ["test/mean_reward"]


def test_run_n_episodes_is_greedy_and_either_spelling_will_do() -> None:
    module = small_sac(toy(box=2, lengths=(3,), pays=2.0))
    assert module.run_n_episodes(SingleEnvironment(module.environment)) == [6.0]
    assert module.run_n_episodes(SingleEnvironment(module.environment), 2) == [6.0] * 2
    assert module.run_n_episodes(SingleEnvironment(module.environment), n_epsiodes=2, n_episodes=3) == [6.0] * 3


# Counted updates.


@pytest.mark.parametrize("k", [1, 32])
def test_max_steps_counts_updates(k: int) -> None:
    module = small_sac(updates_per_training_step=k)
    watcher = UpdateWatcher()
    trainer = quiet_trainer(watcher, max_steps=50)
    trainer.fit(module)
    assert trainer.global_step == 50
    assert watcher.steps == list(range(1, 51))


def test_a_training_step_of_k_batches_is_k_counted_updates() -> None:
    batch = box_batch(4, 16)
    ends = []
    for batches in ([batch], batch.split()):
        module = small_sac(seed=0)
        trainer = quiet_trainer(max_epochs=1)
        trainer.fit(module, Batches(batches))
        assert trainer.global_step == 4
        ends.append(clone_parameters(module))
    assert same(*ends)


# Acting, seeds, checkpoints.


def test_the_first_steps_are_drawn_uniformly_and_tests_are_not() -> None:
    module = small_sac(toy(box=6), warm_start_size=16)
    policy = module.policy
    with torch.no_grad():
        policy.head.bias.copy_(torch.tensor([20.0] * 6 + [-20.0] * 6))  # means at the upper bound, minimal deviations
    observation = np.zeros((500, 4), np.float32)
    early = policy.act(observation, step=15).action
    assert early.min() < -1.9
    assert abs(early.mean()) < 0.1
    assert policy.act(observation, step=16).action.min() > 1.0
    assert policy.act(observation, step=0, greedy=True).action.min() > 1.99


def trained(seed: int, **options: Any) -> SAC:
    module = small_sac("Pendulum-v1", seed=seed, num_envs=2, policy_learning_rate=0.01, **options)
    quiet_trainer(max_steps=20).fit(module)
    return module


def test_one_seed_is_one_training_and_zero_is_a_seed() -> None:
    first = trained(0)
    torch.rand(3), np.random.rand(3)  # other users of the global generators
    again = trained(0)
    assert same(clone_parameters(first), clone_parameters(again))
    assert first.env_steps == again.env_steps
    assert not same(clone_parameters(first), clone_parameters(trained(1)))


def test_a_checkpoint_brings_everything_back(tmp_path: Path) -> None:
    module = small_sac(policy_learning_rate=0.01, max_grad_norm=1.0, target_entropy=-0.5)
    trainer = quiet_trainer(max_steps=5)
    trainer.fit(module, Batches([box_batch(16, seed=n) for n in range(5)]))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = cast(SAC, load_algorithm(tmp_path / "a.ckpt"))
    assert same(clone_parameters(loaded), clone_parameters(module))
    assert loaded.log_alpha.item() == module.log_alpha.item() != 0.0
    assert loaded.target_entropy == -0.5
    observation = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    actions = [m.policy.act(observation, step=0, greedy=True).action for m in (module, loaded)]
    np.testing.assert_array_equal(*actions)

    saved = copy.deepcopy(trainer.optimizers[0].state_dict())
    seen: list[Any] = []

    class Start(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append(copy.deepcopy(trainer.optimizers[0].state_dict()))

    other = small_sac(policy_learning_rate=0.01, max_grad_norm=1.0, target_entropy=-0.5, seed=9)
    again = quiet_trainer(Start(), max_steps=7)
    again.fit(other, Batches([box_batch(16, seed=9)]), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert again.global_step == 7
    (restored,) = seen
    assert restored["param_groups"] == saved["param_groups"]
    assert restored["state"].keys() == saved["state"].keys()
    for key, state in saved["state"].items():
        assert same(list(restored["state"][key].values()), list(state.values()))
