"""Weights: packing, unpacking, the weight store, and fetching without blocking, also when the store dies."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import RayTaskError
from torch import nn

from actors.weights import WeightClient, Weights, WeightStore, WeightStoreActor, pack, parameters_hash, unpack
from replay.errors import LayoutMismatch, SquallError
from replay.remote import RemoteActor


class Assorted(nn.Module):
    """Parameters and buffers of many dtypes and shapes; one buffer is not persistent, so it is not published."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.linear = nn.Linear(3, width)
        self.normal = nn.BatchNorm1d(width)
        self.transposed = nn.Parameter(torch.randn(2, 7).t())
        for name, value in {
            "count": torch.tensor(7, dtype=torch.int64),
            "mask": torch.tensor([True, False, True]),
            "real": torch.randn(2, dtype=torch.float64),
            "brief": torch.randn(3).to(torch.bfloat16),
            "octets": torch.arange(5, dtype=torch.uint8),
            "nothing": torch.empty(0),
        }.items():
            self.register_buffer(name, value)
        self.register_buffer("noise", torch.randn(4), persistent=False)


def filled(seed: int) -> Assorted:
    torch.manual_seed(seed)
    module = Assorted()
    module.count.fill_(seed)  # type: ignore[operator]
    module.normal.num_batches_tracked.fill_(2**40 + seed)  # type: ignore[union-attr]
    return module


def states_equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(mine, theirs) and mine.dtype == theirs.dtype for mine, theirs in pairs)


def test_a_round_trip_changes_no_bit() -> None:
    sent, received = filled(1), filled(2)
    noise = received.noise.clone()  # type: ignore[operator]
    assert not states_equal(sent, received)
    weights = pack(sent, 3)
    unpack(weights, received)
    assert states_equal(sent, received)
    assert torch.equal(received.noise, noise)  # type: ignore[arg-type]
    assert weights.version == 3
    assert weights.data.dtype == np.uint8
    assert weights.data.shape == (sum(v.numel() * v.element_size() for v in sent.state_dict().values()),)


def test_weights_are_a_copy() -> None:
    for module in (filled(1), nn.Linear(2, 2, bias=False)):
        weights = pack(module, 0)
        before = weights.data.copy()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1.0)
        assert (weights.data == before).all()


def test_read_only_weights_are_loaded_and_not_kept() -> None:
    sent, received = filled(1), filled(2)
    weights = pack(sent, 0)
    weights.data.flags.writeable = False  # as arrays from the object store are
    unpack(weights, received)
    with torch.no_grad():
        received.linear.weight.add_(1.0)
    assert not states_equal(sent, received)
    unpack(weights, received)
    assert states_equal(sent, received)


@pytest.mark.parametrize("other", [Assorted(6), nn.Linear(3, 5), nn.Linear(5, 3), nn.Linear(3, 5).double()])
def test_weights_of_another_network_are_refused(other: nn.Module) -> None:
    before = {name: value.clone() for name, value in other.state_dict().items()}
    weights = pack(filled(1), 0)
    with pytest.raises(LayoutMismatch, match=f"hash {weights.layout}.*hash {parameters_hash(other)}") as raised:
        unpack(weights, other)
    assert isinstance(raised.value, SquallError)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_the_layout_is_names_shapes_and_dtypes() -> None:
    named = nn.ModuleDict({"a": nn.Linear(3, 5)})
    layouts = {
        parameters_hash(module)
        for module in (nn.Linear(3, 5), nn.Linear(5, 3), nn.Linear(3, 5).double(), nn.Linear(3, 5, bias=False), named)
    }
    assert len(layouts) == 5
    assert parameters_hash(filled(1)) == parameters_hash(filled(2))


def weights_of(version: int, value: int = 0) -> Weights:
    return Weights(version, "layout", np.full(1000, value, np.uint8))


NewerThan = Callable[..., Any]


@pytest.fixture
def newer_than() -> Iterator[NewerThan]:
    """Return the reply of a store to `newer_than`, on one event loop."""
    with asyncio.Runner() as runner:
        yield lambda store, version, within=0.0: runner.run(store.newer_than(version, within))


def test_a_store_returns_newer_weights_only(newer_than: NewerThan) -> None:
    store = WeightStore()
    assert newer_than(store, -1) is None
    assert store.publish(weights_of(4)) == 4
    [stored] = newer_than(store, 3)
    assert stored.version == 4
    assert newer_than(store, 4) is None
    assert newer_than(store, 9) is None
    assert store.report() == {"version": 4, "pid": os.getpid(), "node": socket.gethostname()}


class Puts(list[int]):
    """The versions that a store has put."""

    def __call__(self, weights: Weights) -> Weights:
        self.append(weights.version)
        return weights


def test_a_store_ignores_older_weights_and_puts_each_version_once(newer_than: NewerThan) -> None:
    put = Puts()
    store = WeightStore(put)
    assert [store.publish(weights_of(version)) for version in (2, 1, 2, 3, 0)] == [2, 2, 2, 3, 3]
    assert put == [2, 3]
    assert newer_than(store, -1)[0].version == 3
    assert newer_than(store, 2)[0].version == 3
    assert put == [2, 3]


def test_a_request_waits_until_there_is_a_newer_version() -> None:
    store = WeightStore()
    store.publish(weights_of(4))

    async def scenario() -> None:
        requests = [asyncio.create_task(store.newer_than(version)) for version in (4, 4, 6)]
        await asyncio.sleep(0.05)
        assert not any(request.done() for request in requests)
        store.publish(weights_of(4))
        await asyncio.sleep(0.05)
        assert not any(request.done() for request in requests)
        store.publish(weights_of(5))
        answers = await asyncio.wait_for(asyncio.gather(*requests[:2]), 5)
        assert [answer[0].version for answer in answers] == [5, 5]
        # A recreated store may have older weights than a client: 6 is not newer than 6.
        store.publish(weights_of(6))
        await asyncio.sleep(0.05)
        assert not requests[2].done()
        store.publish(weights_of(7))
        assert (await asyncio.wait_for(requests[2], 5))[0].version == 7

    asyncio.run(scenario())


def test_a_request_does_not_wait_for_ever(newer_than: NewerThan) -> None:
    store = WeightStore()
    begun = time.monotonic()
    assert newer_than(store, -1, within=0.2) is None
    assert 0.2 <= time.monotonic() - begun < 5.0


class RemoteStore:
    """A store with the name `weights-under-test`; `start` replaces a store that died."""

    def __init__(self) -> None:
        self.actor: Any = None
        self.version = 0
        self.start()

    def start(self) -> None:
        self.stop()
        end = time.monotonic() + 20
        while True:
            try:
                self.actor = WeightStoreActor.options(name="weights-under-test").remote(ray.put)
                break
            except ValueError:  # The name of a killed actor is free again after about a second.
                assert time.monotonic() < end
                time.sleep(0.05)
        ray.get(self.actor.report.remote())

    def stop(self) -> None:
        if self.actor is not None:
            # Kill a dead actor too: Ray keeps its name until it is killed or its last handle is deleted.
            ray.kill(self.actor)

    def publish(self, value: int = 0) -> int:
        """Publish the next version; return its number."""
        self.version += 1
        ray.get(self.actor.publish.remote(weights_of(self.version, value)))
        return self.version


@pytest.fixture(scope="module")
def store(local_ray: None) -> Iterator[RemoteStore]:
    started = RemoteStore()
    yield started
    started.stop()


@pytest.fixture
def client(store: RemoteStore) -> WeightClient:
    return WeightClient(RemoteActor("weights-under-test"))


def next_weights(client: WeightClient, seconds: float = 20.0) -> Weights:
    """Poll until newer weights arrive, and return them."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (weights := client.poll()) is not None:
            return weights
        time.sleep(0.005)
    raise AssertionError(f"still at version {client.version}, {client.failed_fetches} failed fetches")


def poll_in_vain(client: WeightClient, seconds: float) -> float:
    """Poll for a number of seconds, and check that no poll returns weights; return the duration of the slowest poll."""
    end, slowest = time.monotonic() + seconds, 0.0
    while (begun := time.monotonic()) < end:
        assert client.poll() is None
        slowest = max(slowest, time.monotonic() - begun)
        time.sleep(0.002)
    return slowest


@pytest.mark.ray
def test_a_client_fetches_each_version_once(store: RemoteStore, client: WeightClient) -> None:
    assert client.version == -1
    for value in (11, 22):
        version = store.publish(value)
        weights = next_weights(client)
        assert (weights.version, client.version) == (version, version)
        assert (weights.data == value).all()
        poll_in_vain(client, 0.2)
    assert client.failed_fetches == 0


class Counted(RemoteActor):
    """A store that counts its requests; `within`, if set, is the long-poll time in seconds."""

    within: float | None = None
    requests = 0

    def later(self, method: str, *arguments: Any) -> Any:
        self.requests += 1
        return super().later(method, *arguments, *([] if self.within is None else [self.within]))


@pytest.mark.ray
def test_a_client_asks_once_a_version(store: RemoteStore) -> None:
    counted = Counted("weights-under-test")
    client = WeightClient(counted)
    version = store.publish()
    assert next_weights(client).version == version
    assert not client.pending
    poll_in_vain(client, 0.5)
    assert client.pending
    store.publish()
    assert next_weights(client).version == version + 1
    assert counted.requests == 2


@pytest.mark.ray
def test_a_client_sends_a_new_request_after_a_long_poll(store: RemoteStore) -> None:
    version = store.publish()
    counted = Counted("weights-under-test")
    counted.within = 0.1
    client = WeightClient(counted)
    assert next_weights(client).version == version
    begun = time.monotonic()
    while counted.requests < 4:
        poll_in_vain(client, 0.05)
        assert time.monotonic() < begun + 20.0
    assert time.monotonic() - begun >= 0.2, "the second and the third request were long polls"
    store.publish()
    assert next_weights(client).version == version + 1
    assert client.failed_fetches == 0


@pytest.mark.ray
def test_waiting_requests_do_not_block_publishing(store: RemoteStore) -> None:
    """One request from each of many workers: more than the 1,000 concurrent calls that an actor allows by default."""
    version = store.publish()
    requests = [store.actor.newer_than.remote(version) for _ in range(1_500)]
    assert not ray.wait(requests, timeout=0.5)[0]
    assert store.publish() == version + 1
    answers = ray.get(requests, timeout=20.0)
    assert len({answer[0] for answer in answers}) == 1
    assert ray.get(answers[0][0]).version == version + 1


@pytest.mark.ray
def test_a_busy_store_makes_nobody_wait(store: RemoteStore, client: WeightClient) -> None:
    version = store.publish()
    assert next_weights(client).version == version
    busy = store.actor.__ray_call__.remote(lambda _: time.sleep(1.0))
    assert poll_in_vain(client, 0.5) < 0.4
    ray.get(busy)
    version = store.publish()
    assert next_weights(client).version == version


@pytest.mark.ray
def test_weights_outlive_the_learner(store: RemoteStore, client: WeightClient) -> None:
    """The process that puts an object owns it, so the store must put the weights, not the publisher."""

    @ray.remote(num_cpus=0)
    class Learner:
        def publish(self, actor: Any, version: int) -> None:
            ray.get(actor.publish.remote(Weights(version, "layout", np.full(5_000_000, 5, np.uint8))))

    store.version += 1
    learner = Learner.remote()
    ray.get(learner.publish.remote(store.actor, store.version))
    ray.kill(learner)
    time.sleep(0.3)
    assert (next_weights(client).data == 5).all()


@pytest.mark.ray
def test_a_client_without_a_store_does_not_wait(local_ray: None) -> None:
    client = WeightClient(RemoteActor("nobody-has-this-name"))
    assert poll_in_vain(client, 0.2) < 0.4
    assert client.failed_fetches > 3


@pytest.mark.ray
def test_the_publisher_gets_the_error_of_a_store_that_cannot_put(local_ray: None) -> None:
    """The learner exits with the error, while the workers continue with the weights that they have."""

    def put(_: Weights) -> None:
        raise OSError("the object store is full")

    actor = WeightStoreActor.options(name="weights-full").remote(put)
    try:
        with pytest.raises(RayTaskError, match="the object store is full"):
            ray.get(actor.publish.remote(weights_of(1)))
        assert ray.get(actor.report.remote())["version"] == -1
        client = WeightClient(RemoteActor("weights-full"))
        poll_in_vain(client, 0.3)
        assert client.failed_fetches == 0
    finally:
        ray.kill(actor)


@pytest.mark.ray
def test_a_killed_store_costs_nothing_and_its_successor_is_found(store: RemoteStore, client: WeightClient) -> None:
    version = store.publish()
    next_weights(client)
    os.kill(ray.get(store.actor.report.remote())["pid"], signal.SIGKILL)

    # No reply, no exception, no blocking; the client keeps its version.
    end = time.monotonic() + 20
    while client.failed_fetches < 3:
        assert time.monotonic() < end
        assert poll_in_vain(client, 0.1) < 0.5
    assert client.version == version

    store.start()
    # The learner at once republishes its last version, which is not newer for this client.
    store.version -= 1
    assert store.publish() == version
    poll_in_vain(client, 0.2)
    store.publish(7)
    assert (next_weights(client).data == 7).all()
    assert client.version == version + 1


def test_the_stores_process_starts_without_pytorch() -> None:
    loaded = "import actors.weights, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], check=False).returncode == 0
