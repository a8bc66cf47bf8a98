"""Tests of the common parts of all algorithms: training steps, logging, checkpoints, arguments, tests, statistics."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from torch import Tensor

from actors.environments import DiscreteActions, EnvironmentSpec, SingleEnvironment, specify
from actors.networks import RunningNorm
from actors.weights import pack, unpack
from learner import DQN, SAC, AdvantageActorCritic, Reinforce, VanillaPolicyGradient
from learner.algorithms import ALGORITHMS, Algorithm
from learner.batches import TransitionBatch
from learner.checkpoints import load_algorithm, read_checkpoint
from learner.experience import LocalExperience
from replay.errors import ConfigurationError
from tests.learner.toys import (
    CARTPOLE,
    Batches,
    Chain,
    UpdateWatcher,
    box_batch,
    clone_parameters,
    quiet_trainer,
    random_batch,
    same,
    small,
    small_dqn,
    small_sac,
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


# What is logged.


class Log(DummyLogger):
    """Records the logged metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:  # type: ignore[override]
        self.rows.append((step, metrics))


def test_logged_steps_are_environment_steps_and_returns_are_of_the_last_episodes() -> None:
    log = Log()
    module = small_dqn("SquallTally-v0", warm_start_size=4, batches_per_epoch=60)
    seen: list[tuple[int, int]] = []
    watcher = UpdateWatcher(lambda trainer, module: seen.append((module.experience.env_steps, len(seen))))
    quiet_trainer(watcher, logger=log, log_every_n_steps=1, max_steps=60).fit(module)
    assert [step for step, _ in log.rows] == [steps for steps, _ in seen]
    assert all(np.isfinite(row["train/loss"]) for _, row in log.rows)
    first, last = log.rows[0][1], log.rows[-1][1]
    assert first["rollout/exploration_rate"] == pytest.approx(1.0, abs=1e-3)
    assert last["rollout/ep_rew_mean"] == 15.0
    assert list(module.recent_returns) == [15.0] * (module.env_steps // 3), "each episode is counted once"


def test_between_what_its_logger_takes_a_trainer_is_told_at_an_epochs_ends() -> None:
    log = Log()
    module = small_dqn("SquallTally-v0", warm_start_size=4, batches_per_epoch=10)
    seen: list[tuple[int, float]] = []

    def look(trainer: Any, module: Any) -> None:
        # This is called before the present training step logs: these are the metrics that were logged last.
        seen.append((module.experience.env_steps, float(trainer.callback_metrics.get("step", -1.0))))

    trainer = quiet_trainer(UpdateWatcher(look), logger=log, log_every_n_steps=7, max_steps=28)
    trainer.fit(module)
    steps = [env_steps for env_steps, _ in seen]
    assert [step for step, _ in log.rows] == [steps[6], steps[13], steps[20], steps[27]]
    assert len({row["train/loss"] for _, row in log.rows}) == 4
    expected = [-1.0, *(float(steps[max(due for due in (0, 6, 9, 10, 13, 19, 20) if due <= at)]) for at in range(27))]
    assert [value for _, value in seen] == expected
    assert trainer.callback_metrics["step"] == module.env_steps


def test_a_monitored_metric_is_logged_at_the_end_of_an_epoch_that_was_resumed(tmp_path: Path) -> None:
    trainer = quiet_trainer(max_steps=5)
    trainer.fit(small_dqn("SquallTally-v0", warm_start_size=4, batches_per_epoch=10))
    trainer.save_checkpoint(tmp_path / "middle.ckpt")
    stopping = pl.callbacks.EarlyStopping("return", mode="max", stopping_threshold=10.0, check_on_train_epoch_end=True)
    module = small_dqn("SquallTally-v0", warm_start_size=4, batches_per_epoch=10)
    resumed = quiet_trainer(stopping, max_steps=1000)
    resumed.fit(module, ckpt_path=tmp_path / "middle.ckpt", weights_only=True)
    assert resumed.global_step == 10
    assert resumed.callback_metrics["step"] == module.env_steps


def test_where_a_fit_is_stopped_the_last_metrics_are_logged() -> None:
    log = Log()
    module = small_dqn("SquallTally-v0", warm_start_size=4, batches_per_epoch=100)

    def stop(trainer: Any, module: Any) -> None:
        trainer.should_stop = trainer.global_step == 17

    quiet_trainer(UpdateWatcher(stop), logger=log, log_every_n_steps=5).fit(module)
    assert len(log.rows) == 4
    assert log.rows[-1][0] == module.env_steps


def test_a_trainer_whose_logger_takes_nothing_is_told_at_the_end() -> None:
    log = Log()
    module = small_dqn("SquallTally-v0", warm_start_size=4, batches_per_epoch=10)
    trainer = quiet_trainer(logger=log, log_every_n_steps=0, max_steps=15)
    trainer.fit(module)
    assert not log.rows
    assert trainer.callback_metrics["step"] == module.env_steps


@pytest.mark.parametrize("floor", [-21, -1.5])
def test_before_the_first_episode_the_return_is_the_lowest_there_is(floor: float) -> None:
    log = Log()
    module = small_dqn("SquallTally-v0", warm_start_size=1, segment_length=1, min_episode_reward=floor, batch_size=1)
    quiet_trainer(logger=log, log_every_n_steps=1, max_steps=8).fit(module)
    means = [row["rollout/ep_rew_mean"] for _, row in log.rows]
    assert set(means) == {floor, 15.0}
    assert means == sorted(means), "the first return replaces the floor and is not averaged with it"


# Checkpoints.


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


def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    contents: dict[str, Callable[[Path], Any]] = {
        "missing": lambda path: None,
        "empty": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_text("not a checkpoint"),
        "folder": lambda path: path.mkdir(),
        "other": lambda path: torch.save({"state_dict": {}}, path),
        "list": lambda path: torch.save([1, 2], path),
        "tensor": lambda path: torch.save(torch.zeros(2), path),
        "half": lambda path: path.write_bytes(whole(tmp_path)[:2000]),
    }
    for name, write in contents.items():
        path = tmp_path / f"{name}.ckpt"
        write(path)
        with pytest.raises(ConfigurationError, match=rf"{name}\.ckpt is not a Squall checkpoint"):
            load_algorithm(path)


def whole(folder: Path) -> bytes:
    torch.save({"squall": {"algorithm": "dqn"}, "state_dict": {"weight": torch.zeros(1000)}}, folder / "whole")
    return (folder / "whole").read_bytes()


def test_a_checkpoint_of_another_algorithm_is_refused(tmp_path: Path) -> None:
    torch.save({"squall": {"algorithm": "sarsa"}}, tmp_path / "a.ckpt")
    with pytest.raises(ConfigurationError, match="unknown algorithm 'sarsa'; there are dqn"):
        load_algorithm(tmp_path / "a.ckpt")


# Construction from command line arguments.


def test_arguments_come_back_out_of_a_mixed_namespace() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--accelerator", default="cpu")
    assert DQN.add_model_specific_args(parser) is parser
    parser.add_argument("--max_epochs", type=int, default=3)
    arguments = (
        "--env CartPole-v1 --accelerator gpu --gamma 0.5 --batch_size 9 --min_episode_reward -1.5 --optimizer sgd "
        "--max_grad_norm 3.5 --segment_length 7 --hidden_sizes 31 17 --clip_rewards --eps_ladder --seed 0"
    )
    module = DQN.from_args(parser.parse_args(arguments.split()), learning_rate=0.25)
    changed = {
        "gamma": 0.5, "batch_size": 9, "min_episode_reward": -1.5, "optimizer": "sgd", "max_grad_norm": 3.5,
        "segment_length": 7, "hidden_sizes": [31, 17], "clip_rewards": True, "eps_ladder": True, "seed": 0,
        "learning_rate": 0.25,
    }  # fmt: skip
    assert dict(module.hparams) == {**dict(DQN("CartPole-v1").hparams), **changed}


def test_arguments_default_to_the_constructors() -> None:
    parser = DQN.add_model_specific_args(argparse.ArgumentParser())
    assert dict(DQN.from_args(parser.parse_args(["--env", "CartPole-v1"])).hparams) == dict(DQN("CartPole-v1").hparams)
    assert parser.parse_args(["--env", "x", "--no-clip_rewards"]).clip_rewards is False
    with pytest.raises(SystemExit):
        parser.parse_args(["--env", "CartPole-v1", "--batch_size", "many"])
    with pytest.raises(SystemExit):
        parser.parse_args([])


# Single environments, whole episodes, tests.


@pytest.mark.parametrize("name", ["CartPole-v1", "FrozenLake-v1", "PongNoFrameskip-v4", "SquallTally-v0"])
def test_make_environment_is_one_lane_of_what_workers_step(name: str) -> None:
    spec = specify(name)
    lane, vector = DQN.make_environment(name, seed=0), spec.make(1)
    observation, _ = lane.reset()
    expected = spec.observe(vector.reset(seed=0)[0])
    for step in range(12):
        np.testing.assert_array_equal(observation, expected[0])
        assert np.asarray(observation).dtype == spec.observation_dtype
        observation, reward, terminated, truncated, _ = lane.step(step % 2)
        raw, *others, _ = vector.step(np.array([step % 2]))
        expected = spec.observe(raw)
        assert [reward, terminated, truncated] == [other[0] for other in others]
    lane.close()
    vector.close()


def test_seed_zero_is_a_seed_for_the_first_episode_only() -> None:
    def starts(seed: int | None) -> list[list[float]]:
        lane = DQN.make_environment("CartPole-v1", seed)
        return [lane.reset()[0].tolist() for _ in range(2)]

    assert starts(0) == starts(0)
    assert starts(0) != starts(1)
    assert starts(None) != starts(None)
    assert starts(0)[0] != starts(0)[1]


def right_goer(env: str = "SquallChain-v0", **options: Any) -> DQN:
    """Return a DQN whose greedy action is always 1."""
    module = small_dqn(env, **options)
    with torch.no_grad():
        for parameter in module.q_network.parameters():
            parameter.zero_()
        list(module.q_network.parameters())[-1][1] = 1.0
    return module


def chain_actions(epsilon: float, episodes: int) -> tuple[list[float], list[int]]:
    module = right_goer()
    module.policy.rng = np.random.default_rng(0)
    lane: SingleEnvironment = module.make_environment("SquallChain-v0", seed=0)
    Chain.actions.clear()
    return module.run_n_episodes(lane, episodes, epsilon), list(Chain.actions)


def test_run_n_episodes_with_epsilon_0_is_greedy() -> None:
    returns, actions = chain_actions(0.0, 20)
    assert returns == [1.0] * 20
    assert set(actions) == {1}
    assert 20 < len(actions) <= 80


def test_run_n_episodes_with_epsilon_1_is_random() -> None:
    returns, actions = chain_actions(1.0, 20)
    assert returns == [1.0] * 20
    assert len(actions) > 100
    assert np.mean(actions) == pytest.approx(0.5, abs=0.12)


def test_run_n_episodes_defaults_to_one_random_episode() -> None:
    module = right_goer("CartPole-v1")
    returns = module.run_n_episodes(module.make_environment("CartPole-v1", seed=0))
    assert len(returns) == 1
    assert returns[0] > 11, "with constant actions the pole falls within 10 steps"


def test_run_n_episodes_is_seeded_by_the_algorithms_seed() -> None:
    def play(seed: int) -> list[float]:
        module = small_dqn("CartPole-v1", seed=seed)
        return module.run_n_episodes(module.make_environment("CartPole-v1", seed=0), 5)

    assert play(0) == play(0)
    assert play(0) != play(1)


def test_a_test_is_ten_greedy_episodes() -> None:
    results = quiet_trainer().test(right_goer("SquallTally-v0"), verbose=False)
    assert results == [{"test/mean_reward": 15.0}]
    Chain.actions.clear()
    assert quiet_trainer().test(right_goer(), verbose=False) == [{"test/mean_reward": 1.0}]
    assert set(Chain.actions) == {1}
    test_step = right_goer("CartPole-v1").test_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl.LightningModule, "log", lambda *_, **__: None)
        assert test_step() == test_step()
        assert set(test_step()) == {"test/mean_reward", "test/std_reward"}


def test_a_test_by_itself_leaves_training_as_it_was() -> None:
    module = right_goer("SquallTally-v0")
    before = clone_parameters(module)
    quiet_trainer().test(module, verbose=False)
    assert same(before, clone_parameters(module))
    assert module.training
    quiet_trainer(max_steps=3).fit(module)


# Every algorithm.

EVERY = list(ALGORITHMS.values())
CONTINUOUS: list[type[Algorithm]] = [Reinforce, VanillaPolicyGradient, AdvantageActorCritic, SAC]


@pytest.mark.parametrize("observes", ["image", "vector", "discrete"])
@pytest.mark.parametrize("cls", EVERY)
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


@pytest.mark.parametrize("cls", [cls for cls in EVERY if cls not in CONTINUOUS])
def test_value_based_algorithms_refuse_a_box_by_name(cls: type[Algorithm]) -> None:
    complaint = rf"^{cls.__name__} needs a Discrete action space; SquallToy-v0 has Box\(-2.0, 2.0, \(2,\), float32\)$"
    with pytest.raises(ConfigurationError, match=complaint):
        cls(toy(box=2))


@pytest.mark.parametrize("cls", EVERY)
def test_arguments_of_every_algorithm_come_back_out_of_a_mixed_namespace(cls: type[Algorithm]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    assert cls.add_model_specific_args(parser) is parser
    env = "Pendulum-v1" if cls is SAC else "CartPole-v1"
    rate = next(name for name in ("lr", "learning_rate", "q_learning_rate") if name in cls.hyperparameter_types())
    arguments = [
        "--env", env, "--devices", "2", "--gamma", "0.5", f"--{rate}", "0.25", "--seed", "0", "--normalize_rewards",
        "--optimizer_options", '{"eps": 0.001}', "--activation", "tanh", "--no-normalize_observations",
    ]  # fmt: skip
    module = cls.from_args(parser.parse_args(arguments), num_envs=3)
    changed = {
        "gamma": 0.5, rate: 0.25, "seed": 0, "normalize_rewards": True, "optimizer_options": {"eps": 0.001},
        "activation": "tanh", "num_envs": 3,
    }  # fmt: skip
    assert dict(module.hparams) == {**dict(cls(env).hparams), **changed}
    plain = cls.from_args(parser.parse_args(["--env", env]))
    assert dict(plain.hparams) == dict(cls(env).hparams)


@pytest.mark.parametrize("cls", EVERY)
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


# Gradient clipping, learning rates, the optimizer's options, the activation.


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


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"optimizer_options": {"epsilon": 1e-3}}, "^optimizer_options of adam: .*'epsilon'"),
        ({"optimizer_options": {"eps": -1.0}}, "^optimizer_options of adam: .*-1.0"),
        ({"optimizer_options": {"eps": "small"}}, "^optimizer_options of adam: "),
        ({"optimizer_options": {"lr": 0.5}}, "^optimizer_options must not contain lr"),
        ({"optimizer": "sgd", "optimizer_options": {"eps": 1e-3}}, "^optimizer_options of sgd: .*'eps'"),
        ({"activation": "gelu"}, "^activation must be one of relu, tanh, got 'gelu'$"),
        ({"learning_rate_schedule": "steps"}, "^learning_rate_schedule must be one of constant, .*, got 'steps'$"),
        ({"learning_rate_schedule": "linear"}, "^a linear learning_rate_schedule needs learning_rate_last_frame$"),
        ({"learning_rate_last_frame": 0}, "^learning_rate_last_frame must be positive, got 0$"),
    ],
)
@pytest.mark.parametrize("cls", [DQN, Reinforce])
def test_common_options_that_cannot_work_are_refused(
    cls: type[Algorithm], options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        cls(CARTPOLE, **options)


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


# Running statistics.


@pytest.mark.parametrize("cls", EVERY)
def test_statistics_change_after_the_update_and_are_shared_by_all_networks(cls: type[Algorithm]) -> None:
    module = small(cls, toy(box=2 * (cls is SAC)), normalize_observations=True)
    norms = [layer for layer in module.modules() if isinstance(layer, RunningNorm)]
    assert len(norms) == {SAC: 3}.get(cls, 2 if issubclass(cls, DQN) else 1)  # type: ignore[call-overload]
    seen: list[np.ndarray[Any, Any]] = []
    update = module.update

    def watched(batch: Any) -> dict[str, Tensor]:
        before = [norm.count.item() for norm in norms]
        logged = update(batch)
        assert [norm.count.item() for norm in norms] == before == [sum(map(len, seen))] * len(norms)
        seen.append(batch.visited.numpy().copy())
        return logged

    module.update = watched  # type: ignore[method-assign]
    quiet_trainer(max_steps=3).fit(module)
    visited = np.concatenate(seen).astype(np.float64)
    for norm in norms:
        assert norm.count == len(visited)
        np.testing.assert_allclose(norm.mean.numpy(), visited.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(norm.variance.numpy(), visited.var(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", EVERY)
def test_statistics_travel_with_the_weights(cls: type[Algorithm]) -> None:
    module = small(cls, toy(box=2 * (cls is SAC)), normalize_observations=True)
    quiet_trainer(max_steps=2).fit(module)
    worker = module.policy_spec.build()
    unpack(pack(module.policy, 1), worker)
    observation = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32) * 3
    here, there = (it.eval().act(observation, step=0, greedy=True).action for it in (module.policy, worker))
    np.testing.assert_array_equal(here, there)
    (norm,) = [layer for layer in worker.modules() if isinstance(layer, RunningNorm)]
    assert norm.count > 0
    assert norm.mean.any()


@pytest.mark.parametrize("cls", [DQN, Reinforce, SAC])
def test_without_normalisation_there_are_no_statistics(cls: type[Algorithm]) -> None:
    module = small(cls, toy(box=2 * (cls is SAC)))
    assert not any(isinstance(layer, RunningNorm) for layer in module.modules())


@pytest.mark.parametrize("normalize", [True, False])
def test_rewards_are_divided_by_the_deviation_of_discounted_returns(normalize: bool) -> None:
    """Three rewards of 5 at gamma 1/2 give 5, 7.5, and 8.75; reported returns remain 15."""
    module = small(Reinforce, toy(lengths=(3,), pays=5.0), gamma=0.5, normalize_rewards=normalize, num_batch_episodes=2)
    update, rewards = module.update, []

    def watched(batch: Any) -> dict[str, Tensor]:
        rewards.append(batch.reward)
        return update(batch)

    module.update = watched  # type: ignore[method-assign]
    quiet_trainer(max_steps=3).fit(module)
    expected = 5.0 / np.std([5.0, 7.5, 8.75]) if normalize else 5.0
    assert len(rewards) == 3
    for reward in rewards:
        assert reward.ravel().tolist() == pytest.approx([expected] * 6, rel=1e-5)
    assert list(module.recent_returns) == [15.0] * 6
    assert module.mean_return == 15.0


def test_a_resumed_fit_goes_on_with_the_deviation_it_had(tmp_path: Path) -> None:
    """A new process has seen few returns: until it has seen as many, the old deviation is used."""
    options = {"gamma": 0.5, "normalize_rewards": True, "num_batch_episodes": 2}
    trainer = quiet_trainer(max_steps=4)
    trainer.fit(small(Reinforce, toy(lengths=(3,), pays=5.0), **options))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    module = small(Reinforce, toy(lengths=(3,), pays=50.0), **options)
    deviations = []
    watcher = UpdateWatcher(lambda trainer, module: deviations.append(module.return_std.item()))
    quiet_trainer(watcher, max_steps=10).fit(module, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    deviation = float(np.std([5.0, 7.5, 8.75]))
    assert deviations == pytest.approx([deviation] * 3 + [10 * deviation] * 3, rel=1e-5)


def test_an_algorithm_plays_as_many_greedy_episodes_as_it_is_asked_to() -> None:
    module = small(Reinforce, toy(lengths=(3,), pays=2.0))
    lane = SingleEnvironment(module.environment, seed=0)
    assert module.run_n_episodes(lane) == [6.0]
    assert module.run_n_episodes(lane, 2) == [6.0] * 2
    assert module.run_n_episodes(lane, n_epsiodes=2, n_episodes=3) == [6.0] * 3
    lane.close()
