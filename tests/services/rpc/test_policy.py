"""The Policy service: correct answers in shared batches, and the requests that it refuses."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from gymnasium import spaces
from pytorch_lightning import Trainer

from actors.environments import EnvironmentSpec
from learner import DQN
from replay.errors import ConfigurationError, LayoutMismatch
from replay.types import Array
from services.cli.checkpoint_server import policy_of
from services.cli.main import main
from services.client.run_client import SquallClient
from services.errors import NotReady, Overloaded, UnknownRun
from services.rpc import squall_pb2 as pb
from services.rpc import squall_pb2_grpc
from services.rpc.codec import decode_array, encode_array
from services.rpc.policy import MAX_BATCH_SIZE, Batcher, PolicyService, ServedPolicy
from tests.services.running import SQUALL, environment
from tests.services.serving import CARTPOLE, CORRIDOR, PENDULUM, make_policy, policy_service, serving


class Gate:
    """A gate that delays the first pass of a service's policy, so that other requests queue behind it."""

    def __init__(self, service: PolicyService) -> None:
        self._opened = threading.Event()
        self._service = service
        service._executor.submit(self._opened.wait, 60)

    def open_when(self, requests: int) -> None:
        """Open the gate once `requests` requests have arrived, or after a minute."""

        def wait() -> None:
            for _ in range(6_000):
                if self._service.batcher.requests >= requests or self._opened.wait(0.01):
                    break
            self._opened.set()

        threading.Thread(target=wait).start()


def act_at_once(address: str, requests: list[pb.ActRequest]) -> list[pb.ActResponse]:
    """Send all requests at the same time and return the answers in order."""

    async def send() -> list[pb.ActResponse]:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = squall_pb2_grpc.PolicyStub(channel)
            answers: list[pb.ActResponse] = await asyncio.gather(
                *(stub.Act(request, timeout=60) for request in requests)
            )
            return answers

    return asyncio.run(send())


def test_a_thousand_at_once_get_their_own_answers_in_a_few_passes() -> None:
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(1000, 4)).astype(np.float32)
    service = policy_service()
    gate = Gate(service)
    with serving(service) as address:
        gate.open_when(1000)
        answers = act_at_once(address, [pb.ActRequest(observations=encode_array(o[None])) for o in observations])
    actions = np.concatenate([decode_array(a.actions, "actions", dtype="int64", shape=(1,)) for a in answers])
    np.testing.assert_array_equal(actions, make_policy_like(service).act(observations, False)[0])
    assert 0 < actions.sum() < 1000
    assert {answer.weights_version for answer in answers} == {7}
    assert service.batcher.requests == 1000
    # The first request is a pass of its own; the others have queued behind it.
    assert service.batcher.passes <= 3


def make_policy_like(service: PolicyService) -> ServedPolicy:
    return ServedPolicy(service.served.policy, "dqn", version=7)


def test_without_batches_each_request_is_a_pass() -> None:
    service = policy_service(max_batch_size=1)
    gate = Gate(service)
    request = pb.ActRequest(observations=encode_array(np.zeros((1, 4), np.float32)))
    with serving(service) as address:
        gate.open_when(50)
        act_at_once(address, [request] * 50)
    assert service.batcher.passes == 50


def test_a_batch_of_observations_is_answered_in_order() -> None:
    observations = np.random.default_rng(1).normal(size=(64, 3)).astype(np.float32)
    service = policy_service(environment=PENDULUM)
    with serving(service) as address, SquallClient(address) as client:
        acted = client.act(observations, "mine")
    np.testing.assert_array_equal(acted.actions, service.served.act(observations, False)[0])
    assert (acted.actions.dtype, acted.actions.shape) == (np.float32, (64, 1))
    assert np.abs(acted.actions).max() <= 2.0


def test_exploring_is_random_and_greedy_is_not() -> None:
    observations = np.zeros((200, 4), np.float32)
    with serving(policy_service()) as address, SquallClient(address) as client:
        assert len(set(client.act(observations).actions.tolist())) == 1
        assert 50 < client.act(observations, explore=True).actions.sum() < 150


@pytest.mark.parametrize(
    ("environment", "observations", "actions"),
    [
        (CARTPOLE, spaces.Box(-np.inf, np.inf, (4,), np.float32), spaces.Discrete(2)),
        (PENDULUM, spaces.Box(-np.inf, np.inf, (3,), np.float32), spaces.Box(-2.0, 2.0, (1,), np.float32)),
        (CORRIDOR, spaces.Discrete(5), spaces.Discrete(3)),
    ],
)
def test_a_policy_describes_itself(environment: EnvironmentSpec, observations: Any, actions: Any) -> None:
    with serving(policy_service(environment=environment)) as address, SquallClient(address) as client:
        description = client.describe()
        assert (description.algorithm, description.environment, description.weights_version) == (
            "dqn",
            environment.id,
            7,
        )
        assert (description.observation_space, description.action_space) == (observations, actions)
        sample = np.stack([np.asarray(description.observation_space.sample()) for _ in range(3)])
        assert all(description.action_space.contains(action) for action in client.act(sample).actions)


@pytest.mark.parametrize(
    ("observations", "words"),
    [
        (np.zeros((2, 5), np.float32), "must be float32 of shape [B, 4], got float32 of shape [2, 5]"),
        (np.zeros((2, 4), np.float64), "must be float32 of shape [B, 4], got float64 of shape [2, 4]"),
        (np.zeros(4, np.float32), "got float32 of shape [4]"),
        (np.zeros((0, 4), np.float32), "a request has 1 to 1024 observations, got 0"),
        (np.zeros((MAX_BATCH_SIZE + 1, 4), np.float32), "a request has 1 to 1024 observations, got 1025"),
        (np.full((1, 4), np.nan, np.float32), "observations must be finite"),
        (np.full((1, 4), -np.inf, np.float32), "observations must be finite"),
    ],
)
def test_a_wrong_shape_or_dtype_is_refused_with_both(observations: Array, words: str) -> None:
    with serving(policy_service()) as address, SquallClient(address) as client:
        with pytest.raises(ConfigurationError, match=re.escape(words)):
            client.act(observations)
        assert client.act(np.zeros((1, 4), np.float32)).actions.shape == (1,)


def test_an_observation_that_is_no_state_is_refused() -> None:
    with serving(policy_service(environment=CORRIDOR)) as address, SquallClient(address) as client:
        assert client.act(np.array([0, 4])).actions.shape == (2,)
        for state in (-1, 5):
            with pytest.raises(ConfigurationError, match=re.escape("must lie in 0 .. 4")):
                client.act(np.array([0, state]))


def test_another_run_is_unknown_and_a_policy_without_weights_is_not_ready() -> None:
    with serving(policy_service()) as address, SquallClient(address) as client:
        with pytest.raises(UnknownRun, match="'mine' only, not of 'yours'"):
            client.describe("yours")
        with pytest.raises(UnknownRun):
            client.act(np.zeros((1, 4), np.float32), "yours")
    young = PolicyService(make_policy(version=-1), "mine")
    with serving(young) as address, SquallClient(address) as client, pytest.raises(NotReady, match="no weights yet"):
        client.act(np.zeros((1, 4), np.float32))


def test_weights_of_another_network_are_not_passed_for_the_newest() -> None:
    class WeightsOfAnotherNetwork:
        def poll(self) -> Any:
            raise LayoutMismatch("weights of another network")

    served = ServedPolicy(make_policy().policy, "dqn", version=3, weights=WeightsOfAnotherNetwork())  # type: ignore[arg-type]
    with serving(PolicyService(served, "mine")) as address, SquallClient(address) as client:
        for _ in range(1000):
            try:
                client.describe()
            except LayoutMismatch:
                break
        else:
            pytest.fail("the policy continued with stale weights")


# The batcher alone, with passes that record their input and end on command.


class Passes:
    """A forward pass that waits until `permits` is released, records its input, and doubles it."""

    def __init__(self) -> None:
        self.permits = threading.Semaphore(0)
        self.seen: list[tuple[list[float], bool]] = []

    def __call__(self, observations: Array, explore: bool) -> tuple[Array, int]:
        self.permits.acquire(timeout=30)
        self.seen.append((observations.tolist(), explore))
        if 13.0 in observations:
            raise ValueError("thirteen")
        return observations * 2, 1


def batched(play: Callable[[Batcher, Passes], Awaitable[None]], **options: int) -> Passes:
    """Run `play` with a batcher on an event loop, and return the passes."""
    passes = Passes()

    async def run() -> None:
        with ThreadPoolExecutor(1) as executor:
            await play(Batcher(passes, executor, **options), passes)

    asyncio.run(run())
    return passes


def ask(batcher: Batcher, *values: float, explore: bool = False) -> asyncio.Task[tuple[Array, int]]:
    return asyncio.create_task(batcher.act(np.array(values), explore))


def test_those_that_come_during_a_pass_are_the_next_one() -> None:
    async def play(batcher: Batcher, passes: Passes) -> None:
        first = ask(batcher, 1)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        rest = [ask(batcher, 2), ask(batcher, 3, 4), ask(batcher, 5, explore=True), ask(batcher, 6)]
        passes.permits.release(3)
        assert [(await task)[0].tolist() for task in [first, *rest]] == [[2], [4], [6, 8], [10], [12]]

    seen = batched(play).seen
    assert sorted(seen) == [([1.0], False), ([2.0, 3.0, 4.0, 6.0], False), ([5.0], True)]


def test_a_pass_is_bounded_and_a_larger_request_is_one_by_itself() -> None:
    async def play(batcher: Batcher, passes: Passes) -> None:
        tasks = [ask(batcher, 1, 2), ask(batcher, 3), ask(batcher, 4, 5, 6, 7, 8), ask(batcher, 9)]
        passes.permits.release(4)
        assert [(await task)[0].tolist() for task in tasks] == [[2, 4], [6], [8, 10, 12, 14, 16], [18]]

    assert [rows for rows, _ in batched(play, max_batch_size=3).seen] == [[1, 2, 3], [4, 5, 6, 7, 8], [9]]


def test_more_than_may_wait_are_turned_away_and_no_one_else() -> None:
    async def play(batcher: Batcher, passes: Passes) -> None:
        first = ask(batcher, 0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting = [ask(batcher, 1), ask(batcher, 2)]
        late = ask(batcher, 3)
        with pytest.raises(Overloaded, match="2 of at most 2 observations are waiting for the policy"):
            await late
        passes.permits.release(2)
        assert [(await task)[0].tolist() for task in [first, *waiting]] == [[0], [2], [4]]
        passes.permits.release()
        assert (await ask(batcher, 4))[0].tolist() == [8]

    batched(play, max_waiting=2)


def test_a_caller_that_has_gone_costs_nothing_and_a_failure_reaches_those_it_concerns() -> None:
    async def play(batcher: Batcher, passes: Passes) -> None:
        first = ask(batcher, 1)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        cancelled, failing, same_batch = ask(batcher, 2), ask(batcher, 13), ask(batcher, 3)
        await asyncio.sleep(0)
        cancelled.cancel()
        passes.permits.release(2)
        assert (await first)[0].tolist() == [2]
        for task in (failing, same_batch):
            with pytest.raises(ValueError, match="thirteen"):
                await task
        passes.permits.release()
        assert (await ask(batcher, 5))[0].tolist() == [10]

    assert [rows for rows, _ in batched(play).seen] == [[1], [13, 3], [5]]


# The policy of a checkpoint.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "cartpole.ckpt"
    trainer = Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(DQN("CartPole-v1", warm_start_size=50, batch_size=8, replay_size=200, hidden_sizes=(8,)))
    trainer.save_checkpoint(path, weights_only=False)
    return path


def test_serve_answers_with_a_checkpoints_policy_until_it_is_told_to_stop(checkpoint: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*SQUALL, "serve", str(checkpoint), "--address", "127.0.0.1:0", "--json"],
        env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert '"address"' in line, process.communicate(timeout=30)[1]
        address = re.findall(r"127\.0\.0\.1:\d+", line)[0]
        observations = np.random.default_rng(2).normal(size=(32, 4)).astype(np.float32)
        with SquallClient(address) as client:
            assert client.describe().environment == "CartPole-v1"
            actions = client.act(observations).actions
        np.testing.assert_array_equal(actions, policy_of(checkpoint, "it").served.act(observations, False)[0])
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.ckpt"], "there is no checkpoint missing.ckpt"),
        (["it.ckpt", "--address", "0.0.0.0:0"], "beyond this machine's loopback, needs a token"),
        (["it.ckpt", "--tls-key", "key.pem"], "TLS takes both a certificate and its key"),
    ],
)
def test_what_cannot_be_served_is_refused(
    arguments: list[str], words: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SQUALL_GRPC_TOKEN", raising=False)
    assert main(["serve", *arguments]) == 2
    assert words in capfd.readouterr().err
