"""Tests of acceleration: precision, skipped hooks, precomputed targets, and freed memory."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import Precision

from learner import DQN
from learner.acceleration import BarePrecision, choose_precision
from learner.checkpoints import LAST
from learner.learner import Learner, LearnerSpec
from tests.learner.runs import HYPERPARAMETERS, LearnerRun, Store
from tests.learner.toys import clone_parameters, same

# Precision.


@pytest.mark.parametrize(
    ("cuda", "bf16", "amx", "avx512", "chosen"),
    [
        (True, True, False, False, "bf16-mixed"),
        (True, False, True, True, "32-true"),
        (False, False, True, False, "bf16-mixed"),
        (False, False, False, True, "bf16-mixed"),
        (False, True, False, False, "32-true"),
    ],
)
def test_precision_is_chosen_for_the_hardware(
    cuda: bool, bf16: bool, amx: bool, avx512: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 and not including_emulation)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert choose_precision("auto", images=True) == chosen
    assert choose_precision("auto", images=False) == "32-true"
    assert choose_precision("16-mixed", images=False) == "16-mixed"


def test_single_precision_without_hooks_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare, hooked = LearnerRun(tmp_path / "bare", max_grad_norm=0.1), LearnerRun(tmp_path / "hooked", max_grad_norm=0.1)
    bare.fit()
    monkeypatch.setattr("learner.learner.trainer_precision", lambda *_, **__: {"precision": "32-true"})
    hooked.fit()
    assert [type(run.learner._trainer.precision_plugin) for run in (bare, hooked)] == [BarePrecision, Precision]  # type: ignore[union-attr]
    assert bare.global_step(LAST) == hooked.global_step(LAST) == 104
    assert same(*(list(run.module.policy.parameters()) for run in (bare, hooked)))
    assert not same(*(list(module.policy.parameters()) for module in (bare.module, DQN(**HYPERPARAMETERS))))


def test_single_precision_without_hooks_calls_a_closure_before_the_optimizer() -> None:
    called: list[str] = []

    class Optimizer:
        def step(self, **options: Any) -> str:
            called.append(f"step {options}")
            return "done"

    done = BarePrecision().optimizer_step(Optimizer(), pl.LightningModule(), lambda: called.append("closure"), lr=2)
    assert (done, called) == ("done", ["closure", "step {'lr': 2}"])


@pytest.mark.parametrize("hook", ["on_before_backward", "on_after_backward", "on_before_optimizer_step"])
def test_a_module_that_listens_to_a_hook_hears_of_every_update(
    hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called_at: list[int] = []
    monkeypatch.setattr(DQN, hook, lambda self, *_: called_at.append(self.global_step), raising=False)
    LearnerRun(tmp_path, updates=24).fit()
    assert called_at == list(range(24))


def test_bfloat16_learns_too(tmp_path: Path) -> None:
    run = LearnerRun(tmp_path, updates=8)
    before = clone_parameters(run.module.policy)
    spec = LearnerSpec("dqn", HYPERPARAMETERS, str(tmp_path), 100, 1, 100, "bf16-mixed")
    half = Learner(spec, replay=run.replay, weights=Store())  # type: ignore[arg-type]
    assert half.fit().updates == 8
    after = clone_parameters(half._module.policy)
    assert {parameter.dtype for parameter in after} == {torch.float32}
    assert not same(before, after)


# Precomputed targets.


def test_a_learner_that_precomputes_targets_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = LearnerRun(tmp_path / "ahead")
    plain = LearnerRun(tmp_path / "plain", threads=2)  # with two threads, targets are not precomputed
    precomputed: dict[str, list[bool]] = {"ahead": [], "plain": []}
    for name, run in (("ahead", ahead), ("plain", plain)):
        values = run.module.target_values

        def counted(batch: Any, name: str = name, values: Any = values, module: Any = run.module) -> Any:
            valid = batch.target_values_ahead is not None and batch.target_syncs == module._target_syncs
            precomputed[name].append(valid)
            return values(batch)

        monkeypatch.setattr(run.module, "target_values", counted)
        run.fit()
    assert len(precomputed["ahead"]) == len(precomputed["plain"]) == 104
    # The network is copied 3 times, every 30 updates. Each copy makes the values of at most 3 calls of 4 batches stale:
    # those of the present call and of two prefetched calls.
    assert sum(precomputed["ahead"]) >= 104 - 3 * 12
    assert not any(precomputed["plain"])
    assert same(*(list(run.module.policy.parameters()) for run in (ahead, plain)))


# Memory.

FAULTS = """
import resource
import torch
from learner.learner import keep_freed_memory

torch.set_num_threads(1)
keep_freed_memory()

def update():
    activations = [torch.ones(2**20) for _ in range(8)]  # 4 MiB each; allocated and freed together

for _ in range(20):
    update()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    update()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 50)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
@pytest.mark.long
def test_memory_that_an_update_frees_is_there_for_the_next() -> None:
    """Without `keep_freed_memory` there are nearly always 7,000 faults or more, but sometimes none."""
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
        assert float(done.stdout) < 50
