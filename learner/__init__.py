"""How it is learned: algorithms as LightningModules, fed by replay in this process or across Ray."""

from learner.algorithms.dqn import DQN

__all__ = ["DQN"]
