"""Clients and servers that share frames: retries, copies, and dead servers."""

from __future__ import annotations

import os
import pickle
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
from replay.messages import Push, SamplePlan, SharedMemoryHandle
from replay.remote import RemoteActor
from replay.server import ReplayActor, ReplayServer, ReplaySpec
from replay.sharding.client import ShardedReplayClient
from replay.sharding.reporter import ShardReporter
from replay.sharding.router import ReplayRouterActor
from replay.sharding.shard import ReplayShardActor
from replay.table import TableSpec
from replay.types import Array, Moments
from tests.replay.test_frames import STACKED, assert_numbered, filled, make_table, numbered

pytestmark = pytest.mark.skipif(not frames._CAN_SHARE, reason="frames are shared only on Linux and x86")
FREE = {"samples_per_insert": float("inf"), "minimum_size": 1, "largest_push": 256}


@pytest.mark.parametrize("shards", [0, 2])
def test_a_client_that_travelled_lets_go_too(shards: int) -> None:
    """A pickled client, as that of the learner, unmaps a dead server's memory, which the successor needs."""
    actors: list[RemoteActor] = [RemoteActor("replay")]
    original: Any = ReplayClient(actors[0], deadline_seconds=7.0)
    if shards:
        original = ShardedReplayClient(
            RemoteActor("router"), [RemoteActor("a"), RemoteActor("b")], deadline_seconds=7.0
        )
    client = pickle.loads(pickle.dumps(original))
    assert type(client) is type(original)
    assert client._deadline == 7.0
    parts = (
        zip(client._shards, client._shard_frames, strict=True) if shards else [(client._actor, client._shared_frames)]
    )
    for actor, shared in parts:
        table = make_table(STACKED, 64)
        assert shared.batch(filled(table)) is not None
        client._prefetched[1, 4] = "a call to the dead server"
        (client._actor if shards else actor).forget()
        assert not client._prefetched
        actor.forget()
        assert shared._reader is None


def test_a_client_unmaps_a_shard_that_the_router_no_longer_names() -> None:
    client = ShardedReplayClient(RemoteActor("router"), [RemoteActor("a"), RemoteActor("b")])
    table, empty = make_table(STACKED, 64), np.empty(0, np.int64)
    for incarnations, kept in (({0: 0, 1: 0}, True), ({0: 0}, False), ({0: 0, 1: 1}, True), ({0: 0, 1: 2}, False)):
        if kept:
            assert client._shard_frames[1].batch(filled(table)) is not None
        client._sample_shards(SamplePlan(empty, empty.astype(float), {}, incarnations, 0, Moments()), 1.0, None)
        assert (client._shard_frames[1]._reader is not None) == kept, incarnations


def test_a_client_lets_go_of_a_ring_whose_owner_is_gone() -> None:
    table = make_table(STACKED, 64)
    shared, sampled = SharedFrames(), filled(table)
    actor = RemoteActor("replay")
    actor.on_forget = shared.reset
    assert shared.batch(sampled) is not None
    actor.forget()
    maps = Path("/proc/self/maps").read_text().count("squall-frames")
    del table
    assert Path("/proc/self/maps").read_text().count("squall-frames") == maps - 1
    assert shared.batch(sampled) is None, "the ring no longer exists"
    actor.forget()
    assert shared.enabled, "the recreated server may run on this node"


def server_spec(capacity: int = 2_000) -> ReplaySpec:
    return ReplaySpec(TableSpec(STACKED, capacity), batch_size=32, batches_per_sample=4, **FREE)  # type: ignore[arg-type]


def test_what_is_asked_for_again_counts_once() -> None:
    server = ReplayServer(replace(server_spec(), samples_per_insert=16.0), run_seed=0)
    server.insert(Push(0, 0, 0, tuple(numbered(STACKED, 0) for _ in range(4))))
    first = server.sample(4, 32, indices_only=True)
    assert first.indices is not None
    assert first.indices.frames is not None
    assert first.batch is None
    counted = server.stats().counters.samples
    assert counted == 128
    token = first.indices.frames.token
    assert server.sample(4, 32, retry_of=token).batch is not None
    assert server.stats().counters.samples == counted
    server.finish()
    assert server.sample(4, 32, retry_of=token).batch is not None, "the sample was counted before the end of the run"


def test_what_another_server_granted_is_granted_anew() -> None:
    server = ReplayServer(server_spec(), run_seed=0, incarnation=1)
    server.insert(Push(0, 0, 0, (numbered(STACKED, 0),)))
    assert server.sample(1, 4, retry_of=12345).batch is not None
    assert server.stats().counters.samples == 4
    empty = ReplayServer(server_spec(), run_seed=0)
    assert empty.sample(1, 4, retry_of=12345).wait is not None


class _InProcess:
    """Replacement of a `RemoteActor`, with the server in this process."""

    def __init__(self, server: ReplayServer) -> None:
        self.server, self.calls = server, list[tuple[Any, ...]]()
        self.on_forget: Any = None

    def call(self, method: str, *arguments: Any, seconds: float, stop: Any = None, pending: Any = None) -> Any:
        self.calls.append(arguments)
        return getattr(self.server, method)(*arguments)


def test_a_client_elsewhere_gets_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: SharedMemoryHandle) -> FrameReader:
        raise FileNotFoundError(handle.pid)

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
    # The first sample fails as frame indices and is repeated as a copy.
    token = server._table.frames_token
    assert [call[2:] for call in actor.calls] == [(True, None), (False, token), (False, None), (False, None)]
    assert server.stats().counters.samples == 12
    monkeypatch.undo()
    for _ in range(frames._COPIES_BEFORE_RETRY):
        client.sample(1, 4)
    assert actor.calls[-1][2], "after many copies the client tries again: the server may now be on this node"
    assert client._shared_frames._reader is not None


def test_a_client_too_slow_for_the_writer_gets_a_copy_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ReplayServer(server_spec(), run_seed=0)
    server.insert(Push(0, 0, 0, (numbered(STACKED, 0),)))
    actor = _InProcess(server)
    client = ReplayClient(actor)  # type: ignore[arg-type]
    monkeypatch.setattr(FrameReader, "_is_intact", lambda self, indices: False)
    for _ in range(2):
        reply = client.sample(1, 4)
        assert reply is not None
        assert reply.batch is not None
    assert [call[2] for call in actor.calls] == [True, True, True, False] * 2
    assert server.stats().counters.samples == 8


@ray.remote(num_cpus=0)
class _Writer:
    def run(self, client: Any, pushes: int) -> int:
        """Push as fast as possible, so that sampled frames are overwritten repeatedly."""
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
    # The ring is so small that the writer wraps around several times per second.
    spec, name = server_spec(capacity=256), f"frames-{os.getpid()}-{shards}"
    if shards == 1:
        client = ReplayClient(started(ReplayActor, name, spec, run_seed=0))
    else:
        router = started(ReplayRouterActor, name, spec, run_seed=0, shards=2)
        replay_shards = [
            started(ReplayShardActor, f"{name}-{i}", spec, run_seed=0, shard=i, shards=2, router=ShardReporter(router))
            for i in range(2)
        ]
        client = ShardedReplayClient(router, replay_shards)
    writer = _Writer.remote()
    writing = writer.run.remote(client, 600)
    seen: list[Array] = []
    while not ray.wait([writing], timeout=0)[0] or len(seen) < 50:
        reply = client.sample(2, 32)
        assert reply is not None
        assert reply.batch is not None
        assert_numbered(reply.batch, 4, 1)
        seen.append(reply.batch.ids)
    assert ray.get(writing) == 600
    assert max(ids.max() for ids in seen) > min(ids.min() for ids in seen) + 256, "the ring wrapped around"
    shared = client._shared_frames if shards == 1 else client._shard_frames[0]  # type: ignore[attr-defined]
    assert shared._reader is not None, "the client read the frames from shared memory"
    ray.kill(writer)
