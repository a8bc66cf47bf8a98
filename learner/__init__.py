"""How it is learned: algorithms as LightningModules, fed by replay in this process or across Ray."""

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
