"""One module an algorithm, each readable from top to bottom."""

from learner.algorithms.algorithm import Algorithm
from learner.algorithms.dqn import DQN

ALGORITHMS: dict[str, type[Algorithm]] = {"dqn": DQN}
