"""Frames read where they lie: the same as gathered by their owner, and never one that was overwritten meanwhile."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from replay import frames
from replay.client import ReplayClient
from replay.frames import FrameReader, SharedFrames
from replay.messages import Batch, Push, SampleIndices, SamplePlan, SharedMemoryHandle
from replay.remote import RemoteActor
from replay.server import ReplayActor, ReplayServer, ReplaySpec
from replay.sharding.client import ShardedReplayClient
from replay.sharding.reporter import ShardReporter
from replay.sharding.router import ReplayRouterActor
from replay.sharding.shard import ReplayShardActor
from replay.table import TableSpec, TransitionTable
from replay.types import Array, Layout, Moments, Segment
from tests.replay.naive import Lane, assert_same_bits

pytestmark = pytest.mark.skipif(not frames._CAN_SHARE, reason="frames are shared on Linux and x86 alone")
STACKED = Layout((32, 32), "uint8", 4, (), "int64", 8, 1)
FREE = {"samples_per_insert": float("inf"), "minimum_size": 1, "largest_push": 256}


def make_table(layout: Layout, capacity: int, alpha: float | None = None, *, shared: bool = True) -> TransitionTable:
    return TransitionTable(TableSpec(layout, capacity, alpha), seed=np.random.SeedSequence(0), shared=shared)


def numbered(layout: Layout, number: int) -> Segment:
    """Return a full segment each of whose frames is filled with a number of its own, the segment's first."""
    rows = np.arange(layout.segment_length, dtype=np.int32) + np.int32(layout.stack - 1)
    full = np.full(len(rows), layout.stack - 1, np.uint8)
    values = number + np.arange(layout.max_segment_frames)
    made = np.broadcast_to(values[:, None, None], (len(values), *layout.frame_shape)).astype(layout.frame_dtype)
    zero = np.zeros(len(rows), np.float32)
    return Segment(made, rows, full, rows + np.int32(layout.n_steps), full, number + rows.astype(np.int64), zero, zero)


def assert_numbered(batch: Batch, stack: int, n_steps: int) -> None:
    """Every frame holds the number that the action says it must hold."""
    for observation, steps in ((batch.observation, 0), (batch.next_observation, n_steps)):
        wanted = batch.action[..., None] + steps + np.arange(stack) - (stack - 1)
        shape = (*observation.shape[: wanted.ndim], -1)
        found = observation.reshape(shape) if stack > 1 else observation.reshape(*wanted.shape, -1)
        np.testing.assert_array_equal(found.min(-1), wanted.astype(observation.dtype))
        np.testing.assert_array_equal(found.max(-1), wanted.astype(observation.dtype))


@pytest.mark.parametrize("stack", [1, 2, 4])
@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("end_probability", [0.0, 0.3])
def test_a_reader_sees_what_the_owner_sees(stack: int, n_steps: int, end_probability: float) -> None:
    layout = Layout((32, 32), "uint8", stack, (2,), "float32", 8, n_steps)
    table, rng = make_table(layout, 50), np.random.default_rng(stack)
    lane, near = Lane(layout, rng, end_probability), SharedFrames()
    for _ in range(40):
        segment, _ = lane.cut(8, flush=bool(rng.random() < 0.2))
        table.insert([segment])
        if not table.size:
            continue
        drawn = table.sample_indices(3, 5)
        batch = near.batch(drawn)
        assert batch is not None
        for name, expected in vars(table._frames.batch(drawn)).items():
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
    drawn, near = table.sample_indices(1, 256), SharedFrames()
    assert near.batch(drawn) is not None
    newest = drawn.action >= 70
    pick: Any = {name: values[newest][None] for name, values in vars(drawn).items() if isinstance(values, np.ndarray)}
    assert newest.any()
    # What the table evicts lies there until it is written over.
    written = 0
    while near.batch(drawn) is not None:
        table.insert([numbered(STACKED, 200)])
        written += 1
        assert written < 8
    assert table.evicted > 0
    kept = near.batch(replace(drawn, **pick))
    assert kept is not None
    assert_numbered(kept, 4, 1)
    for _ in range(8):
        table.insert([numbered(STACKED, 200)])
    assert near.batch(replace(drawn, **pick)) is None


def test_only_the_ring_itself_is_taken_for_it() -> None:
    table, other = make_table(STACKED, 64), make_table(STACKED, 64)
    location, stranger = table._frames.location, other._frames.location
    assert location is not None
    assert stranger is not None
    FrameReader(location)
    for wrong in (
        replace(location, pid=2**22 - 1),
        replace(location, descriptor=stranger.descriptor),
        replace(location, descriptor=2),
        replace(location, capacity=location.capacity + 1),
        replace(location, token=location.token + 1),
    ):
        with pytest.raises(OSError, match=r".+"):
            FrameReader(wrong)
        near, drawn = SharedFrames(), replace(filled(other), frames=wrong)
        assert near.wanted
        assert near.batch(drawn) is None
        assert not near.wanted


def filled(table: TransitionTable) -> SampleIndices:
    table.insert([numbered(STACKED, 0)])
    return table.sample_indices(1, 4)


def test_counters_beyond_what_a_row_can_hold() -> None:
    table, near = make_table(STACKED, 64), SharedFrames()
    ring, capacity = table._ring, table.spec.frame_capacity
    ring.newest_frame = ring.oldest_frame = 2**31 // capacity * capacity - 20
    for number in range(24):
        table.insert([numbered(STACKED, 10 * number)])
        drawn = table.sample_indices(1, 64)
        batch = near.batch(drawn)
        assert batch is not None
        assert_numbered(batch, 4, 1)
        header = table._frames._header
        header[0] += 1  # as if the next were being written
        near.batch(replace(drawn, oldest_frame=int(header[0]) - capacity - 1))
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
    location = table._frames.location
    assert location is not None
    reading, writing = os.pipe()
    try:
        with pytest.raises(FileNotFoundError, match="no ring"):
            FrameReader(replace(location, descriptor=reading))
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("shards", [0, 2])
def test_a_client_that_travelled_lets_go_too(shards: int) -> None:
    """The learner gets its client as an argument; a dead server's memory is wanted by its successor."""
    near: list[RemoteActor] = [RemoteActor("replay")]
    here: Any = ReplayClient(near[0], deadline_seconds=7.0)
    if shards:
        here = ShardedReplayClient(RemoteActor("desk"), [RemoteActor("a"), RemoteActor("b")], deadline_seconds=7.0)
    client = pickle.loads(pickle.dumps(here))
    assert type(client) is type(here)
    assert client._deadline == 7.0
    parts = (
        zip(client._shards, client._shard_frames, strict=True) if shards else [(client._actor, client._shared_frames)]
    )
    for actor, of in parts:
        table = make_table(STACKED, 64)
        assert of.batch(filled(table)) is not None
        client._asked[1, 4] = "a call of the server that is gone"
        (client._actor if shards else actor).forget()
        assert not client._asked
        actor.forget()
        assert of._reader is None


def test_a_client_lets_go_of_a_shard_that_the_desk_names_no_more() -> None:
    client = ShardedReplayClient(RemoteActor("desk"), [RemoteActor("a"), RemoteActor("b")])
    table, nobody = make_table(STACKED, 64), np.empty(0, np.int64)
    for incarnations, kept in (({0: 0, 1: 0}, True), ({0: 0}, False), ({0: 0, 1: 1}, True), ({0: 0, 1: 2}, False)):
        if kept:
            assert client._shard_frames[1].batch(filled(table)) is not None
        client._draw(SamplePlan(nobody, nobody.astype(float), {}, incarnations, 0, Moments()), 1.0, None)
        assert (client._shard_frames[1]._reader is not None) == kept, incarnations


def test_a_reader_cannot_write() -> None:
    table = make_table(STACKED, 64)
    location = table._frames.location
    assert location is not None
    with pytest.raises(ValueError, match="read-only"):
        FrameReader(location)._array[0] = 1


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
    drawn = table.sample_indices(2, 3)
    done = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(drawn), capture_output=True, check=True, timeout=60
    )
    batch = pickle.loads(done.stdout)
    assert_numbered(batch, 4, 1)
    assert_same_bits(batch.ids, drawn.ids)


def test_a_client_lets_go_of_a_ring_whose_owner_is_gone() -> None:
    table = make_table(STACKED, 64)
    near, drawn = SharedFrames(), filled(table)
    actor = RemoteActor("nobody")
    actor.when_gone = near.forget
    assert near.batch(drawn) is not None
    actor.forget()
    maps = Path("/proc/self/maps").read_text().count("squall-frames")
    del table
    assert Path("/proc/self/maps").read_text().count("squall-frames") == maps - 1
    assert near.batch(drawn) is None, "it is gone"
    actor.forget()
    assert near.wanted, "the next one may be here"


# Through the server.


def server_spec(capacity: int = 2_000) -> ReplaySpec:
    return ReplaySpec(TableSpec(STACKED, capacity), batch_size=32, batches_per_sample=4, **FREE)  # type: ignore[arg-type]


def test_what_is_asked_for_again_counts_once() -> None:
    server = ReplayServer(replace(server_spec(), samples_per_insert=16.0), run_seed=0)
    server.insert(Push(0, 0, 0, tuple(numbered(STACKED, 0) for _ in range(4))))
    first = server.sample(4, 32, rows_only=True)
    assert first.draw is not None
    assert first.draw.frames is not None
    assert first.batch is None
    counted = server.stats().counters.samples
    assert counted == 128
    token = first.draw.frames.token
    assert server.sample(4, 32, instead_of=token).batch is not None
    assert server.stats().counters.samples == counted
    server.finish()
    assert server.sample(4, 32, instead_of=token).batch is not None, "granted before the end"


def test_what_another_server_granted_is_granted_anew() -> None:
    server = ReplayServer(server_spec(), run_seed=0, incarnation=1)
    server.insert(Push(0, 0, 0, (numbered(STACKED, 0),)))
    assert server.sample(1, 4, instead_of=12345).batch is not None
    assert server.stats().counters.samples == 4
    empty = ReplayServer(server_spec(), run_seed=0)
    assert empty.sample(1, 4, instead_of=12345).wait is not None


class _InProcess:
    """Stands for a `RemoteActor` whose server is in this process."""

    def __init__(self, server: ReplayServer) -> None:
        self.server, self.calls = server, list[tuple[Any, ...]]()
        self.when_gone: Any = None

    def call(self, method: str, *arguments: Any, seconds: float, stop: Any = None, asked: Any = None) -> Any:
        self.calls.append(arguments)
        return getattr(self.server, method)(*arguments)


def test_a_client_elsewhere_gets_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(location: SharedMemoryHandle) -> FrameReader:
        raise FileNotFoundError(location.pid)

    server = ReplayServer(server_spec(), run_seed=0)
    server.insert(Push(0, 0, 0, (numbered(STACKED, 0),)))
    actor = _InProcess(server)
    client = ReplayClient(actor)  # type: ignore[arg-type]
    monkeypatch.setattr(frames, "FrameReader", refuse)
    for _ in range(3):
        reply = client.sample(1, 4)
        assert reply is not None
        assert reply.batch is not None
        assert_numbered(reply.batch, 4, 1)
    # Rows in vain once, and the same again by copy.
    token = server._table.frames_token
    assert [call[2:] for call in actor.calls] == [(True, None), (False, token), (False, None), (False, None)]
    assert server.stats().counters.samples == 12
    monkeypatch.undo()
    for _ in range(frames._COPIES_ELSEWHERE):
        client.sample(1, 4)
    assert actor.calls[-1][2], "after a while it looks again, for a server may be recreated here"
    assert client._shared_frames._reader is not None


def test_a_client_too_slow_for_the_writer_gets_a_copy_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ReplayServer(server_spec(), run_seed=0)
    server.insert(Push(0, 0, 0, (numbered(STACKED, 0),)))
    actor = _InProcess(server)
    client = ReplayClient(actor)  # type: ignore[arg-type]
    monkeypatch.setattr(FrameReader, "_is_intact", lambda self, draw: False)
    for _ in range(2):
        reply = client.sample(1, 4)
        assert reply is not None
        assert reply.batch is not None
    assert [call[2] for call in actor.calls] == [True, True, True, False] * 2
    assert server.stats().counters.samples == 8


@ray.remote(num_cpus=0)
class _Writer:
    def run(self, client: Any, pushes: int) -> int:
        """Push as fast as can be, so that what is drawn is overwritten again and again."""
        for sequence in range(pushes):
            segments = tuple(numbered(STACKED, 7 * sequence + 11 * lane) for lane in range(4))
            client.insert(Push(0, 0, sequence, segments))
        return pushes


@pytest.fixture
def started() -> Iterator[Callable[..., RemoteActor]]:
    handles = []

    def start(actor: Any, name: str, *arguments: Any, **options: Any) -> RemoteActor:
        handles.append(actor.options(name=name).remote(*arguments, **options))
        return RemoteActor(name)

    yield start
    for handle in handles:
        ray.kill(handle)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("shards", [1, 2])
def test_no_batch_is_torn_while_another_process_writes(started: Callable[..., RemoteActor], shards: int) -> None:
    # So small that the writer comes round several times a second.
    spec, name = server_spec(capacity=256), f"frames-{os.getpid()}-{shards}"
    if shards == 1:
        client = ReplayClient(started(ReplayActor, name, spec, run_seed=0))
    else:
        router = started(ReplayRouterActor, name, spec, run_seed=0, shards=2)
        rooms = [
            started(ReplayShardActor, f"{name}-{i}", spec, run_seed=0, shard=i, shards=2, router=ShardReporter(router))
            for i in range(2)
        ]
        client = ShardedReplayClient(router, rooms)
    writer = _Writer.remote()
    writing = writer.run.remote(client, 1_500)
    seen: list[Array] = []
    while not ray.wait([writing], timeout=0)[0] or len(seen) < 50:
        reply = client.sample(2, 32)
        assert reply is not None
        assert reply.batch is not None
        assert_numbered(reply.batch, 4, 1)
        seen.append(reply.batch.ids)
    assert ray.get(writing) == 1_500
    assert max(ids.max() for ids in seen) > min(ids.min() for ids in seen) + 256, "the ring was written round"
    near = client._shared_frames if shards == 1 else client._shard_frames[0]  # type: ignore[attr-defined]
    assert near._reader is not None, "and frames were read where they lie"
    ray.kill(writer)
