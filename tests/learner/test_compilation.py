"""Compiled updates: those of the same program uncompiled, compiled once, whatever the batch says beside its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from learner import DQN, PERDQN, SAC, DoubleDQN, NoisyDQN, NonDistributionalRainbow
from learner.algorithms.off_policy import OffPolicyAlgorithm
from learner.compilation import compile_gradients
from learner.experience import TransitionBatch
from replay.types import ConfigurationError
from tests.learner.toys import CARTPOLE, PENDULUM, Batches, box_batch, copies, quiet_trainer, random_batch

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated. Please switch to `torch.compile`:DeprecationWarning")

SMALL: dict[str, Any] = {"batch_size": 8, "replay_size": 1_000, "warm_start_size": 16, "hidden_sizes": [8]}


class Deaf:
    """An experience that takes priorities and keeps none."""

    def update_priorities(self, ids: Any, priorities: Any) -> None:
        assert len(ids) == len(priorities)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inductor"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def fitted(kind: type[OffPolicyAlgorithm], batches: list[TransitionBatch], **options: Any) -> OffPolicyAlgorithm:
    """Return the algorithm after an update with each of the batches."""
    module = kind(PENDULUM if kind is SAC else CARTPOLE, **{**SMALL, **options})
    module.experience = Deaf()  # type: ignore[assignment]
    quiet_trainer(max_epochs=1).fit(module, Batches(batches))
    assert module.trainer.global_step == len(batches)
    return module


@pytest.mark.parametrize("kind", [DQN, DoubleDQN, PERDQN])
def test_compiled_updates_are_those_of_the_same_program_uncompiled(kind: type[DQN]) -> None:
    batches = [random_batch(8, seed=seed)._replace(size=100 + seed) for seed in range(6)]
    options = {"sync_rate": 2, "learning_rate": 0.01, "max_grad_norm": 0.1}
    plain = fitted(kind, batches, **options)
    compiled = fitted(kind, batches, **options, compile_updates=True)
    for one, other in zip(copies(plain), copies(compiled), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    began = kind(CARTPOLE, **SMALL)
    assert not torch.allclose(copies(compiled)[0], copies(began)[0]), "it has learned"


def test_it_is_compiled_once() -> None:
    module = DQN(CARTPOLE, **SMALL, sync_rate=2, compile_updates=True)
    counted: list[int] = []

    def look(*_: Any) -> None:
        counted.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    module.on_update_end = look  # type: ignore[method-assign]
    torch._dynamo.utils.counters.clear()
    batches = [random_batch(8, seed=seed)._replace(size=100 + seed, copies=seed) for seed in range(6)]
    quiet_trainer(max_epochs=1).fit(module, Batches(batches))
    assert counted == [1] * 6


def test_soft_actor_critic_compiled_moves_every_network_and_the_temperature() -> None:
    batches = [box_batch(8, seed=seed) for seed in range(4)]
    module = fitted(SAC, batches, compile_updates=True, policy_learning_rate=0.01, q_learning_rate=0.01)
    began = SAC(PENDULUM, **SMALL)
    for name, parameter in module.named_parameters():
        assert not torch.equal(parameter, dict(began.named_parameters())[name]), name
    fixed = fitted(SAC, batches, compile_updates=True, learn_alpha=False, init_alpha=0.3)
    assert isinstance(fixed, SAC)
    assert fixed.log_alpha.exp().item() == pytest.approx(0.3)


def test_a_compiled_gradient_of_soft_actor_critic_is_the_uncompiled_one() -> None:
    """Their noise is drawn from other sequences, so it is silenced here."""
    module = SAC(PENDULUM, **SMALL)
    module._draw = lambda observation: module.policy.draw(  # type: ignore[method-assign]
        module.policy(observation), torch.zeros(len(observation), 1)
    )
    learned = [p for group in module.configure_optimizers().param_groups for p in group["params"]]
    gradients, found = compile_gradients(module.objective, learned)(box_batch(8))
    expected = torch.autograd.grad(module.objective(box_batch(8))["loss"], learned)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert set(found) == {"loss", "actor_loss", "critic_loss"}
    assert not found["loss"].requires_grad


@pytest.mark.parametrize("kind", [NoisyDQN, NonDistributionalRainbow])
def test_noise_is_drawn_anew_by_every_compiled_update(kind: type[DQN]) -> None:
    module = kind(CARTPOLE, **SMALL, learning_rate=1e-12, compile_updates=True)
    module.experience = Deaf()  # type: ignore[assignment]
    losses: list[float] = []
    module.on_update_end = lambda: losses.append(float(found[-1]["loss"]))  # type: ignore[method-assign]
    found: list[dict[str, torch.Tensor]] = []
    descend = module.descend
    module.descend = lambda batch: found.append(descend(batch)) or found[-1]  # type: ignore[method-assign, func-returns-value]
    quiet_trainer(max_epochs=1).fit(module, Batches([random_batch(8)] * 4))
    assert len(set(losses)) == 4


def test_it_compiles_in_bfloat16_and_refuses_float16() -> None:
    module = DQN(CARTPOLE, **SMALL, compile_updates=True)
    quiet_trainer(max_epochs=1, precision="bf16-mixed").fit(module, Batches([random_batch(8)] * 2))
    assert module.trainer.global_step == 2


def test_float16_whose_gradients_are_scaled_is_refused() -> None:
    module = DQN(CARTPOLE, **SMALL, compile_updates=True)
    trainer = quiet_trainer(max_epochs=1)
    trainer.strategy.precision_plugin.scaler = torch.amp.GradScaler("cpu")  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match="not in 16-mixed"):
        trainer.fit(module, Batches([random_batch(8)]))


def test_without_a_compiler_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    module = DQN(CARTPOLE, **SMALL, compile_updates=True)
    with pytest.raises(ConfigurationError, match=r"needs a C\+\+ compiler.*InvalidCxxCompiler"):
        quiet_trainer(max_epochs=1).fit(module, Batches([random_batch(8)]))


def test_nothing_is_found_ahead_for_a_compiled_update() -> None:
    batch = random_batch(2, 8)
    assert DQN(CARTPOLE, **SMALL, compile_updates=True).look_ahead(batch) is batch
