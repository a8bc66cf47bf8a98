"""Resident bytes of one Atari transition in Squall's table."""

from __future__ import annotations

import numpy as np
from measure import arguments, report, resident

parsed = arguments("n-steps")

from replay.seeds import spawn_seed  # noqa: E402
from replay.table import TableSpec, TransitionTable  # noqa: E402
from replay.types import Layout, Segment  # noqa: E402

TRANSITIONS, LENGTH, STACK = 100_000, 64, 4
n = int(vars(parsed)["n_steps"])
layout = Layout((84, 84), "uint8", STACK, (), "int64", LENGTH, n)
frames = np.random.default_rng(0).integers(0, 255, (layout.max_segment_frames, 84, 84), np.uint8)
row = np.arange(LENGTH, dtype=np.int32) + STACK - 1
age = np.full(LENGTH, STACK - 1, np.uint8)
segment = Segment(
    frames, row, age, row + n, age, np.zeros(LENGTH, np.int64), np.zeros(LENGTH, np.float32),
    np.ones(LENGTH, np.float32),
)  # fmt: skip
before = resident()
table = TransitionTable(TableSpec(layout, TRANSITIONS), seed=spawn_seed(0, "bench"))
while table.evicted == 0:
    table.insert([segment])
report((resident() - before) / table.size, transitions=TRANSITIONS, held=table.size)
