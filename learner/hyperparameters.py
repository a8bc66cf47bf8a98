"""Hyper-parameters: valid ranges, the constructor's full signature, presets, and argparse options.

The constructors of an algorithm and of its base classes declare the hyper-parameters. Each constructor accepts the
arguments of its base classes as `**kwargs`, and passes them on.
"""

from __future__ import annotations

import argparse
import inspect
import json
import warnings
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, ClassVar, Self, get_args, get_origin

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from actors.networks import ACTIVATIONS
from learner.optimization import OPTIMIZERS, SCHEDULES, make_optimizer
from learner.presets import load_preset
from replay.errors import ConfigurationError

_POSITIVE = (
    "sync_rate", "learning_rate", "lr", "policy_learning_rate", "q_learning_rate", "batch_size", "replay_size",
    "warm_start_size", "batches_per_epoch", "epoch_len", "n_steps", "unroll_length", "num_batch_episodes",
    "updates_per_step", "updates_per_training_step", "num_envs", "segment_length", "max_grad_norm", "avg_reward_len",
    "learning_rate_last_frame",
)  # fmt: skip
_NOT_NEGATIVE = ("seed", "entropy_beta", "critic_beta", "max_policy_lag", "init_alpha")
_IN_UNIT_INTERVAL = ("gamma", "target_alpha")
_CHOICES: dict[str, Mapping[str, Any]] = {
    "optimizer": OPTIMIZERS,
    "learning_rate_schedule": SCHEDULES,
    "activation": ACTIVATIONS,
}
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def check_hyperparameters(hparams: Mapping[str, Any]) -> None:
    """Raise `ConfigurationError` for the first hyper-parameter that is out of range; the message contains its value."""
    for name, value in hparams.items():
        if value is None:
            continue
        if name in _POSITIVE and not (value > 0 and np.isfinite(value)):
            raise ConfigurationError(f"{name} must be positive, got {value}")
        if name in _NOT_NEGATIVE and not (value >= 0 and np.isfinite(value)):
            raise ConfigurationError(f"{name} must not be negative, got {value}")
        if name in _IN_UNIT_INTERVAL and not 0.0 <= value <= 1.0:
            raise ConfigurationError(f"{name} must lie in [0, 1], got {value}")
    for name, choices in _CHOICES.items():
        if hparams[name] not in choices:
            raise ConfigurationError(f"{name} must be one of {', '.join(choices)}, got {hparams[name]!r}")
    schedule = hparams["learning_rate_schedule"]
    if schedule != "constant" and hparams["learning_rate_last_frame"] is None:
        raise ConfigurationError(f"a {schedule} learning_rate_schedule needs learning_rate_last_frame")
    _check_optimizer_options(hparams["optimizer"], hparams["optimizer_options"])


def _check_optimizer_options(optimizer: str, options: Mapping[str, Any] | None) -> None:
    if "lr" in (options or {}):
        raise ConfigurationError("optimizer_options must not contain lr: the learning rate has its own hyper-parameter")
    try:
        # Only the optimizer knows which options it accepts, and the range of each.
        make_optimizer(optimizer, ([nn.Parameter(torch.zeros(1))], 1.0), options=options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"optimizer_options of {optimizer}: {error}") from error


def _parameters_by_constructor(cls: type) -> list[dict[str, inspect.Parameter]]:
    """Return the named parameters of each constructor that a call of `cls` reaches, in method resolution order.

    A constructor without `**kwargs` is the last: it accepts no arguments of its base classes.
    """
    chain = []
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        constructor: Any = vars(base)["__init__"]
        _, *parameters = inspect.signature(constructor, eval_str=True).parameters.values()  # without self
        chain.append({p.name: p for p in parameters if p.kind in _NAMED})
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return chain


class ConstructorSignature:
    """Descriptor for `__signature__`, which `inspect.signature(cls)` and `help(cls)` use.

    The signature consists of the constructor's own parameters and, as keyword-only parameters, the parameters of the
    base classes, which the constructor accepts as `**kwargs`.
    """

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        """Return the signature of the class `owner`.

        Raises:
            AttributeError: the attribute is requested from an instance; an instance has the signature of `__call__`.
        """
        if instance is not None:
            raise AttributeError("__signature__")
        own, *inherited = _parameters_by_constructor(owner)
        merged = dict(own)
        for parameters in inherited:
            for name, parameter in parameters.items():
                merged.setdefault(name, parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        return inspect.Signature(list(merged.values()))


class ConfigurableModule(pl.LightningModule):
    """A LightningModule whose hyper-parameters are the arguments of its constructor and its base classes' constructors.

    Attributes:
        name: name on the command line, of the preset file, and in checkpoints.
    """

    __signature__ = ConstructorSignature()
    name: ClassVar[str]

    @classmethod
    def from_preset(cls, env: str, **overrides: Any) -> Self:
        """Return the algorithm with the hyper-parameters tuned for `env`.

        Raises:
            ConfigurationError: there is no preset for this environment.
        """
        preset = load_preset(cls.name, env)
        if preset is None:
            raise ConfigurationError(f"{cls.name} has no preset for {env}; {cls.__name__}({env!r}) uses its defaults")
        values = {**preset.hyperparameters, **overrides}
        if values.get("learning_rate_schedule", "constant") != "constant":
            values.setdefault("learning_rate_last_frame", preset.run["steps"])
        return cls(env, **values)

    @classmethod
    def hyperparameter_types(cls) -> dict[str, inspect.Parameter]:
        """Return the constructor's parameters except the environment, the parameters of the base classes first."""
        merged: dict[str, inspect.Parameter] = {}
        for parameters in reversed(_parameters_by_constructor(cls)):
            merged |= parameters  # the defaults of derived classes replace the defaults of base classes
        return {name: parameter for name, parameter in merged.items() if name != "env"}

    @classmethod
    def add_model_specific_args(cls, arg_parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add the constructor's parameters to `arg_parser`, with their names and defaults."""
        group = arg_parser.add_argument_group(cls.__name__)
        group.add_argument("--env", required=True, help="environment id")
        for name, parameter in cls.hyperparameter_types().items():
            group.add_argument(f"--{name}", default=parameter.default, **_argparse_options(parameter.annotation))
        return arg_parser

    @classmethod
    def from_args(cls, arguments: argparse.Namespace, **overrides: Any) -> Self:
        """Return the algorithm made from its arguments in a namespace, which may contain other arguments too."""
        own = {name: getattr(arguments, name) for name in cls.hyperparameter_types() if hasattr(arguments, name)}
        return cls(arguments.env, **{**own, **overrides})


def warn_unused(module: ConfigurableModule, reason: str, *names: str) -> None:
    """Warn if any of the named hyper-parameters, which have no effect in `module`, differs from its default.

    Call this function in the constructor of `module`: the warning points at the line that calls the constructor.
    """
    parameters = module.hyperparameter_types()
    changed = [name for name in names if module.hparams[name] != parameters[name].default]
    if changed:
        warnings.warn(f"{', '.join(changed)} have no effect in {type(module).__name__}: {reason}", stacklevel=3)


def _argparse_options(annotation: Any) -> dict[str, Any]:
    """Return the keyword arguments of `add_argument` for an annotation such as `int` or `Sequence[int] | None`."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    kind = next(kind for kind in kinds if kind is not NoneType)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is dict:
        return {"type": json.loads}
    return {"type": get_args(kind)[0], "nargs": "+"} if get_origin(kind) is Sequence else {"type": kind}
