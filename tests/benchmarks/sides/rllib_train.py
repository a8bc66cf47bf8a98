"""RLlib end to end: DQN of the new API stack; whole iterations, each as short as it allows, are timed."""

from __future__ import annotations

import os
import time
from typing import Any

from measure import arguments, report
from settings import WORK

parsed = arguments("case")
os.environ["RAY_WORKER_NICENESS"] = "0"

import gymnasium as gym  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402
from ray.rllib.algorithms.dqn import DQNConfig  # noqa: E402
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig  # noqa: E402
from ray.tune.registry import register_env  # noqa: E402

torch.set_num_threads(parsed.threads)
work = WORK[parsed.case]


def make(_: Any) -> gym.Env:
    """Return one environment as the others have it."""
    if work.hidden:
        return gym.make(work.env)
    import ale_py

    gym.register_envs(ale_py)
    game = gym.wrappers.AtariPreprocessing(gym.make(work.env), frame_skip=4, scale_obs=False)
    return gym.wrappers.TransformObservation(
        gym.wrappers.FrameStackObservation(game, 4),
        # Its networks take floats; its own Atari wrapper makes them in the environment too.
        lambda frames: frames.transpose(1, 2, 0).astype("float32") / 128.0 - 1.0,
        gym.spaces.Box(-1.0, 1.0, (84, 84, 4), "float32"),
    )


ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
register_env("case", make)
model = (
    DefaultModelConfig(fcnet_hiddens=list(work.hidden), fcnet_activation="relu", head_fcnet_hiddens=[])
    if work.hidden
    else DefaultModelConfig(
        conv_filters=[[32, 8, 4, "valid"], [64, 4, 2, "valid"], [64, 3, 1, "valid"]],
        conv_activation="relu",
        head_fcnet_hiddens=[512],
    )
)
config = (
    DQNConfig()
    .environment("case")
    # Long enough that what a fragment overshoots by, at most a step of all environments, is little beside it.
    .env_runners(num_env_runners=1, num_envs_per_env_runner=work.envs, rollout_fragment_length=32)
    .training(
        lr=work.learning_rate, train_batch_size_per_learner=work.batch_size, double_q=False, dueling=False, n_step=1,
        # Samples for each step, in its words, which count a runner more than there is.
        training_intensity=work.batch_size * work.updates_per_step / 2,
        num_steps_sampled_before_learning_starts=work.warm_start,
        replay_buffer_config={"type": "EpisodeReplayBuffer", "capacity": work.replay_size},
        epsilon=work.epsilon, target_network_update_freq=int(work.sync_rate / work.updates_per_step),
    )
    .fault_tolerance(restart_failed_env_runners=False)
    .rl_module(model_config=model)
    .reporting(min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=64)
)  # fmt: skip
algorithm = config.build_algo()


def totals() -> tuple[float, int, int]:
    """Train one iteration; return the time, and the steps sampled and trained so far."""
    result = algorithm.train()
    learners = result.get("learners", {}).get("__all_modules__", {})
    return (
        time.perf_counter(),
        int(result["num_env_steps_sampled_lifetime"]),
        int(learners.get("num_env_steps_trained_lifetime", 0)),
    )


seen = totals()
while not seen[2]:
    seen = totals()
begun = seen[0]
while seen[0] < begun + parsed.warm_up:
    seen = totals()
first = last = seen
while last[0] < first[0] + parsed.seconds:
    last = totals()
seconds, steps, trained = (b - a for a, b in zip(first, last, strict=True))
module = algorithm.get_module()
parameters = sum(p.numel() for name, p in module.named_parameters() if "target" not in name)
algorithm.stop()
ray.shutdown()
report(
    steps / seconds, parameters=parameters, batch_size=work.batch_size,
    updates_per_step=trained / work.batch_size / steps,
)  # fmt: skip
