"""The rollout worker: steps a vector environment with the newest weights and sends the experience to the replay."""

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
from actors.push_sender import DRAIN_SECONDS, PushSender, Replay
from actors.segments import SegmentBuilder
from actors.vector_runner import VectorRunner, VectorStep
from actors.weights import Weights, unpack
from replay.errors import DeadlineExceeded
from replay.remote import actor_class
from replay.seeds import spawn_seed
from replay.types import EpisodeResult, Layout, Moments

_STEPS_BETWEEN_POLLS = 16  # vector steps
_SECONDS_BETWEEN_POLLS = 0.1  # a poll costs more than an action of a small network
_SECONDS_FOR_FIRST_WEIGHTS = 300.0


class WeightSource(Protocol):
    """The source of a worker's weights: a `WeightClient`."""

    version: int

    @property
    def pending(self) -> bool:
        """Whether a request is in flight."""
        ...

    def poll(self) -> Weights | None:
        """Return newer weights if they have arrived, else None."""
        ...


@dataclass(frozen=True)
class RolloutSpec:
    """The description from which a `RolloutWorker` is made.

    Attributes:
        policy: specification of the policy and its environment.
        num_envs: lanes of the vector environment.
        segment_length: rows in a segment.
        n_steps: steps summed into each stored reward.
        gamma: discount of one step.
        clip_rewards: whether the learner sees rewards clipped to [-1, 1]; episode returns are never clipped.
        run_seed: the run's seed.
        trajectory_rows: rows in an on-policy trajectory; None means that a trajectory is a whole episode.
        track_return_statistics: whether pushes contain the moments of the discounted returns, which the learner needs
            to normalize rewards.
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
        """Make the vector environment and its runner."""
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
        """Transitions in the largest push.

        Each lane contributes one full segment, or, in the last push, at most `segment_length - 1` rows and the n-step
        tail of `n_steps - 1` rows.
        """
        return self.num_envs * (self.segment_length + max(self.n_steps - 2, 0))


@dataclass(frozen=True)
class WorkerReport:
    """The status report of a worker.

    Attributes:
        worker: index of the worker.
        incarnation: number of times the worker was recreated.
        pid: process id.
        node: host name.
        env_steps: environment steps that this incarnation took.
        episodes: episodes that ended.
        pushes: pushes that the replay server accepted.
        steps_sent: environment steps in those pushes.
        steps_unsent: environment steps in pushes that are not accepted yet.
        weights_version: version of the weights that select the actions.
        failures: number of recreated environments.
        seconds_waited: seconds in which the worker took no steps, because it waited for a push or for permits.
        waiting_for: the reason why the worker waits, or None.
        status_message: the newest status message.
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
    """The rollout loop of an off-policy run.

    `run` returns when `stop` is called or when the run has all its steps. The other methods may be called from another
    thread while `run` is running.
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
            spec: the description of the rollout.
            worker: index of this worker, below `workers`.
            workers: number of workers; exploration may differ between them.
            incarnation: number of times this worker was recreated; each incarnation has different seeds.
            replay: receiver of the experience.
            weights: source of the weights.
            threads: PyTorch threads of this process; None keeps the current number.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        self.spec, self.worker, self.incarnation = spec, worker, incarnation
        environment_seed, policy_seed = spawn_seed(spec.run_seed, "worker", worker, incarnation).spawn(2)
        self._runner = spec.make_runner(environment_seed)
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
        """Roll out until `stop` is called or the replay server reports that the run is finished.

        Raises:
            DeadlineExceeded: no weights arrived in time, or the replay server accepted no push in time.
            EnvironmentFailed: an environment failed repeatedly.
        """
        try:
            self._wait_for_weights()
            self._status_message = "rolling out"
            self._roll_out()
        finally:
            self._sender.close()
            self._release()
            self._runner.close()
        self._sender.check()
        self._status_message = "done"
        return self.report()

    def _release(self) -> None:
        """Release this worker's resources on the server, such as permits, after the last push."""

    def _wait_for_weights(self) -> None:
        deadline = time.monotonic() + _SECONDS_FOR_FIRST_WEIGHTS
        self._waiting_for = "the learner's first weights"
        while not self._poll_weights() and not self._stop.wait(0.02):
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"the learner's first weights did not arrive within {_SECONDS_FOR_FIRST_WEIGHTS:.0f} s"
                )
        self._waiting_for = None

    def _poll_weights(self) -> bool:
        """Load newer weights if they have arrived; return whether new weights were loaded."""
        weights = self._weights.poll()
        if weights is not None:
            unpack(weights, self._policy)
        return weights is not None

    def _roll_out(self) -> None:
        builder = SegmentBuilder(self.spec.layout, self.spec.num_envs, self.spec.gamma)
        builder.begin(self._runner.reset())
        episodes: list[EpisodeResult] = []
        vector_steps, next_poll = 0, 0.0
        while not self._stop.is_set() and not self._sender.finished:
            step = self._runner.step(self._policy, step=self._sender.env_steps)
            episodes += (result for _, result in step.episodes)
            self._count(step)
            segments = builder.add(
                step.action, step.reward, step.terminated, step.truncated, step.observation, step.failed
            )
            if segments:
                self._send(segments=segments, episodes=episodes)
                episodes = []
            vector_steps += 1
            # Poll after a push, not before it: weights that arrive before a push would age while the push waits.
            poll_due = segments or vector_steps % _STEPS_BETWEEN_POLLS == 0
            if self._weights.pending or (poll_due and time.monotonic() >= next_poll):
                next_poll = time.monotonic() + _SECONDS_BETWEEN_POLLS
                self._poll_weights()
        self._send(segments=builder.flush(), episodes=episodes)

    def _send(self, **content: Any) -> None:
        self._sender.put(returns=self._runner.returns, **content)
        self._runner.returns = Moments()

    def _count(self, step: VectorStep) -> None:
        self._env_steps += step.steps
        self._episodes += len(step.episodes)
        if step.failures:
            self._failures += len(step.failures)
            self._status_message = f"recreated an environment after {step.failures[-1]}"

    def stop(self, seconds: float | None = None) -> None:
        """Stop `run` after it has sent its unsent experience, within `seconds` (default `DRAIN_SECONDS`)."""
        self._sender.drain(DRAIN_SECONDS if seconds is None else seconds)
        self._stop.set()

    def set_rank(self, rank: int, workers: int) -> None:
        """Set this worker's rank among the current workers, which the ladder of exploration rates depends on."""
        self._policy.worker, self._policy.workers = rank, workers

    def report(self) -> WorkerReport:
        """Return the status report, which `squall status` displays."""
        return WorkerReport(
            worker=self.worker,
            incarnation=self.incarnation,
            pid=os.getpid(),
            node=socket.gethostname(),
            env_steps=self._env_steps,
            episodes=self._episodes,
            pushes=self._sender.accepted,
            steps_sent=self._sender.steps_sent,
            steps_unsent=self._sender.steps_submitted - self._sender.steps_sent,
            weights_version=self._weights.version,
            failures=self._failures,
            seconds_waited=self._seconds_waited + self._sender.seconds_waited,
            waiting_for=self._waiting_for or self._sender.waiting_for,
            status_message=self._status_message,
        )


RolloutActor = actor_class(RolloutWorker, max_concurrency=2)
