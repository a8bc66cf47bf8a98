"""Resident bytes of one Atari transition in Stable-Baselines3's buffer, the n-step one for n > 1."""

from __future__ import annotations

import numpy as np
from gymnasium import spaces
from measure import arguments, report, resident

parsed = arguments("n-steps")
from stable_baselines3.common import buffers  # noqa: E402

TRANSITIONS = 100_000
n = int(parsed.n_steps)
observation_space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
frames = np.random.default_rng(0).integers(0, 255, (1, 4, 84, 84), np.uint8)
before = resident()
if n == 1:
    buffer = buffers.ReplayBuffer(
        TRANSITIONS, observation_space, spaces.Discrete(6), optimize_memory_usage=True, handle_timeout_termination=False
    )
else:
    buffer = buffers.NStepReplayBuffer(TRANSITIONS, observation_space, spaces.Discrete(6), n_steps=n)
zero = np.zeros(1)
# 10,000 rows written and the rest reckoned from them: unoptimized, 100,000 would not fit into 24 GiB beside others.
WRITTEN = 10_000
for _ in range(WRITTEN):
    buffer.add(frames, frames, zero[:, None], zero, zero, [{}])
report((resident() - before) / WRITTEN, transitions=TRANSITIONS, written=WRITTEN)
