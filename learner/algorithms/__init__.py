"""One module an algorithm, each readable from top to bottom."""

from learner.algorithms.algorithm import Algorithm
from learner.algorithms.double_dqn import DoubleDQN
from learner.algorithms.dqn import DQN
from learner.algorithms.dueling_dqn import DuelingDQN
from learner.algorithms.n_step_dqn import NStepDQN
from learner.algorithms.noisy_dqn import NoisyDQN
from learner.algorithms.per_dqn import PERDQN
from learner.algorithms.rainbow import NonDistributionalRainbow

ALGORITHMS: dict[str, type[Algorithm]] = {
    algorithm.name: algorithm
    for algorithm in (DQN, DoubleDQN, DuelingDQN, NoisyDQN, NStepDQN, PERDQN, NonDistributionalRainbow)
}

__all__ = [
    "ALGORITHMS",
    "DQN",
    "PERDQN",
    "Algorithm",
    "DoubleDQN",
    "DuelingDQN",
    "NStepDQN",
    "NoisyDQN",
    "NonDistributionalRainbow",
]
