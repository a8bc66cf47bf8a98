"""Frames of a replay table: a ring that is written on and on, and read where it lies by who is near.

A batch of images that a server hands out travels in three copies: out of the ring, into the object store, and out of
that again. A `FrameRing` can lie in memory that other processes of its node may map. A sample is then answered with
rows alone, and a `FrameReader` gathers them itself: one copy, on the core of who wants it rather than the server's.

Neither waits for the other. The ring tells how far it is written *before* it writes, and the reader looks at that
*after* it has gathered: what may have been overwritten meanwhile is not handed out, and asked for again.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import secrets
import sys
import threading
import weakref

import numpy as np

from replay.messages import Batch, SampleIndices, SharedMemoryHandle
from replay.types import Array, Layout

_HEADER_BYTES = mmap.PAGESIZE
_NAME = "squall-frames"
_MOST_TRIES = 3
_COPIES_ELSEWHERE = 1_000

# The check stands on writes being seen in the order they were made, which these processors promise; see also `write`.
_CAN_SHARE = sys.platform == "linux" and platform.machine().lower() in ("x86_64", "amd64")


class FrameRing:
    """Room for `capacity` frames, addressed by a counter that only grows; a counter's slot is its remainder."""

    def __init__(self, capacity: int, layout: Layout, *, shared: bool = False) -> None:
        """Allocate the room.

        Args:
            capacity: frames.
            layout: shape and dtype of a frame, and how many are stacked.
            shared: whether other processes of this node may read it; where that cannot be, `handle` is None.
        """
        self._stack, self._fence = layout.stack, threading.Lock()
        self.handle: SharedMemoryHandle | None = None
        if shared and _CAN_SHARE:
            with contextlib.suppress(OSError):  # not every sandbox lets a process have such memory
                self._share(capacity, layout)
        if self.handle is None:
            self.array = np.empty((capacity, *layout.frame_shape), layout.frame_dtype)
            self._header = np.zeros(2, np.int64)

    def _share(self, capacity: int, layout: Layout) -> None:
        # It has no name in the file system, so nothing is left of it when the last process that maps it is gone.
        descriptor = os.memfd_create(_NAME)
        weakref.finalize(self, os.close, descriptor)
        os.ftruncate(descriptor, _HEADER_BYTES + capacity * layout.frame_bytes)
        handle = SharedMemoryHandle(os.getpid(), descriptor, secrets.randbits(62) + 1, capacity, layout)
        self._header, self.array = _map(descriptor, handle, mmap.ACCESS_WRITE)
        self._header[1] = handle.token
        self.handle = handle

    def write(self, counter: int, frames: Array) -> None:
        """Write frames from a counter's slot on."""
        self._header[0] = counter + len(frames)
        with self._fence:  # large copies may pass by the order of writes; a lock's instruction does not let them
            pass
        write_ring(self.array, counter, frames)

    def batch(self, indices: SampleIndices) -> Batch:
        """Gather what was drawn."""
        return _gathered(indices, self.array, self._stack)


class FrameReader:
    """Gathers out of another process's ring."""

    def __init__(self, handle: SharedMemoryHandle) -> None:
        """Map the ring.

        Raises:
            OSError: it is not on this node, or not to be read from this process.
        """
        self.handle = handle
        path = f"/proc/{handle.pid}/fd/{handle.descriptor}"
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            raise FileNotFoundError(f"{path} is no ring of frames")
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if os.fstat(descriptor).st_size != _HEADER_BYTES + handle.capacity * handle.layout.frame_bytes:
                raise FileNotFoundError(f"process {handle.pid} holds something else here")
            self._header, self._array = _map(descriptor, handle, mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        if self._header[1] != handle.token:
            raise FileNotFoundError(f"process {handle.pid} holds another ring here")

    def batch(self, indices: SampleIndices) -> Batch | None:
        """Gather what was drawn; None if some of it may have been overwritten meanwhile.

        The observations may share memory with each other.
        """
        stack = self.handle.layout.stack
        if stack > 1 and self._follow(indices):
            # One window over both observations: they have all frames but one in common.
            window = _stacked(self._array, indices.bootstrap_row, indices.age.astype(np.int64) + 1, stack + 1)
            each = (slice(None),) * indices.row.ndim
            batch = _batch(indices, window[(*each, slice(None, -1))], window[(*each, slice(1, None))])
        else:
            batch = _gathered(indices, self._array, stack)
        return batch if self._is_intact(indices) else None

    def _follow(self, indices: SampleIndices) -> bool:
        """Return whether each next observation is the one that follows."""
        following = (indices.row + 1) % self.handle.capacity
        age = np.minimum(indices.age.astype(np.int64) + 1, self.handle.layout.stack - 1)
        return bool((indices.bootstrap_row == following).all() and (indices.bootstrap_age == age).all())

    def _is_intact(self, indices: SampleIndices) -> bool:
        still_there = int(self._header[0]) - self.handle.capacity
        if indices.oldest_frame >= still_there:
            return True
        for rows, ages in ((indices.row, indices.age), (indices.bootstrap_row, indices.bootstrap_age)):
            counters = indices.oldest_frame + (rows.astype(np.int64) - indices.oldest_frame) % self.handle.capacity
            if (counters - ages < still_there).any():
                return False
        return True


class SharedFrames:
    """What a client knows of a server's frames: whether it can read them itself, and how."""

    def __init__(self) -> None:
        """Know nothing yet, so try."""
        self._reader: FrameReader | None = None
        self._torn = self._copies_due = 0

    @property
    def wanted(self) -> bool:
        """Whether the next sample is to be answered with rows alone."""
        return not self._copies_due

    def batch(self, indices: SampleIndices) -> Batch | None:
        """Gather what was drawn; None if that cannot be, so that it is to be asked for again."""
        assert indices.frames is not None
        reader = self._reader
        if reader is None or reader.handle != indices.frames:
            try:
                reader = self._reader = FrameReader(indices.frames)
            except OSError:
                self._copies_due = _COPIES_ELSEWHERE
                return None
        batch = reader.batch(indices)
        self._torn = self._torn + 1 if batch is None else 0
        if self._torn == _MOST_TRIES:
            self._torn, self._copies_due = 0, 1
        return batch

    def copied(self) -> None:
        """Take note that a batch came by copy; after some the next may be rows again."""
        self._copies_due = max(self._copies_due - 1, 0)

    def forget(self) -> None:
        """Let go of a ring whose owner is gone: its successor needs the memory, and may be nearer or farther."""
        self._reader, self._torn, self._copies_due = None, 0, 0


def write_ring(store: Array, counter: int, values: Array) -> None:
    """Write `values` at a growing counter's place in the ring `store`, in at most two pieces."""
    start = counter % len(store)
    head = min(len(values), len(store) - start)
    store[start : start + head] = values[:head]
    store[: len(values) - head] = values[head:]


def _map(descriptor: int, handle: SharedMemoryHandle, access: int) -> tuple[Array, Array]:
    """Return header and frames; they keep the mapping alive."""
    layout = handle.layout
    mapped = mmap.mmap(descriptor, _HEADER_BYTES + handle.capacity * layout.frame_bytes, access=access)
    header = np.frombuffer(mapped, np.int64, 2)
    frames = np.frombuffer(mapped, layout.frame_dtype, offset=_HEADER_BYTES)
    return header, frames.reshape(handle.capacity, *layout.frame_shape)


def _gathered(indices: SampleIndices, frames: Array, stack: int) -> Batch:
    observation = _stacked(frames, indices.row, indices.age, stack)
    return _batch(indices, observation, _stacked(frames, indices.bootstrap_row, indices.bootstrap_age, stack))


def _stacked(frames: Array, rows: Array, ages: Array, stack: int) -> Array:
    """Return at each row the frame there and its predecessors, zero before the episode's first."""
    if stack == 1:
        return frames.take(rows, axis=0)
    back = np.arange(stack - 1, -1, -1)
    observations = frames.take(rows[..., None].astype(np.int64) - back, axis=0, mode="wrap")
    observations[back > ages[..., None]] = 0
    return observations


def _batch(indices: SampleIndices, observation: Array, next_observation: Array) -> Batch:
    return Batch(
        observation=observation,
        action=indices.action,
        reward=indices.reward,
        discount=indices.discount,
        next_observation=next_observation,
        ids=indices.ids,
        probability=indices.probability,
        size=indices.size,
    )
