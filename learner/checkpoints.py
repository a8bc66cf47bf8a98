"""Checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from learner.algorithms import ALGORITHMS
from learner.algorithms.algorithm import Algorithm
from replay.errors import ConfigurationError

LAST = "last.ckpt"


BEST = "best.ckpt"


def make_algorithm(name: str, hyperparameters: Mapping[str, Any]) -> Algorithm:
    """Return the algorithm `name`, made from its hyper-parameters, `env` among them.

    Raises:
        ConfigurationError: no algorithm of that name, or hyper-parameters it refuses.
    """
    return _algorithm_class(name)(**hyperparameters)


def _algorithm_class(name: str) -> type[Algorithm]:
    if name not in ALGORITHMS:
        raise ConfigurationError(f"unknown algorithm {name!r}; there are {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint's content; its part `"squall"` holds the algorithm's name and the run's progress.

    Raises:
        ConfigurationError: the file is no checkpoint of Squall's.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler raises whatever its input makes of it
        raise ConfigurationError(f"{path} is no checkpoint of Squall's: {error}") from error
    if not (isinstance(content, dict) and "algorithm" in content.get("squall", ())):
        raise ConfigurationError(f"{path} is no checkpoint of Squall's")
    return content


def load_algorithm(path: Path) -> Algorithm:
    """Return the algorithm in a checkpoint, with its weights.

    Raises:
        ConfigurationError: the file is no checkpoint of Squall's, or of an algorithm unknown here.
    """
    algorithm = _algorithm_class(read_checkpoint(path)["squall"]["algorithm"])
    return algorithm.load_from_checkpoint(path, map_location="cpu", weights_only=True)
