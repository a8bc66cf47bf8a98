"""Squall's public names: algorithms, clients, and errors. `python -m squall` is the command line.

    from squall import DQN, SquallClient

This module imports nothing heavy. PyTorch, Lightning, and gRPC are imported with the first name that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actors.environments import EnvironmentSpec as EnvironmentSpec
    from learner import DQN as DQN
    from learner import PERDQN as PERDQN
    from learner import SAC as SAC
    from learner import AdvantageActorCritic as AdvantageActorCritic
    from learner import DoubleDQN as DoubleDQN
    from learner import DuelingDQN as DuelingDQN
    from learner import NoisyDQN as NoisyDQN
    from learner import NonDistributionalRainbow as NonDistributionalRainbow
    from learner import NStepDQN as NStepDQN
    from learner import Reinforce as Reinforce
    from learner import VanillaPolicyGradient as VanillaPolicyGradient
    from learner.checkpoints import load_algorithm as load_algorithm
    from replay.errors import ConfigurationError as ConfigurationError
    from replay.errors import SquallError as SquallError
    from services.client.experience_client import ExperienceClient as ExperienceClient
    from services.client.run_client import SquallClient as SquallClient

_MODULES = {
    "EnvironmentSpec": "actors.environments",
    "DQN": "learner",
    "PERDQN": "learner",
    "SAC": "learner",
    "AdvantageActorCritic": "learner",
    "DoubleDQN": "learner",
    "DuelingDQN": "learner",
    "NoisyDQN": "learner",
    "NonDistributionalRainbow": "learner",
    "NStepDQN": "learner",
    "Reinforce": "learner",
    "VanillaPolicyGradient": "learner",
    "load_algorithm": "learner.checkpoints",
    "ConfigurationError": "replay.errors",
    "SquallError": "replay.errors",
    "ExperienceClient": "services.client.experience_client",
    "SquallClient": "services.client.run_client",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'squall' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if __name__ == "__main__":
    import sys

    from services.cli.main import main

    sys.exit(main())
