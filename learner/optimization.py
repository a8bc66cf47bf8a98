"""Optimizers by name, fused where PyTorch has a fused kernel, gradient clipping, and learning rate schedules."""

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

# Factor of the initial learning rate as a function of the completed fraction of the run, 0 to 1.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda fraction: 1.0,
    "linear": lambda fraction: 1.0 - fraction,
    "cosine": lambda fraction: 0.5 * (1.0 + math.cos(math.pi * fraction)),
}


def make_optimizer(
    name: str, *groups: tuple[Iterable[nn.Parameter], float], options: Mapping[str, Any] | None = None
) -> torch.optim.Optimizer:
    """Return an optimizer, with one fused kernel for all of its parameters where PyTorch has one.

    Args:
        name: key of `OPTIMIZERS`.
        groups: pairs of parameters and their learning rate.
        options: further arguments of the optimizer, such as `eps`.
    """
    fused = {"fused": True} if name in _FUSED else {}
    parameter_groups = [{"params": list(parameters), "lr": rate, "initial_lr": rate} for parameters, rate in groups]
    return OPTIMIZERS[name](parameter_groups, **fused, **(options or {}))


def zero_grad(optimizer: torch.optim.Optimizer) -> None:
    """Set the gradients of an optimizer's parameters to None, like `optimizer.zero_grad` without its profiler hooks."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def clip_gradient(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale the gradients of parameters in place so that their total norm is at most `max_norm`.

    The parameters must be on one device. The result is that of `torch.nn.utils.clip_grad_norm_`, which also supports
    several devices, layouts, and kinds of norm; for small networks that support costs more than the arithmetic.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, (norm + 1e-6).reciprocal_().mul_(max_norm).clamp_(max=1.0))


def set_learning_rate(optimizer: Any, schedule: str, step: int, last_frame: int) -> None:
    """Set every group's learning rate to its initial value times the schedule's factor at an environment step.

    Args:
        optimizer: optimizer from `make_optimizer`.
        schedule: key of `SCHEDULES`.
        step: environment steps so far, over all workers.
        last_frame: environment step at which the schedule ends.
    """
    factor = SCHEDULES[schedule](min(step / last_frame, 1.0))
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
