"""Algorithms as LightningModules, trained on experience from the same process or from a replay server."""

from replay.imports import no_collections

with no_collections():
    from learner.algorithms import (
        DQN,
        PERDQN,
        SAC,
        AdvantageActorCritic,
        DoubleDQN,
        DuelingDQN,
        NoisyDQN,
        NonDistributionalRainbow,
        NStepDQN,
        Reinforce,
        VanillaPolicyGradient,
    )

__all__ = [
    "DQN",
    "PERDQN",
    "SAC",
    "AdvantageActorCritic",
    "DoubleDQN",
    "DuelingDQN",
    "NStepDQN",
    "NoisyDQN",
    "NonDistributionalRainbow",
    "Reinforce",
    "VanillaPolicyGradient",
]
