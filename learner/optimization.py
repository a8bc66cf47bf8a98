"""Optimizers by name, fused where the device has it, and how their learning rate falls over a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
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

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def make_optimizer(
    name: str, *groups: tuple[Iterable[nn.Parameter], float], options: Mapping[str, Any] | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer `name`; one fused kernel for all of its parameters where there is one.

    Args:
        name: one of `OPTIMIZERS`.
        groups: parameters, each with their learning rate.
        options: other arguments of the optimizer, such as `eps`.
    """
    fused = {"fused": True} if name in _FUSED else {}
    made = [{"params": list(parameters), "lr": rate, "initial_lr": rate} for parameters, rate in groups]
    return OPTIMIZERS[name](made, **fused, **(options or {}))


def zero_grad(optimizer: torch.optim.Optimizer) -> None:
    """Leave no gradient in an optimizer's parameters: its `zero_grad`, without what that tells a profiler."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def clip_gradient(parameters: Iterable[nn.Parameter], longest: float) -> None:
    """Scale the gradients of parameters, which are on one device, together to a length of at most `longest`, in place.

    It is `torch.nn.utils.clip_grad_norm_` without what that does for several devices, layouts and norms: for small
    networks more than the arithmetic.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, (length + 1e-6).reciprocal_().mul_(longest).clamp_(max=1.0))


def set_learning_rate(optimizer: Any, schedule: str, step: int, last_frame: int) -> None:
    """Set every group's learning rate to its first one times the schedule's factor at an environment step.

    Args:
        optimizer: made by `make_optimizer`.
        schedule: one of `SCHEDULES`, functions of the part of the run that is done, from 1 to 0.
        step: environment steps so far, over all workers.
        last_frame: environment step at which the schedule ends.
    """
    factor = SCHEDULES[schedule](min(step / last_frame, 1.0))
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
