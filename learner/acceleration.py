"""Acceleration: process and Trainer settings that make updates faster and do not change an algorithm."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import Precision
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor

from learner.algorithms.algorithm import Algorithm

# M_ARENA_MAX, M_TRIM_THRESHOLD, and M_MMAP_THRESHOLD of glibc, the last one at its maximum; see mallopt(3).
_MALLOPT_SETTINGS = ((-8, 1), (-1, 2**30), (-3, 2**25))
_PRECISION_HOOKS = ("on_before_backward", "on_after_backward", "on_before_optimizer_step")
_FAST_BFLOAT16 = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # private functions of torch.cpu


def keep_freed_memory() -> None:
    """Make glibc keep the memory that this process frees. Has no effect with other C libraries.

    Each update frees and allocates the same large activations. By default, glibc immediately returns such memory to the
    kernel, and the kernel must clear every page again: 2,600 page faults per update of the Nature CNN, a sixth of the
    update's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in _MALLOPT_SETTINGS:
            mallopt(parameter, value)


def choose_precision(name: str, *, images: bool, gpu: bool | None = None) -> Any:
    """Return Lightning's name of a precision. "auto" selects bfloat16 for images if the device is fast in bfloat16.

    Dense layers of a few hundred units do not benefit from bfloat16: their time is spent on calls, not on arithmetic.
    """
    if name != "auto":
        return name
    if torch.cuda.is_available() if gpu is None else gpu:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = any(getattr(torch.cpu, function, bool)() for function in _FAST_BFLOAT16)
    return "bf16-mixed" if images and fast else "32-true"


def trainer_precision(name: str, module: Algorithm, *, gpu: bool | None = None) -> dict[str, Any]:
    """Return the Trainer's arguments for a precision, whose name `choose_precision` resolves.

    In single precision the arguments select `BarePrecision`, unless the module overrides one of the hooks that
    `BarePrecision` skips.
    """
    chosen = choose_precision(name, images=module.environment.is_image, gpu=gpu)
    needs_hooks = any(is_overridden(hook, module) for hook in _PRECISION_HOOKS)
    return {"precision": chosen} if needs_hooks or chosen != "32-true" else {"plugins": [BarePrecision()]}


class BarePrecision(Precision):
    """Single precision without the hooks around `backward` and the optimizer's step.

    The corresponding hooks of callbacks are not called either. Gradients are not clipped, but Lightning never clips
    gradients in manual optimization. The learner process has no callbacks with these hooks. For small networks, the
    skipped calls take a twentieth of an update.
    """

    def pre_backward(self, tensor: Tensor, module: pl.LightningModule) -> Tensor:  # type: ignore[override]
        """Return the loss."""
        return tensor

    def post_backward(self, tensor: Tensor, module: pl.LightningModule) -> Tensor:  # type: ignore[override]
        """Return the loss, detached."""
        return tensor.detach()

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Call the closure, then the optimizer."""
        closure()
        return optimizer.step(**kwargs)
