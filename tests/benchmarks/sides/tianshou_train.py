"""tianshou end to end: its off-policy trainer, timed by the function that it calls before each training step."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from measure import arguments, report
from settings import WORK, Work, loss_fell

parsed = arguments("case")


import gymnasium as gym  # noqa: E402
import torch  # noqa: E402
from tianshou.algorithm import DQN, SAC  # noqa: E402
from tianshou.algorithm.modelfree.dqn import DiscreteQLearningPolicy  # noqa: E402
from tianshou.algorithm.modelfree.sac import AutoAlpha, SACPolicy  # noqa: E402
from tianshou.algorithm.optim import AdamOptimizerFactory  # noqa: E402
from tianshou.data import Collector, VectorReplayBuffer  # noqa: E402
from tianshou.env import DummyVectorEnv  # noqa: E402
from tianshou.trainer import OffPolicyTrainerParams  # noqa: E402
from tianshou.utils.net.common import Net  # noqa: E402
from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic  # noqa: E402

torch.set_num_threads(parsed.threads)


class Enough(Exception):
    """The window is over."""


def make_dqn(work: Work, env: Any) -> tuple[Any, int]:
    """Return the algorithm and its trained parameters."""
    net = Net(state_shape=env.observation_space.shape, action_shape=env.action_space.n, hidden_sizes=list(work.hidden))
    policy = DiscreteQLearningPolicy(
        model=net, action_space=env.action_space, eps_training=work.epsilon, eps_inference=0.0
    )
    algorithm = DQN(
        policy=policy, optim=AdamOptimizerFactory(lr=work.learning_rate), gamma=0.99,
        target_update_freq=work.sync_rate, huber_loss_delta=1.0,
    )  # fmt: skip
    return algorithm, sum(p.numel() for p in net.parameters())


def make_sac(work: Work, env: Any) -> tuple[Any, int]:
    """Return the algorithm and its trained parameters."""
    shape, actions, hidden = env.observation_space.shape, env.action_space.shape, list(work.hidden)
    actor = ContinuousActorProbabilistic(
        preprocess_net=Net(state_shape=shape, hidden_sizes=hidden), action_shape=actions, unbounded=True,
        conditioned_sigma=True,
    )  # fmt: skip
    critics = [
        ContinuousCritic(preprocess_net=Net(state_shape=shape, action_shape=actions, hidden_sizes=hidden, concat=True))
        for _ in range(2)
    ]
    optim = AdamOptimizerFactory(lr=work.learning_rate)
    alpha = AutoAlpha(-1.0, 0.0, optim)
    algorithm = SAC(
        policy=SACPolicy(actor=actor, action_space=env.action_space), policy_optim=optim, critic=critics[0],
        critic_optim=optim, critic2=critics[1], critic2_optim=optim, alpha=alpha,
    )  # fmt: skip
    return algorithm, sum(p.numel() for module in (actor, *critics) for p in module.parameters()) + 1


work = WORK[parsed.case]
envs = DummyVectorEnv([lambda: gym.make(work.env) for _ in range(work.envs)])
algorithm, parameters = (make_sac if work.algorithm == "sac" else make_dqn)(work, gym.make(work.env))
updates, losses, ends = 0, [], []
inner = algorithm._update_with_batch


def counted(*args: Any, **kwargs: Any) -> Any:
    """Count an update and keep its loss."""
    global updates
    statistics = inner(*args, **kwargs)
    updates += 1
    losses.append(float(getattr(statistics, "loss", None) or getattr(statistics, "critic1_loss", 0.0)))
    return statistics


algorithm._update_with_batch = counted
at_work: float | None = None


def on_step(epoch: int, env_steps: int) -> None:
    """Look at the clock before a training step."""
    global at_work
    now = time.perf_counter()
    if updates and at_work is None:
        at_work = now
    if at_work is not None and not ends and now >= at_work + parsed.warm_up:
        ends.append((now, env_steps, updates))
    if ends and now >= ends[0][0] + parsed.seconds:
        ends.append((now, env_steps, updates))
        raise Enough


collector = Collector(algorithm, envs, VectorReplayBuffer(work.replay_size, work.envs), exploration_noise=True)
collector.reset()
collector.collect(n_step=work.warm_start, random=True)
with contextlib.suppress(Enough):
    algorithm.run_training(
        OffPolicyTrainerParams(
            training_collector=collector,
            max_epochs=1,
            epoch_num_steps=10**9,
            collection_step_num_env_steps=work.envs,
            batch_size=work.batch_size,
            update_step_num_gradient_steps_per_sample=work.updates_per_step,
            training_fn=on_step,
            show_progress=False,
            verbose=False,
        )
    )
seconds, steps, made = (b - a for a, b in zip(ends[0], ends[1], strict=True))
report(
    steps / seconds, parameters=parameters, batch_size=work.batch_size, updates_per_step=made / steps,
    loss_fell=loss_fell(losses),
)  # fmt: skip
