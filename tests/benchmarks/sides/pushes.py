"""Pushes of segments as rollout workers send them, of frames that were played."""

from __future__ import annotations

import numpy as np
from items import LENGTH, STACK, frames_of

from replay.types import Layout, Segment, Segments, join_segments


def layout_of(kind: str) -> Layout:
    """Return the layout of `atari` or `vector` items."""
    if kind == "atari":
        return Layout((84, 84), "uint8", STACK, (), "int64", LENGTH[kind], 1)
    return Layout((4,), "float32", 1, (), "int64", LENGTH[kind], 1)


def pushes_of(kind: str, frames: int, lanes: int) -> list[Segments]:
    """Return pushes of a segment of each lane, cut from a run of so many frames."""
    layout, run = layout_of(kind), frames_of(kind, frames)
    rows, length, stack = layout.max_segment_frames, layout.segment_length, layout.stack
    row = np.arange(length, dtype=np.int32) + stack - 1
    age = np.full(length, stack - 1, np.uint8)
    zero, one = np.zeros(length, np.float32), np.ones(length, np.float32)

    def segment(at: int) -> Segment:
        return Segment(run[at : at + rows].copy(), row, age, row + 1, age, np.zeros(length, np.int64), zero, one)

    cut = [segment(at) for at in range(0, len(run) - rows, length)]
    return [join_segments(cut[i : i + lanes], layout) for i in range(0, len(cut) - lanes, lanes)]
