"""Presets: tuned hyper-parameters per algorithm and environment, in one YAML file per algorithm.

A top-level key is an environment id, or a family, `atari` or `mujoco`, for all of its ids that have no preset.
Its value has two parts: `run` contains keys of the run configuration, `hyperparameters` contains arguments of the
algorithm's constructor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import yaml

from actors.environments import family


@dataclass(frozen=True)
class Preset:
    """A preset of one algorithm for one environment.

    Attributes:
        run: values of run configuration keys.
        hyperparameters: arguments of the algorithm's constructor.
    """

    run: dict[str, Any] = field(default_factory=dict)
    hyperparameters: dict[str, Any] = field(default_factory=dict)


def load_preset(algorithm: str, environment: str) -> Preset | None:
    """Return the preset of an algorithm for an environment, or None if there is none.

    A file with `inherits: other` starts from the presets of the algorithm `other`; its own values take precedence.
    """
    file = resources.files(__name__) / f"{algorithm}.yaml"
    if not file.is_file():
        return None
    presets = yaml.safe_load(file.read_text())
    base = load_preset(presets["inherits"], environment) if "inherits" in presets else None
    own = presets.get(environment) or presets.get(family(environment))
    if base is None and own is None:
        return None
    base, own = base or Preset(), own or {}
    return Preset(base.run | own.get("run", {}), base.hyperparameters | own.get("hyperparameters", {}))
