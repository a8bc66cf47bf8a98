"""The algorithms, one module each, and `ALGORITHMS`, which maps their names to their classes."""

from learner.algorithms.advantage_actor_critic import AdvantageActorCritic
from learner.algorithms.algorithm import Algorithm
from learner.algorithms.double_dqn import DoubleDQN
from learner.algorithms.dqn import DQN
from learner.algorithms.dueling_dqn import DuelingDQN
from learner.algorithms.n_step_dqn import NStepDQN
from learner.algorithms.noisy_dqn import NoisyDQN
from learner.algorithms.per_dqn import PERDQN
from learner.algorithms.rainbow import NonDistributionalRainbow
from learner.algorithms.reinforce import Reinforce
from learner.algorithms.soft_actor_critic import SAC
from learner.algorithms.vanilla_policy_gradient import VanillaPolicyGradient

ALGORITHMS: dict[str, type[Algorithm]] = {
    algorithm.name: algorithm
    for algorithm in (
        DQN,
        DoubleDQN,
        DuelingDQN,
        NoisyDQN,
        NStepDQN,
        PERDQN,
        NonDistributionalRainbow,
        Reinforce,
        VanillaPolicyGradient,
        AdvantageActorCritic,
        SAC,
    )
}

__all__ = [
    "ALGORITHMS",
    "DQN",
    "PERDQN",
    "SAC",
    "AdvantageActorCritic",
    "Algorithm",
    "DoubleDQN",
    "DuelingDQN",
    "NStepDQN",
    "NoisyDQN",
    "NonDistributionalRainbow",
    "Reinforce",
    "VanillaPolicyGradient",
]
