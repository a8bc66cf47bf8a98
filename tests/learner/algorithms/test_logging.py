"""Tests of logging: logged steps, mean returns, and the metrics at the end of an epoch or a fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
from pytorch_lightning.loggers.logger import DummyLogger

from tests.learner.toys import UpdateWatcher, quiet_trainer, small_dqn


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
