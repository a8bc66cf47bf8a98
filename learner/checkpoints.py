"""Checkpoints: reading files and recreating algorithms from them; names of the files that a run writes."""

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
    """Return a new algorithm from its name and its hyper-parameters, which include `env`.

    Raises:
        ConfigurationError: an unknown name, or invalid hyper-parameters.
    """
    return _algorithm_class(name)(**hyperparameters)


def _algorithm_class(name: str) -> type[Algorithm]:
    if name not in ALGORITHMS:
        raise ConfigurationError(f"unknown algorithm {name!r}; there are {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint's content. The key `"squall"` contains the algorithm's name and the run's progress.

    Raises:
        ConfigurationError: the file is not a Squall checkpoint.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the type of the exception depends on the bytes that are unpickled
        raise ConfigurationError(f"{path} is not a Squall checkpoint: {error}") from error
    if not (isinstance(content, dict) and "algorithm" in content.get("squall", ())):
        raise ConfigurationError(f"{path} is not a Squall checkpoint")
    return content


def load_algorithm(path: Path) -> Algorithm:
    """Return the algorithm in a checkpoint, with its weights.

    Raises:
        ConfigurationError: the file is not a Squall checkpoint, or its algorithm is unknown.
    """
    algorithm = _algorithm_class(read_checkpoint(path)["squall"]["algorithm"])
    return algorithm.load_from_checkpoint(path, map_location="cpu", weights_only=True)
