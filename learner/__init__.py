"""How it is learned: algorithms as LightningModules, fed by replay in this process or across Ray."""

from learner.algorithms import (
    DQN,
    PERDQN,
    DoubleDQN,
    DuelingDQN,
    NoisyDQN,
    NonDistributionalRainbow,
    NStepDQN,
)

__all__ = ["DQN", "PERDQN", "DoubleDQN", "DuelingDQN", "NStepDQN", "NoisyDQN", "NonDistributionalRainbow"]
