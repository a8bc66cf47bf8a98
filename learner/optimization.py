"""Optimizers by name, fused where the device has it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
_FUSED = ("adam", "adamw", "sgd")


def make_optimizer(name: str, parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Return the optimizer `name` over `parameters`; one fused kernel for all of them where there is one."""
    options: dict[str, Any] = {"fused": True} if name in _FUSED else {}
    return OPTIMIZERS[name](list(parameters), lr=learning_rate, **options)
