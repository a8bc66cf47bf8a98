"""Hyper-parameters."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import numpy as np
import torch
from torch import nn

from actors.networks import ACTIVATIONS
from learner.optimization import (
    OPTIMIZERS,
    SCHEDULES,
    make_optimizer,
)
from replay.errors import ConfigurationError

_POSITIVE = (
    "sync_rate", "learning_rate", "lr", "policy_learning_rate", "q_learning_rate", "batch_size", "replay_size",
    "warm_start_size", "batches_per_epoch", "epoch_len", "n_steps", "unroll_length", "num_batch_episodes",
    "updates_per_step", "updates_per_training_step", "num_envs", "segment_length", "max_grad_norm", "avg_reward_len",
    "learning_rate_last_frame",
)  # fmt: skip


_NOT_NEGATIVE = ("seed", "entropy_beta", "critic_beta", "max_policy_lag", "init_alpha")


_IN_UNIT_INTERVAL = ("gamma", "target_alpha")


def check_hyperparameters(hparams: Mapping[str, Any]) -> None:
    """Raise `ConfigurationError` for a hyper-parameter that cannot work; the text names its value."""
    for name, value in hparams.items():
        if value is None:
            continue
        if name in _POSITIVE and not (value > 0 and np.isfinite(value)):
            raise ConfigurationError(f"{name} must be positive, got {value}")
        if name in _NOT_NEGATIVE and not (value >= 0 and np.isfinite(value)):
            raise ConfigurationError(f"{name} must not be negative, got {value}")
        if name in _IN_UNIT_INTERVAL and not 0.0 <= value <= 1.0:
            raise ConfigurationError(f"{name} must lie in [0, 1], got {value}")
    for name, known in (("optimizer", OPTIMIZERS), ("learning_rate_schedule", SCHEDULES), ("activation", ACTIVATIONS)):
        if hparams[name] not in known:
            raise ConfigurationError(f"{name} must be one of {', '.join(known)}, got {hparams[name]!r}")
    if hparams["learning_rate_schedule"] != "constant" and hparams["learning_rate_last_frame"] is None:
        raise ConfigurationError(
            f"a {hparams['learning_rate_schedule']} learning_rate_schedule needs learning_rate_last_frame"
        )
    if "lr" in (hparams["optimizer_options"] or {}):
        raise ConfigurationError("optimizer_options must not hold lr: the learning rate has a parameter of its own")
    try:
        make_optimizer(
            hparams["optimizer"], ([nn.Parameter(torch.zeros(1))], 1.0), options=hparams["optimizer_options"]
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"optimizer_options of {hparams['optimizer']}: {error}") from error


def argparse_options(annotation: Any) -> dict[str, Any]:
    """Return how argparse reads an argument annotated as `int`, `bool | None` or `Sequence[int] | None`."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    kind = next(kind for kind in kinds if kind is not NoneType)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is dict:
        return {"type": json.loads}
    return {"type": get_args(kind)[0], "nargs": "+"} if get_origin(kind) is Sequence else {"type": kind}
