"""Frames in shared memory: readers see the same frames as the owner, and never an overwritten frame."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from replay import frames
from replay.frames import FrameReader, SharedFrames
from replay.messages import Batch, SampleIndices
from replay.table import TableSpec, TransitionTable
from replay.types import Layout, Segment
from tests.replay.naive import Lane, assert_same_bits

pytestmark = pytest.mark.skipif(not frames._CAN_SHARE, reason="frames are shared only on Linux and x86")
STACKED = Layout((32, 32), "uint8", 4, (), "int64", 8, 1)


def make_table(layout: Layout, capacity: int, alpha: float | None = None, *, shared: bool = True) -> TransitionTable:
    return TransitionTable(TableSpec(layout, capacity, alpha), seed=np.random.SeedSequence(0), shared=shared)


def numbered(layout: Layout, number: int) -> Segment:
    """Return a full segment whose frames are filled with consecutive numbers from `number` on."""
    rows = np.arange(layout.segment_length, dtype=np.int32) + np.int32(layout.stack - 1)
    full = np.full(len(rows), layout.stack - 1, np.uint8)
    values = number + np.arange(layout.max_segment_frames)
    made = np.broadcast_to(values[:, None, None], (len(values), *layout.frame_shape)).astype(layout.frame_dtype)
    zero = np.zeros(len(rows), np.float32)
    return Segment(made, rows, full, rows + np.int32(layout.n_steps), full, number + rows.astype(np.int64), zero, zero)


def assert_numbered(batch: Batch, stack: int, n_steps: int) -> None:
    """Check that each frame has the number that the transition's action implies."""
    for observation, steps in ((batch.observation, 0), (batch.next_observation, n_steps)):
        expected = batch.action[..., None] + steps + np.arange(stack) - (stack - 1)
        shape = (*observation.shape[: expected.ndim], -1)
        found = observation.reshape(shape) if stack > 1 else observation.reshape(*expected.shape, -1)
        np.testing.assert_array_equal(found.min(-1), expected.astype(observation.dtype))
        np.testing.assert_array_equal(found.max(-1), expected.astype(observation.dtype))


@pytest.mark.parametrize("stack", [1, 2, 4])
@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("end_probability", [0.0, 0.3])
def test_a_reader_sees_what_the_owner_sees(stack: int, n_steps: int, end_probability: float) -> None:
    layout = Layout((32, 32), "uint8", stack, (2,), "float32", 8, n_steps)
    table, rng = make_table(layout, 50), np.random.default_rng(stack)
    lane, shared = Lane(layout, rng, end_probability), SharedFrames()
    for _ in range(40):
        segment, _ = lane.cut(8, flush=bool(rng.random() < 0.2))
        table.insert([segment])
        if not table.size:
            continue
        sampled = table.sample_indices(3, 5)
        batch = shared.batch(sampled)
        assert batch is not None
        for name, expected in vars(table._frames.batch(sampled)).items():
            if name == "size":
                assert batch.size == expected
            else:
                assert_same_bits(getattr(batch, name), expected)
    assert table.evicted > 50


def test_next_observations_share_memory_with_those_before_where_they_follow() -> None:
    table = make_table(STACKED, 50)
    table.insert([numbered(STACKED, 0)])
    batch = SharedFrames().batch(table.sample_indices(1, 8))
    assert batch is not None
    assert np.shares_memory(batch.observation, batch.next_observation)
    assert_numbered(batch, 4, 1)


def test_what_was_overwritten_meanwhile_is_not_handed_out() -> None:
    table = make_table(STACKED, 64)
    for number in range(8):
        table.insert([numbered(STACKED, 10 * number)])
    sampled, shared = table.sample_indices(1, 256), SharedFrames()
    assert shared.batch(sampled) is not None
    newest = sampled.action >= 70
    pick: Any = {name: values[newest][None] for name, values in vars(sampled).items() if isinstance(values, np.ndarray)}
    assert newest.any()
    # The frames of an evicted transition stay readable until they are overwritten.
    written = 0
    while shared.batch(sampled) is not None:
        table.insert([numbered(STACKED, 200)])
        written += 1
        assert written < 8
    assert table.evicted > 0
    kept = shared.batch(replace(sampled, **pick))
    assert kept is not None
    assert_numbered(kept, 4, 1)
    for _ in range(8):
        table.insert([numbered(STACKED, 200)])
    assert shared.batch(replace(sampled, **pick)) is None


def test_only_the_ring_itself_is_taken_for_it() -> None:
    table, other = make_table(STACKED, 64), make_table(STACKED, 64)
    handle, other_handle = table._frames.handle, other._frames.handle
    assert handle is not None
    assert other_handle is not None
    FrameReader(handle)
    for wrong in (
        replace(handle, pid=2**22 - 1),
        replace(handle, descriptor=other_handle.descriptor),
        replace(handle, descriptor=2),
        replace(handle, capacity=handle.capacity + 1),
        replace(handle, token=handle.token + 1),
    ):
        with pytest.raises(OSError, match=r".+"):
            FrameReader(wrong)
        shared, sampled = SharedFrames(), replace(filled(other), frames=wrong)
        assert shared.enabled
        assert shared.batch(sampled) is None
        assert not shared.enabled


def filled(table: TransitionTable) -> SampleIndices:
    table.insert([numbered(STACKED, 0)])
    return table.sample_indices(1, 4)


def test_counters_beyond_what_a_row_can_hold() -> None:
    table, shared = make_table(STACKED, 64), SharedFrames()
    ring, capacity = table._ring, table.spec.frame_capacity
    ring.newest_frame = ring.oldest_frame = 2**31 // capacity * capacity - 20
    for number in range(24):
        table.insert([numbered(STACKED, 10 * number)])
        sampled = table.sample_indices(1, 64)
        batch = shared.batch(sampled)
        assert batch is not None
        assert_numbered(batch, 4, 1)
        header = table._frames._header
        header[0] += 1  # simulate a write in progress
        shared.batch(replace(sampled, oldest_frame=int(header[0]) - capacity - 1))
        header[0] -= 1
    assert ring.oldest_frame > 2**31


def test_memory_that_cannot_be_shared_is_the_tables_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> int:
        raise PermissionError(name)

    monkeypatch.setattr(os, "memfd_create", refuse)
    table = make_table(STACKED, 64)
    assert table.frames_token is None
    table.insert([numbered(STACKED, 0)])
    assert_numbered(table.sample(1, 4), 4, 1)


def test_a_pipe_of_another_process_is_not_opened() -> None:
    table = make_table(STACKED, 64)
    handle = table._frames.handle
    assert handle is not None
    reading, writing = os.pipe()
    try:
        with pytest.raises(FileNotFoundError, match="must be the shared memory of a frame ring"):
            FrameReader(replace(handle, descriptor=reading))
    finally:
        os.close(reading)
        os.close(writing)


def test_a_reader_cannot_write() -> None:
    table = make_table(STACKED, 64)
    handle = table._frames.handle
    assert handle is not None
    with pytest.raises(ValueError, match="read-only"):
        FrameReader(handle)._array[0] = 1


def test_a_ring_goes_with_its_table() -> None:
    before = len(os.listdir("/proc/self/fd"))
    table = make_table(STACKED, 64)
    assert len(os.listdir("/proc/self/fd")) > before
    del table
    assert len(os.listdir("/proc/self/fd")) == before


def test_small_frames_and_tables_of_one_process_are_not_shared() -> None:
    assert make_table(Layout((4,), "float32", 1, (), "int64", 8, 1), 64).frames_token is None
    assert make_table(STACKED, 64, shared=False).frames_token is None
    assert make_table(STACKED, 64).frames_token is not None


def test_another_process_reads_them() -> None:
    table = make_table(STACKED, 64)
    table.insert([numbered(STACKED, 5)])
    script = (
        "import pickle, sys\n"
        "from replay.frames import SharedFrames\n"
        "batch = SharedFrames().batch(pickle.load(sys.stdin.buffer))\n"
        "sys.stdout.buffer.write(pickle.dumps(batch))"
    )
    sampled = table.sample_indices(2, 3)
    done = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(sampled), capture_output=True, check=True, timeout=60
    )
    batch = pickle.loads(done.stdout)
    assert_numbered(batch, 4, 1)
    assert_same_bits(batch.ids, sampled.ids)
