"""RolloutWorker: steps a vector environment, chooses all lanes' actions in one forward pass, sends what came of it."""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from actors.policies import PolicySpec
from actors.push_sender import SECONDS_TO_SEND_THE_REST, PushSender, Replay
from actors.segments import SegmentBuilder
from actors.vector_runner import VectorRunner, VectorStep
from actors.weights import Weights, unpack
from replay.errors import DeadlineExceeded
from replay.remote import actor_class
from replay.seeds import spawn_seed
from replay.types import EpisodeResult, Layout, Moments

_ROWS_BETWEEN_REFRESHES = 16
_SECONDS_BETWEEN_REFRESHES = 0.1  # to ask costs a small network more than to act
_SECONDS_FOR_FIRST_WEIGHTS = 300.0


class WeightSource(Protocol):
    """Where a worker gets its weights: a `WeightClient`."""

    version: int

    @property
    def pending(self) -> bool:
        """Whether an answer is on its way."""
        ...

    def poll(self) -> Weights | None:
        """See `WeightClient.poll`."""
        ...


@dataclass(frozen=True)
class RolloutSpec:
    """What a `RolloutWorker` is made from.

    Attributes:
        policy: the acting module, and with it the environment.
        num_envs: lanes of the vector environment.
        segment_length: rows in a segment.
        n_steps: steps in a stored reward.
        gamma: discount of one step.
        clip_rewards: whether the learner sees rewards clipped to [-1, 1]; returns are never clipped.
        run_seed: the run's seed.
        trajectory_rows: rows in an on-policy trajectory; None makes whole episodes.
        track_return_statistics: whether pushes tell of discounted returns, by which the learner may scale rewards.
    """

    policy: PolicySpec
    num_envs: int
    segment_length: int
    n_steps: int
    gamma: float
    clip_rewards: bool
    run_seed: int
    trajectory_rows: int | None = None
    track_return_statistics: bool = False

    @property
    def layout(self) -> Layout:
        """Layout of the experience."""
        return self.policy.environment.layout(segment_length=self.segment_length, n_steps=self.n_steps)

    def make_runner(self, seed: np.random.SeedSequence) -> VectorRunner:
        """Make the environments."""
        environment = self.policy.environment
        return VectorRunner(
            environment,
            self.num_envs,
            seed,
            gamma=self.gamma,
            clip_rewards=self.clip_rewards,
            track_return_statistics=self.track_return_statistics,
        )

    @property
    def largest_push(self) -> int:
        """Transitions in the largest push: a segment a lane, or at the end what a tail of n - 1 steps adds to one."""
        return self.num_envs * (self.segment_length + max(self.n_steps - 2, 0))


@dataclass(frozen=True)
class WorkerReport:
    """What a worker says of itself.

    Attributes:
        worker: its index.
        incarnation: how often it was recreated.
        pid: of its process.
        node: host it runs on.
        env_steps: steps it took in this incarnation.
        episodes: episodes it finished.
        pushes: pushes of it that were accepted.
        steps_sent: steps in those.
        steps_unsent: steps in pushes that were made and have not been accepted.
        weights_version: of the weights it acts with.
        failures: environment lanes it had to rebuild.
        seconds_waited: in which it took no steps, because what it had made was not yet taken.
        waiting_for: what it waits for, or None.
        status_message: the last thing worth telling.
    """

    worker: int
    incarnation: int
    pid: int
    node: str
    env_steps: int
    episodes: int
    pushes: int
    steps_sent: int
    steps_unsent: int
    weights_version: int
    failures: int
    seconds_waited: float
    waiting_for: str | None
    status_message: str


class RolloutWorker:
    """The rollout loop: `run` returns when stopped, or when the run has all its steps.

    The other calls may come from another thread meanwhile.
    """

    def __init__(
        self,
        spec: RolloutSpec,
        *,
        worker: int,
        workers: int,
        incarnation: int,
        replay: Replay,
        weights: WeightSource,
        threads: int | None = None,
    ) -> None:
        """Make the environment and the policy.

        Args:
            spec: what to roll out.
            worker: this worker's index, below `workers`.
            workers: how many workers there are, for exploration that differs between them.
            incarnation: how often this worker was recreated; each incarnation has seeds of its own.
            replay: where experience goes.
            weights: where weights come from.
            threads: PyTorch threads of this process; None leaves them.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        self.spec, self.worker, self.incarnation = spec, worker, incarnation
        environment_seed, policy_seed = spawn_seed(spec.run_seed, "worker", worker, incarnation).spawn(2)
        self._lanes = spec.make_runner(environment_seed)
        self._policy = spec.policy.build()
        self._policy.begin(policy_seed, worker, workers)
        self._weights = weights
        self._sender = PushSender(replay, worker, incarnation)
        self._stop = threading.Event()
        self._env_steps = self._episodes = self._failures = 0
        self._seconds_waited = 0.0
        self._waiting_for: str | None = None
        self._status_message = "starting"

    def run(self) -> WorkerReport:
        """Roll out until `stop` is called or the replay server says that the run is finished.

        Raises:
            DeadlineExceeded: no weights came, or the replay server took no push, in time.
            EnvironmentFailed: an environment failed again and again.
        """
        try:
            self._wait_for_weights()
            self._status_message = "rolling out"
            self._roll_out()
        finally:
            self._sender.close()
            self._leave()
            self._lanes.close()
        self._sender.check()
        self._status_message = "done"
        return self.report()

    def _leave(self) -> None:
        """Give back what was held, once everything is sent."""

    def _wait_for_weights(self) -> None:
        end = time.monotonic() + _SECONDS_FOR_FIRST_WEIGHTS
        self._waiting_for = "the learner's first weights"
        while not self._pull() and not self._stop.wait(0.02):
            if time.monotonic() > end:
                raise DeadlineExceeded(f"no weights came within {_SECONDS_FOR_FIRST_WEIGHTS:.0f} s")
        self._waiting_for = None

    def _pull(self) -> bool:
        weights = self._weights.poll()
        if weights is not None:
            unpack(weights, self._policy)
        return weights is not None

    def _roll_out(self) -> None:
        builder = SegmentBuilder(self.spec.layout, self.spec.num_envs, self.spec.gamma)
        builder.begin(self._lanes.reset())
        episodes: list[EpisodeResult] = []
        rows, refresh_at = 0, 0.0
        while not self._stop.is_set() and not self._sender.finished:
            row = self._lanes.step(self._policy, step=self._sender.env_steps)
            episodes += (result for _, result in row.episodes)
            self._count(row)
            segments = builder.add(row.action, row.reward, row.terminated, row.truncated, row.observation, row.failed)
            if segments:
                self._send(segments=segments, episodes=episodes)
                episodes = []
            rows += 1
            # Asked for after a push, not before it: an answer that comes at once would grow old while the push waits.
            after_a_while = segments or rows % _ROWS_BETWEEN_REFRESHES == 0
            if self._weights.pending or (after_a_while and time.monotonic() >= refresh_at):
                refresh_at = time.monotonic() + _SECONDS_BETWEEN_REFRESHES
                self._pull()
        self._send(segments=builder.flush(), episodes=episodes)

    def _send(self, **content: Any) -> None:
        self._sender.put(returns=self._lanes.returns, **content)
        self._lanes.returns = Moments()

    def _count(self, row: VectorStep) -> None:
        self._env_steps += row.steps
        self._episodes += len(row.episodes)
        if row.failures:
            self._failures += len(row.failures)
            self._status_message = f"rebuilt an environment after {row.failures[-1]}"

    def stop(self, seconds: float | None = None) -> None:
        """Ask `run` to send what it has, within `seconds` or else a short time, and return."""
        self._sender.drain(SECONDS_TO_SEND_THE_REST if seconds is None else seconds)
        self._stop.set()

    def set_rank(self, rank: int, workers: int) -> None:
        """Take note of which of how many workers this is now, on which a ladder of exploration rates depends."""
        self._policy.worker, self._policy.workers = rank, workers

    def report(self) -> WorkerReport:
        """Return what `squall status` shows."""
        return WorkerReport(
            worker=self.worker,
            incarnation=self.incarnation,
            pid=os.getpid(),
            node=socket.gethostname(),
            env_steps=self._env_steps,
            episodes=self._episodes,
            pushes=self._sender.accepted,
            steps_sent=self._sender.steps_sent,
            steps_unsent=self._sender.steps_taken - self._sender.steps_sent,
            weights_version=self._weights.version,
            failures=self._failures,
            seconds_waited=self._seconds_waited + self._sender.seconds_waited,
            waiting_for=self._waiting_for or self._sender.waiting_for,
            status_message=self._status_message,
        )


RolloutActor = actor_class(RolloutWorker, max_concurrency=2)
