"""The raw vector environment, and a bare batched forward for its actions."""

from __future__ import annotations

from measure import arguments, rate, report

parsed = arguments("env", "lanes")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from actors.environments import seeds_for, specify  # noqa: E402
from learner import DQN  # noqa: E402
from replay.seeds import spawn_seed  # noqa: E402

lanes = int(parsed.lanes)
torch.set_num_threads(parsed.threads)
environment = specify(parsed.env)
env = environment.make(lanes)
network = DQN(parsed.env).policy.q_network
rng = np.random.default_rng(0)
actions = int(network(torch.zeros(1, *environment.observation_shape)).shape[1])
observation, _ = env.reset(seed=seeds_for(env, spawn_seed(0, "bare")))


def step() -> int:
    """Choose actions for all lanes, one in twenty at random, and step."""
    global observation
    with torch.inference_mode():
        action = network(torch.from_numpy(observation)).argmax(1).numpy()
    explore = rng.random(lanes) < 0.05
    if explore.any():
        action = np.where(explore, rng.integers(actions, size=lanes), action)
    observation = env.step(action)[0]
    return lanes


report(rate(step, parsed.warm_up, parsed.seconds), lanes=lanes)
