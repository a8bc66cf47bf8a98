"""What the end-to-end sides have in common: the same work, said once. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """One end-to-end case.

    Attributes:
        algorithm: "dqn" or "sac".
        env: environment id.
        envs: environments stepped at once, in all.
        actors: Squall's workers, which share `envs`.
        batch_size: transitions in an update.
        updates_per_step: updates for each environment step; a whole number of them falls to one step of all `envs`.
        learning_rate: of the optimizer.
        hidden: widths of dense layers; empty takes the Nature CNN.
        replay_size: transitions held.
        warm_start: steps before the first update.
        sync_rate: updates between copies of the target network.
        epsilon: probability of a random action, DQN's.
        compiled: whether ours and the limit compile their updates.
    """

    algorithm: str
    env: str
    envs: int
    actors: int
    batch_size: int
    updates_per_step: float
    learning_rate: float
    hidden: tuple[int, ...]
    replay_size: int = 50_000
    warm_start: int = 1_000
    sync_rate: int = 500
    epsilon: float = 0.05
    compiled: bool = False

    @property
    def updates_per_vector_step(self) -> int:
        """Updates for one step of all environments."""
        return round(self.updates_per_step * self.envs)


WORK = {
    "pong": Work("dqn", "PongNoFrameskip-v4", 8, 2, 32, 0.25, 1e-4, (), replay_size=20_000),
    "cartpole": Work("dqn", "CartPole-v1", 4, 1, 64, 0.5, 5e-4, (256, 256), compiled=True),
    "pendulum": Work("sac", "Pendulum-v1", 2, 1, 256, 1.0, 1e-3, (256, 256), compiled=True),
}


def loss_fell(losses: list[float]) -> bool | None:
    """Return whether the losses, which wander, end lower than their highest third began; None for too few."""
    third = len(losses) // 3
    return None if third < 3 else min(losses[-third:]) < max(losses[:third])
