"""Tests of compiled updates: results equal to uncompiled updates, one compilation, gradients, and errors."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner import DQN, PERDQN, SAC, DoubleDQN, DuelingDQN, NoisyDQN, NonDistributionalRainbow
from learner.algorithms.off_policy import OffPolicyAlgorithm
from learner.batches import TransitionBatch
from learner.compilation import compile_backward, find_compiler
from replay.errors import ConfigurationError
from tests.learner.toys import (
    CARTPOLE,
    PENDULUM,
    Batches,
    box_batch,
    clone_parameters,
    quiet_trainer,
    random_batch,
    small,
    toy,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated. Please switch to `torch.compile`:DeprecationWarning"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler"),
]


class PriorityRecorder:
    """An experience that records the priorities it receives."""

    def __init__(self) -> None:
        self.sent: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []

    def update_priorities(self, ids: Any, priorities: Any) -> None:
        self.sent.append((ids, priorities))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inductor"))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=False), torch._inductor.config.patch(compile_threads=2):
        yield  # the patch restores the settings that `compile_backward` changes
    torch._dynamo.reset()


def sampled(*shape: int, seed: int = 0) -> TransitionBatch:
    """Return a batch with the fields that a table sets: size, probabilities, and ids."""
    rng = torch.Generator().manual_seed(seed)
    batch = random_batch(*shape, seed=seed)
    probability = torch.rand(*shape, generator=rng) / 100 + 1e-3
    return batch._replace(
        size=100 + seed, target_syncs=seed, probability=probability, ids=torch.arange(shape[-1]) + seed
    )


def fitted(
    module: OffPolicyAlgorithm, batches: list[TransitionBatch], look: Callable[[], None] | None = None, **trainer: Any
) -> PriorityRecorder:
    """Make one update per batch; return the recorded priorities."""
    module.experience = recorder = PriorityRecorder()  # type: ignore[assignment]

    def count() -> None:
        module.env_steps += 10
        if look is not None:
            look()

    module.on_update_end = count  # type: ignore[method-assign]
    quiet_trainer(max_epochs=1, **trainer).fit(module, Batches(batches))
    assert module.trainer.global_step == len(batches)
    return recorder


@pytest.mark.parametrize("kind", [DQN, DoubleDQN, DuelingDQN, PERDQN])
def test_compiled_updates_are_those_of_the_same_program_uncompiled(kind: type[DQN]) -> None:
    batches = [sampled(8, seed=seed) for seed in range(6)]
    options = {"sync_rate": 2, "learning_rate": 0.1, "max_grad_norm": 0.5, "optimizer": "sgd"}
    if kind is PERDQN:
        options["beta_last_frame"] = 50
    plain, compiled = (small(kind, CARTPOLE, compile_updates=yes, **options) for yes in (False, True))
    began = clone_parameters(plain)
    expected, sent = fitted(plain, batches).sent, fitted(compiled, batches).sent
    for first, one, other in zip(began, clone_parameters(plain), clone_parameters(compiled), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(first, other), "the parameters changed"
    assert len(expected) == (6 if kind is PERDQN else 0)
    for (ids, priorities), (same_ids, same_priorities) in zip(expected, sent, strict=True):
        assert ids.tolist() == same_ids.tolist()
        np.testing.assert_allclose(priorities, same_priorities, rtol=1e-4)


@pytest.mark.parametrize("kind", [DQN, pytest.param(NonDistributionalRainbow, marks=pytest.mark.long), SAC])
def test_it_is_compiled_once(kind: type[OffPolicyAlgorithm]) -> None:
    """Counters in the batch, beta, and an evaluation between two updates do not cause a recompilation."""
    box = kind is SAC
    module = small(kind, PENDULUM if box else CARTPOLE, sync_rate=2, compile_updates=True)
    batches = [
        (box_batch if box else random_batch)(8, seed=seed)._replace(size=seed, target_syncs=seed) for seed in range(6)
    ]
    counted: list[int] = []

    def look() -> None:
        counted.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        module.greedy_action(np.zeros(module.environment.observation_shape, np.float32))

    torch._dynamo.utils.counters.clear()
    fitted(module, batches, look)
    assert counted == [1] * 6


@pytest.mark.parametrize("learn_alpha", [True, False])
def test_soft_actor_critic_compiled_moves_what_it_trains(learn_alpha: bool) -> None:
    module = small(SAC, PENDULUM, compile_updates=True, learn_alpha=learn_alpha)
    began = dict(copy.deepcopy(module).named_parameters())
    fitted(module, [box_batch(8, seed=seed) for seed in range(4)])
    moved = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, began[name])}
    assert moved == set(began) - (set() if learn_alpha else {"log_alpha"})


def test_a_compiled_gradient_of_soft_actor_critic_is_the_uncompiled_one() -> None:
    """Compiled and uncompiled noise come from different random sequences, so the noise is 0 here."""
    module, batch = small(SAC, PENDULUM), box_batch(8)
    module._sample_action = lambda observation: module.policy.draw(  # type: ignore[method-assign]
        module.policy(observation), torch.zeros(len(observation), 1)
    )
    learned = [p for group in module.configure_optimizers().param_groups for p in group["params"]]
    expected = torch.autograd.grad(module.losses(batch)["loss"], learned)
    results = compile_backward(module.losses, learned)(batch)
    for parameter, gradient in zip(learned, expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert set(results) == {"loss", "actor_loss", "critic_loss"}
    assert not results["loss"].requires_grad


@pytest.mark.parametrize("observes", [pytest.param("image", marks=pytest.mark.long), "discrete"])
def test_gradients_lie_in_memory_as_their_parameters(observes: str) -> None:
    """A fused optimizer reads both in memory order, which would differ for channels-last images."""
    environment = toy(observes=observes)
    generator = torch.Generator().manual_seed(0)
    shape = (4, *environment.observation_shape)

    def observation() -> torch.Tensor:
        if observes == "image":
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return torch.randint(0, 5, shape, generator=generator)

    batch = random_batch(4)._replace(observation=observation(), next_observation=observation())
    options = {"batch_size": 4, "learning_rate": 0.1, "optimizer": "sgd"}
    plain, compiled = (small(DQN, environment, compile_updates=yes, **options) for yes in (False, True))
    strides: list[bool] = []

    def look() -> None:
        strides.extend(p.grad is not None and p.grad.stride() == p.stride() for p in compiled.q_network.parameters())

    fitted(plain, [batch] * 2)
    fitted(compiled, [batch] * 2, look)
    assert strides
    assert all(strides)
    for one, other in zip(clone_parameters(plain), clone_parameters(compiled), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_running_statistics_are_updated_between_compiled_updates() -> None:
    batches = [random_batch(8, seed=seed) for seed in range(4)]
    options = {"normalize_observations": True, "learning_rate": 0.1, "optimizer": "sgd"}
    plain, compiled = (small(DQN, CARTPOLE, compile_updates=yes, **options) for yes in (False, True))
    fitted(plain, batches)
    fitted(compiled, batches)
    for name, one in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [NoisyDQN, pytest.param(NonDistributionalRainbow, marks=pytest.mark.long)])
def test_noise_is_drawn_anew_by_every_compiled_update(kind: type[DQN]) -> None:
    module = small(kind, CARTPOLE, learning_rate=1e-12, compile_updates=True)
    losses: list[float] = []
    minimize_losses = module.minimize_losses

    def watched(batch: TransitionBatch) -> dict[str, torch.Tensor]:
        results = minimize_losses(batch)
        losses.append(results["loss"].item())
        return results

    module.minimize_losses = watched  # type: ignore[method-assign]
    fitted(module, [random_batch(8)] * 4)
    assert len(set(losses)) == 4


@pytest.mark.long
def test_bfloat16_compiled_is_bfloat16_uncompiled() -> None:
    batches = [random_batch(8, seed=seed) for seed in range(2)]
    options = {"learning_rate": 0.1, "optimizer": "sgd", "hidden_sizes": [64]}
    ends = {}
    for precision in ("32-true", "bf16-mixed"):
        for compiled in (False, True):
            module = small(DQN, CARTPOLE, compile_updates=compiled, **options)
            fitted(module, batches, precision=precision)
            ends[precision, compiled] = torch.cat(
                [parameter.flatten() for parameter in clone_parameters(module.q_network)]
            )
    apart = (ends["bf16-mixed", False] - ends["32-true", False]).norm()
    assert apart > 0
    assert (ends["bf16-mixed", False] - ends["bf16-mixed", True]).norm() < apart


def test_a_copy_compiles_for_itself() -> None:
    """A compiled program stores gradients in the parameters of the module that it was compiled for."""
    module = small(DQN, CARTPOLE, compile_updates=True, learning_rate=0.1)
    fitted(module, [random_batch(8)])
    twin = copy.deepcopy(module)
    pickle.dumps(twin.__getstate__()["_compiled"])
    before, original = clone_parameters(twin), clone_parameters(module)
    fitted(twin, [random_batch(8, seed=1)])
    assert not torch.equal(before[0], clone_parameters(twin)[0])
    assert all(torch.equal(one, other) for one, other in zip(original, clone_parameters(module), strict=True))


@pytest.mark.long
def test_it_compiles_anew_for_another_fit_in_another_thread() -> None:
    """PyTorch's compiler settings are local to a thread."""
    module = small(DQN, CARTPOLE, compile_updates=True)
    fitted(module, [random_batch(8)])
    with ThreadPoolExecutor(1) as pool:
        pool.submit(fitted, module, [random_batch(8)], precision="bf16-mixed").result()


def test_float16_whose_gradients_are_scaled_is_refused_in_every_fit() -> None:
    module = small(DQN, CARTPOLE, compile_updates=True)
    for _ in range(2):
        trainer = quiet_trainer(max_epochs=1)
        trainer.strategy.precision_plugin.scaler = torch.amp.GradScaler("cpu")  # type: ignore[attr-defined]
        with pytest.raises(ConfigurationError, match="not in 16-mixed"):
            trainer.fit(module, Batches([random_batch(8)]))
        fitted(module, [random_batch(8)])


def test_several_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning averages gradients over devices in `backward`, which compiled updates do not call."""
    module = small(DQN, CARTPOLE, compile_updates=True)
    trainer = quiet_trainer(max_epochs=1)
    monkeypatch.setattr(type(trainer), "world_size", 2)
    with pytest.raises(ConfigurationError, match="one device, not on 2"):
        trainer.fit(module, Batches([random_batch(8)]))


def test_without_a_compiler_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    refused = pytest.raises(ConfigurationError, match=r"No working C\+\+ compiler .*Debian's g\+\+")
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}), refused:
        fitted(small(DQN, CARTPOLE, compile_updates=True), [random_batch(8)])


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *.cpp*) echo "x.cpp:1: fatal error: Python.h: No such file" >&2; exit 1;; esac\n'
        'exec /usr/bin/g++ "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    refused = pytest.raises(ConfigurationError, match=r"Python\.h: No such file .*Debian's g\+\+")
    with torch._inductor.config.patch({"cpp.cxx": (None, str(compiler))}), refused:
        fitted(small(DQN, CARTPOLE, compile_updates=True), [random_batch(8)])


def test_a_missing_compiler_is_found_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    find_compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigurationError, match="there is no no-such-compiler on this machine"):
        find_compiler()


def test_nothing_is_precomputed_for_a_compiled_update() -> None:
    batch = random_batch(2, 8)
    assert small(DQN, CARTPOLE, compile_updates=True).precompute_targets(batch) is batch
