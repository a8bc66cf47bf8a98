"""Tests of running statistics: normalized observations and normalized rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from actors.networks import RunningNorm
from actors.weights import pack, unpack
from learner import DQN, SAC, Reinforce
from learner.algorithms import Algorithm
from tests.learner.toys import EVERY_ALGORITHM, UpdateWatcher, quiet_trainer, small, toy


@pytest.mark.parametrize("cls", EVERY_ALGORITHM)
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


@pytest.mark.parametrize("cls", EVERY_ALGORITHM)
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
