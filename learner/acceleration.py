"""Acceleration."""

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

# glibc's M_ARENA_MAX, M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, the last at its largest; see mallopt(3).
_KEEP = ((-8, 1), (-1, 2**30), (-3, 2**25))


_HOOKS_OF_PRECISION = ("on_before_backward", "on_after_backward", "on_before_optimizer_step")


_FAST_BFLOAT16 = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # of torch.cpu, private: they may go


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, as far as the C library is glibc.

    An update frees and takes the same large activations again. By default glibc gives such memory back to the kernel at
    once, which must then clear every page anew: 2,600 page faults an update of Nature's network, a sixth of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in _KEEP:
            mallopt(parameter, value)


def choose_precision(name: str, *, images: bool, gpu: bool | None = None) -> Any:
    """Return Lightning's name of a precision; "auto" takes bfloat16 for images where the device is fast at it.

    Dense layers of a few hundred units gain nothing from it: what they spend is spent on calls.
    """
    if name != "auto":
        return name
    if torch.cuda.is_available() if gpu is None else gpu:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = any(getattr(torch.cpu, asks, bool)() for asks in _FAST_BFLOAT16)
    return "bf16-mixed" if images and fast else "32-true"


def trainer_precision(name: str, module: Algorithm, *, gpu: bool | None = None) -> dict[str, Any]:
    """Return the Trainer's arguments that set a precision, of which `choose_precision` takes the name.

    In single precision, where nothing is left for a plugin to do, they are a plugin that does only that, unless the
    module listens to a hook that Lightning's calls.
    """
    chosen = choose_precision(name, images=module.environment.is_image, gpu=gpu)
    heard = any(is_overridden(hook, module) for hook in _HOOKS_OF_PRECISION)
    return {"precision": chosen} if heard or chosen != "32-true" else {"plugins": [BarePrecision()]}


class BarePrecision(Precision):
    """Single precision, and none of the hooks around `backward` and the optimizer's step.

    Callbacks are not told of them either, and gradients are not clipped: in manual optimization Lightning does not. In
    a learner nobody listens, and for small networks telling nobody takes a twentieth of an update.
    """

    def pre_backward(self, tensor: Tensor, module: pl.LightningModule) -> Tensor:  # type: ignore[override]
        """Return the loss."""
        return tensor

    def post_backward(self, tensor: Tensor, module: pl.LightningModule) -> Tensor:  # type: ignore[override]
        """Return the loss, without its graph."""
        return tensor.detach()

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Call the closure, then the optimizer."""
        closure()
        return optimizer.step(**kwargs)
