"""Resident bytes of one Atari transition in cpprb with `next_of` and `stack_compress`."""

from __future__ import annotations

import numpy as np
from cpprb import ReplayBuffer
from measure import arguments, report, resident

parsed = arguments("n-steps")
TRANSITIONS = 100_000
n = int(parsed.n_steps)
fields = {"obs": {"shape": (84, 84, 4), "dtype": np.uint8}, "act": {"dtype": np.int64}, "rew": {}, "done": {}}
nstep = {"size": n, "gamma": 0.99, "rew": "rew"} if n > 1 else None
options = {"Nstep": {**nstep, "next": "next_obs"}} if nstep else {}
before = resident()  # it touches all its memory as it is made
if n == 1:
    buffer = ReplayBuffer(TRANSITIONS, fields, next_of="obs", stack_compress="obs")
else:  # it refuses n-step returns beside `next_of`
    fields["next_obs"] = fields["obs"]
    buffer = ReplayBuffer(TRANSITIONS, fields, stack_compress=["obs", "next_obs"], **options)
rng = np.random.default_rng(0)
stack = rng.integers(0, 255, (84, 84, 4), np.uint8)
for _ in range(TRANSITIONS):
    buffer.add(obs=stack, act=0, rew=0.0, next_obs=stack, done=0.0)
report((resident() - before) / TRANSITIONS, transitions=TRANSITIONS)
