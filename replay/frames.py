"""Frames of a replay table: a ring buffer that other processes of the same node can read through shared memory.

A batch of images that a server returns is copied three times: out of the ring, into the object store, and out of the
object store. A `FrameRing` can therefore allocate its frames in shared memory. The server then replies to a sample call
with frame indices only, and a `FrameReader` in the caller's process gathers the frames: one copy, on the caller's core
rather than the server's.

Reader and writer do not block each other. The ring publishes the end of a write in its header *before* it writes the
frames, and the reader checks the header *after* it has gathered a batch. If a frame may have been overwritten
meanwhile, the reader discards the batch and the client samples again.
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
_MAX_TORN_READS = 3  # after so many discarded batches in a row, the client requests one batch as a copy
_COPIES_BEFORE_RETRY = 1_000  # if a ring cannot be mapped, the client requests so many copies before it tries again

# The reader's check requires that writes become visible in program order, which x86 guarantees; see `FrameRing.write`.
_CAN_SHARE = sys.platform == "linux" and platform.machine().lower() in ("x86_64", "amd64")


class FrameRing:
    """Ring buffer of `capacity` frames, addressed by a counter that only increases: slot = counter % capacity.

    Attributes:
        handle: location of the shared memory, or None if the frames are private to this process.
        array: `[capacity, *frame_shape]`, the frames.
    """

    def __init__(self, capacity: int, layout: Layout, *, shared: bool = False) -> None:
        """Allocate the ring.

        Args:
            capacity: number of frames.
            layout: shape and dtype of a frame, and number of stacked frames.
            shared: whether to allocate shared memory, for other processes of this node. If that is not possible, the
                frames are private and `handle` is None.
        """
        self._stack, self._fence = layout.stack, threading.Lock()
        self.handle: SharedMemoryHandle | None = None
        if shared and _CAN_SHARE:
            with contextlib.suppress(OSError):  # some sandboxes forbid anonymous shared memory
                self._share(capacity, layout)
        if self.handle is None:
            self.array = np.empty((capacity, *layout.frame_shape), layout.frame_dtype)
            self._header = np.zeros(2, np.int64)

    def _share(self, capacity: int, layout: Layout) -> None:
        # The memory has no name in the file system, so the kernel frees it when the last process that maps it exits.
        descriptor = os.memfd_create(_NAME)
        weakref.finalize(self, os.close, descriptor)
        os.ftruncate(descriptor, _HEADER_BYTES + capacity * layout.frame_bytes)
        handle = SharedMemoryHandle(os.getpid(), descriptor, secrets.randbits(62) + 1, capacity, layout)
        self._header, self.array = _map(descriptor, handle, mmap.ACCESS_WRITE)
        self._header[1] = handle.token
        self.handle = handle

    def write(self, counter: int, frames: Array) -> None:
        """Write frames, the first one at the slot of `counter`."""
        self._header[0] = counter + len(frames)
        # A large copy may use stores that are not ordered after earlier writes. Acquiring the lock is a memory barrier.
        with self._fence:
            pass
        write_ring(self.array, counter, frames)

    def batch(self, indices: SampleIndices) -> Batch:
        """Return the sampled transitions with their observations."""
        return _gather(indices, self.array, self._stack)


class FrameReader:
    """Read-only view of the `FrameRing` of another process."""

    def __init__(self, handle: SharedMemoryHandle) -> None:
        """Map the ring.

        Raises:
            OSError: the ring is on another node, or this process may not read it.
        """
        self.handle = handle
        path = f"/proc/{handle.pid}/fd/{handle.descriptor}"
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            raise FileNotFoundError(f"{path} must be the shared memory of a frame ring, got another file")
        descriptor = os.open(path, os.O_RDONLY)
        try:
            size, expected = os.fstat(descriptor).st_size, _HEADER_BYTES + handle.capacity * handle.layout.frame_bytes
            if size != expected:
                raise FileNotFoundError(f"{path} must have {expected} bytes, got {size}")
            self._header, self._array = _map(descriptor, handle, mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        if self._header[1] != handle.token:
            raise FileNotFoundError(f"{path} must have the token {handle.token}, got {self._header[1]}")

    def batch(self, indices: SampleIndices) -> Batch | None:
        """Return the sampled transitions with their observations; None if a frame may have been overwritten meanwhile.

        The two observation arrays may share memory.
        """
        stack = self.handle.layout.stack
        if stack > 1 and self._are_consecutive(indices):
            # An observation and the next one have all but one frame in common, so gather both as one window.
            window = _stack_frames(self._array, indices.bootstrap_row, indices.age.astype(np.int64) + 1, stack + 1)
            items = (slice(None),) * indices.row.ndim
            batch = _make_batch(indices, window[(*items, slice(None, -1))], window[(*items, slice(1, None))])
        else:
            batch = _gather(indices, self._array, stack)
        return batch if self._is_intact(indices) else None

    def _are_consecutive(self, indices: SampleIndices) -> bool:
        """Return whether each next observation follows its observation by exactly one frame."""
        next_row = (indices.row + 1) % self.handle.capacity
        age = np.minimum(indices.age.astype(np.int64) + 1, self.handle.layout.stack - 1)
        return bool((indices.bootstrap_row == next_row).all() and (indices.bootstrap_age == age).all())

    def _is_intact(self, indices: SampleIndices) -> bool:
        """Return whether no frame of the sampled transitions has been overwritten since they were sampled."""
        oldest_intact = int(self._header[0]) - self.handle.capacity
        if indices.oldest_frame >= oldest_intact:
            return True
        for rows, ages in ((indices.row, indices.age), (indices.bootstrap_row, indices.bootstrap_age)):
            counters = indices.oldest_frame + (rows.astype(np.int64) - indices.oldest_frame) % self.handle.capacity
            if (counters - ages < oldest_intact).any():
                return False
        return True


class SharedFrames:
    """A client's access to a server's frames through shared memory, where that is possible."""

    def __init__(self) -> None:
        """Start without a reader; the first call of `batch` maps the ring."""
        self._reader: FrameReader | None = None
        self._torn_reads = self._copies_left = 0

    @property
    def enabled(self) -> bool:
        """Whether to request the next sample as frame indices, rather than as a copy."""
        return not self._copies_left

    def batch(self, indices: SampleIndices) -> Batch | None:
        """Return the sampled transitions with their observations, or None if the caller must sample again."""
        assert indices.frames is not None
        reader = self._reader
        if reader is None or reader.handle != indices.frames:
            try:
                reader = self._reader = FrameReader(indices.frames)
            except OSError:
                self._copies_left = _COPIES_BEFORE_RETRY
                return None
        batch = reader.batch(indices)
        self._torn_reads = self._torn_reads + 1 if batch is None else 0
        if self._torn_reads == _MAX_TORN_READS:
            self._torn_reads, self._copies_left = 0, 1
        return batch

    def count_copy(self) -> None:
        """Count a batch that the server sent as a copy."""
        self._copies_left = max(self._copies_left - 1, 0)

    def reset(self) -> None:
        """Unmap the ring of an owner that has died.

        The recreated server needs the memory, and may run on another node than its predecessor.
        """
        self._reader, self._torn_reads, self._copies_left = None, 0, 0


def write_ring(ring: Array, counter: int, values: Array) -> None:
    """Write `values` into the array `ring` from slot `counter % len(ring)` on, in at most two parts."""
    start = counter % len(ring)
    head = min(len(values), len(ring) - start)
    ring[start : start + head] = values[:head]
    ring[: len(values) - head] = values[head:]


def _map(descriptor: int, handle: SharedMemoryHandle, access: int) -> tuple[Array, Array]:
    """Map a ring and return its header and its frames; either array keeps the mapping alive."""
    layout = handle.layout
    mapped = mmap.mmap(descriptor, _HEADER_BYTES + handle.capacity * layout.frame_bytes, access=access)
    header = np.frombuffer(mapped, np.int64, 2)
    frames = np.frombuffer(mapped, layout.frame_dtype, offset=_HEADER_BYTES)
    return header, frames.reshape(handle.capacity, *layout.frame_shape)


def _gather(indices: SampleIndices, frames: Array, stack: int) -> Batch:
    observation = _stack_frames(frames, indices.row, indices.age, stack)
    next_observation = _stack_frames(frames, indices.bootstrap_row, indices.bootstrap_age, stack)
    return _make_batch(indices, observation, next_observation)


def _stack_frames(frames: Array, rows: Array, ages: Array, stack: int) -> Array:
    """Return the stacks of frames that end at `rows` of the ring, with zero frames before an episode's first frame."""
    if stack == 1:
        return frames.take(rows, axis=0)
    back = np.arange(stack - 1, -1, -1)
    observations = frames.take(rows[..., None].astype(np.int64) - back, axis=0, mode="wrap")
    observations[back > ages[..., None]] = 0
    return observations


def _make_batch(indices: SampleIndices, observation: Array, next_observation: Array) -> Batch:
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
