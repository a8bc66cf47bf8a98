"""Stable-Baselines3 end to end: `model.learn` with its defaults for logging, timed by a callback."""

from __future__ import annotations

import time
from typing import Any

from measure import arguments, report
from settings import WORK, Work, loss_fell

parsed = arguments("case")

import ale_py  # noqa: E402
import gymnasium  # noqa: E402
import torch  # noqa: E402
from stable_baselines3 import DQN, SAC  # noqa: E402
from stable_baselines3.common.callbacks import BaseCallback  # noqa: E402
from stable_baselines3.common.env_util import make_atari_env, make_vec_env  # noqa: E402
from stable_baselines3.common.vec_env import VecFrameStack  # noqa: E402

gymnasium.register_envs(ale_py)
torch.set_num_threads(parsed.threads)


class Window(BaseCallback):
    """Stops the training when the window is over, and keeps steps and updates at both of its ends."""

    def __init__(self) -> None:
        super().__init__()
        self.at_work: float | None = None
        self.first: tuple[float, int, int] | None = None
        self.last: tuple[float, int, int] | None = None
        self.losses: list[float] = []

    def _on_step(self) -> bool:
        now, updates = time.perf_counter(), self.model._n_updates
        if not updates:
            return True
        loss = self.logger.name_to_value.get("train/loss", self.logger.name_to_value.get("train/critic_loss"))
        if loss is not None:
            self.losses.append(float(loss))
        self.at_work = self.at_work or now
        if self.first is None and now >= self.at_work + parsed.warm_up:
            self.first = (now, self.num_timesteps, updates)
        if self.first is not None and now >= self.first[0] + parsed.seconds:
            self.last = (now, self.num_timesteps, updates)
            return False
        return True


def make_model(work: Work) -> Any:
    """Return the model for a case."""
    common: dict[str, Any] = {
        "batch_size": work.batch_size,
        "buffer_size": work.replay_size,
        "learning_starts": work.warm_start,
        "learning_rate": work.learning_rate,
        "train_freq": 1,
        "gradient_steps": work.updates_per_vector_step,
        "device": "cpu",
        "seed": 0,
    }
    if work.algorithm == "sac":
        return SAC(
            "MlpPolicy", make_vec_env(work.env, work.envs), policy_kwargs={"net_arch": list(work.hidden)}, **common
        )
    common |= {"exploration_initial_eps": work.epsilon, "exploration_final_eps": work.epsilon}
    common["target_update_interval"] = round(work.sync_rate / work.updates_per_step)
    if work.hidden:
        env = make_vec_env(work.env, work.envs)
        return DQN("MlpPolicy", env, policy_kwargs={"net_arch": list(work.hidden)}, **common)
    return DQN("CnnPolicy", VecFrameStack(make_atari_env(work.env, work.envs), 4), **common)


work, window = WORK[parsed.case], Window()
model = make_model(work)
model.learn(10**9, callback=window)
assert window.first is not None
assert window.last is not None
seconds, steps, updates = (b - a for a, b in zip(window.first, window.last, strict=True))
learned = [model.q_net] if work.algorithm == "dqn" else [model.actor, model.critic]
parameters = sum(p.numel() for module in learned for p in module.parameters() if p.requires_grad)
report(
    steps / seconds,
    parameters=parameters + (work.algorithm == "sac"),  # the temperature, which it keeps outside
    batch_size=work.batch_size,
    updates_per_step=updates / steps,
    loss_fell=loss_fell(window.losses),
)
