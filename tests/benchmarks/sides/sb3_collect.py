"""Stable-Baselines3's vector of processes, and its policy's batched actions."""

from __future__ import annotations

from measure import arguments, rate, report

parsed = arguments("env", "lanes")

import ale_py  # noqa: E402
import gymnasium  # noqa: E402
import torch  # noqa: E402
from stable_baselines3 import DQN  # noqa: E402
from stable_baselines3.common.env_util import make_atari_env, make_vec_env  # noqa: E402
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack  # noqa: E402

gymnasium.register_envs(ale_py)  # in the processes of the vector too

if __name__ == "__main__":
    lanes = int(parsed.lanes)
    torch.set_num_threads(parsed.threads)
    kind = SubprocVecEnv if lanes <= 16 else DummyVecEnv  # a process for each of 64 small environments is slower
    if "Frameskip" in parsed.env:
        env = VecFrameStack(make_atari_env(parsed.env, lanes, vec_env_cls=kind), 4)
        model = DQN("CnnPolicy", env, buffer_size=100)
    else:
        env = make_vec_env(parsed.env, lanes, vec_env_cls=kind)
        model = DQN("MlpPolicy", env, buffer_size=100, policy_kwargs={"net_arch": [256, 256]})
    observation = env.reset()

    def step() -> int:
        """Choose actions for all lanes and step."""
        global observation
        action, _ = model.predict(observation, deterministic=False)
        observation = env.step(action)[0]
        return lanes

    found = rate(step, parsed.warm_up, parsed.seconds)
    env.close()
    report(found, lanes=lanes)
