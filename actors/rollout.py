"""RolloutWorker: steps a vector environment, chooses all lanes' actions in one forward pass, sends what came of it."""

from __future__ import annotations

import math
import os
import queue
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from actors.environments import FAILURE, EnvironmentSpec, seeds_for
from actors.policies import Policy, PolicySpec
from actors.segments import SegmentBuilder
from actors.weights import Weights, unpack
from replay.remote import actor_class
from replay.seeds import spawn_seed
from replay.types import (
    Array,
    DeadlineExceeded,
    EpisodeResult,
    InsertReply,
    Layout,
    Moments,
    Permit,
    Push,
    Segment,
    Trajectory,
)

_MOST_PUSHES_WAITING = 2
_ROWS_BETWEEN_REFRESHES = 16
_SECONDS_BETWEEN_REFRESHES = 0.1  # to ask costs a small network more than to act
_SECONDS_TO_SEND_THE_REST = 3.0
_SECONDS_FOR_FIRST_WEIGHTS = 300.0
_NONE = Moments()


@dataclass(frozen=True)
class Row:
    """What one step of all B lanes brought.

    Attributes:
        action: `[B, *action_shape]`, as the learner sees it.
        log_probability: `[B]` float32, of the actions; 0 where the policy is no distribution.
        reward: `[B]` float64, as the learner sees it.
        terminated: `[B]` bool.
        truncated: `[B]` bool.
        observation: `[B, *observation_shape]`, of the following row.
        failed: `[B]` bool, lanes whose step failed, so that their environment was rebuilt.
        failures: what failed, as text, in steps and in resets.
        steps: how many of the B were steps: all but those that failed or followed an episode's end.
        episodes: `(lane, result)` of the episodes that ended.
    """

    action: Array
    log_probability: Array
    reward: Array
    terminated: Array
    truncated: Array
    observation: Array
    failed: Array
    failures: tuple[str, ...]
    steps: int
    episodes: tuple[tuple[int, EpisodeResult], ...]


class Lanes:
    """A vector environment driven by a policy, with the episodes' true returns.

    If asked to, it keeps `returns` beside them, the moments of `G_t = gamma G_{t-1} + r_t` over all steps, by whose
    deviation rewards may be scaled (as in OpenAI Baselines' `VecNormalize`); whoever sends them on sets them back.
    """

    def __init__(
        self,
        environment: EnvironmentSpec,
        lanes: int,
        seed: np.random.SeedSequence,
        *,
        gamma: float = 1.0,
        clip_rewards: bool = False,
        measure_returns: bool = False,
        rendered: bool = False,
    ) -> None:
        """Make the environment; `reset` it before the first step.

        Args:
            environment: what to make.
            lanes: how many.
            seed: of the environments.
            gamma: discount of one step.
            clip_rewards: whether the learner sees rewards clipped to [-1, 1]; the episodes' returns are never clipped.
            measure_returns: whether to keep `returns`.
            rendered: whether the environment can draw itself.
        """
        self.environment, self.lanes = environment, lanes
        self._gamma, self._clip, self._measure = gamma, clip_rewards, measure_returns
        self._discounted = np.zeros(lanes)
        self.returns = Moments()
        self.env = environment.make(lanes, rendered=rendered)
        self._seed = seed
        self._observation: Array = np.empty(0)
        self._returns = np.zeros(lanes)
        self._lengths = np.zeros(lanes, np.int64)
        self._after_end = np.zeros(lanes, np.bool_)
        self._no_lane = np.zeros(lanes, np.bool_)
        self._no_lane.flags.writeable = False

    def reset(self) -> Array:
        """Reset every lane, each time with other seeds, and return the observations."""
        observation, _ = self.env.reset(seed=seeds_for(self.env, self._seed.spawn(1)[0]))
        self._observation = self.environment.observe(observation)
        self._returns[:] = 0.0
        self._lengths[:] = 0
        self._discounted[:] = 0.0
        self._after_end[:] = False
        return self._observation

    def step(self, policy: Policy, *, step: int, greedy: bool = False) -> Row:
        """Take one step in every lane.

        Args:
            policy: chooses the actions.
            step: the global step count, which exploration follows.
            greedy: take the best actions.
        """
        chosen = policy.act(self._observation, step=step, greedy=greedy)
        observation, reward, terminated, truncated, info = self.env.step(self.environment.to_environment(chosen.action))
        reward, density = np.asarray(reward, np.float64), chosen.log_probability
        is_step, failed = ~self._after_end, self._no_lane
        failures: tuple[str, ...] = ()
        if FAILURE in info:
            rebuilt = np.asarray(info[f"_{FAILURE}"], np.bool_)
            failures = tuple(str(info[FAILURE][lane]) for lane in np.flatnonzero(rebuilt))
            failed = rebuilt & is_step
        np.add(self._returns, reward, out=self._returns, where=is_step)
        self._lengths += is_step
        ended = (terminated | truncated) & is_step
        if failures:
            is_step = is_step & ~failed
        learned = np.clip(reward, -1.0, 1.0) if self._clip else reward
        if self._measure:
            self._discounted = self._gamma * self._discounted + learned
            self.returns = self.returns.merged(Moments.of(self._discounted[is_step]))
            # The row after an end is no step, and its reward none.
            self._discounted[ended | self._after_end] = 0.0
        episodes: tuple[tuple[int, EpisodeResult], ...] = ()
        whole = np.flatnonzero(ended & is_step)
        if len(whole):
            results = map(EpisodeResult, self._returns[whole].tolist(), self._lengths[whole].tolist())
            episodes = tuple(zip(whole.tolist(), results, strict=True))
        self._returns[ended] = 0.0
        self._lengths[ended] = 0
        self._after_end = ended
        self._observation = self.environment.observe(observation)
        return Row(
            action=chosen.action,
            log_probability=np.zeros(self.lanes, np.float32) if density is None else density.astype(np.float32),
            reward=learned,
            terminated=terminated,
            truncated=truncated,
            observation=self._observation,
            failed=failed,
            failures=failures,
            steps=int(np.count_nonzero(is_step)),
            episodes=episodes,
        )

    def close(self) -> None:
        """Close the environment."""
        self.env.close()


class Replay(Protocol):
    """Where a worker sends its pushes: a `ReplayClient`, or a server in the same process."""

    waiting_for: str | None

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply | None:
        """See `ReplayClient.insert`."""
        ...


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
        measure_returns: whether pushes tell of discounted returns, by which the learner may scale rewards.
    """

    policy: PolicySpec
    num_envs: int
    segment_length: int
    n_steps: int
    gamma: float
    clip_rewards: bool
    run_seed: int
    trajectory_rows: int | None = None
    measure_returns: bool = False

    @property
    def layout(self) -> Layout:
        """Layout of the experience."""
        return self.policy.environment.layout(segment_length=self.segment_length, n_steps=self.n_steps)

    def make_lanes(self, seed: np.random.SeedSequence) -> Lanes:
        """Make the environments."""
        environment = self.policy.environment
        return Lanes(
            environment,
            self.num_envs,
            seed,
            gamma=self.gamma,
            clip_rewards=self.clip_rewards,
            measure_returns=self.measure_returns,
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
        last_word: the last thing worth telling.
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
    last_word: str


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
        self._lanes = spec.make_lanes(environment_seed)
        self._policy = spec.policy.build()
        self._policy.begin(policy_seed, worker, workers)
        self._weights = weights
        self._outbox = _Outbox(replay, worker, incarnation)
        self._stop = threading.Event()
        self._env_steps = self._episodes = self._failures = 0
        self._seconds_waited = 0.0
        self._waiting_for: str | None = None
        self._last_word = "starting"

    def run(self) -> WorkerReport:
        """Roll out until `stop` is called or the replay server says that the run is finished.

        Raises:
            DeadlineExceeded: no weights came, or the replay server took no push, in time.
            EnvironmentFailed: an environment failed again and again.
        """
        try:
            self._wait_for_weights()
            self._last_word = "rolling out"
            self._roll_out()
        finally:
            self._outbox.close()
            self._leave()
            self._lanes.close()
        self._outbox.check()
        self._last_word = "done"
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
        while not self._stop.is_set() and not self._outbox.finished:
            row = self._lanes.step(self._policy, step=self._outbox.env_steps)
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
        self._outbox.put(returns=self._lanes.returns, **content)
        self._lanes.returns = Moments()

    def _count(self, row: Row) -> None:
        self._env_steps += row.steps
        self._episodes += len(row.episodes)
        if row.failures:
            self._failures += len(row.failures)
            self._last_word = f"rebuilt an environment after {row.failures[-1]}"

    def stop(self, seconds: float | None = None) -> None:
        """Ask `run` to send what it has, within `seconds` or else a short time, and return."""
        self._outbox.hurry(_SECONDS_TO_SEND_THE_REST if seconds is None else seconds)
        self._stop.set()

    def place(self, rank: int, workers: int) -> None:
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
            pushes=self._outbox.accepted,
            steps_sent=self._outbox.steps_sent,
            steps_unsent=self._outbox.steps_taken - self._outbox.steps_sent,
            weights_version=self._weights.version,
            failures=self._failures,
            seconds_waited=self._seconds_waited + self._outbox.seconds_waited,
            waiting_for=self._waiting_for or self._outbox.waiting_for,
            last_word=self._last_word,
        )


class _Outbox:
    """Sends pushes in order from a thread of its own, a bounded number of them waiting."""

    def __init__(self, replay: Replay, worker: int, incarnation: int) -> None:
        self._replay, self._worker, self._incarnation = replay, worker, incarnation
        self._queue: queue.Queue[Push | None] = queue.Queue(_MOST_PUSHES_WAITING)
        self._sequence = 0
        self._abort = threading.Event()
        self._error: BaseException | None = None
        self._end = math.inf
        self.env_steps = self.accepted = self.steps_taken = self.steps_sent = 0
        self.seconds_waited = 0.0
        self.finished = False
        self._thread = threading.Thread(target=self._send_all, name="outbox", daemon=True)
        self._thread.start()

    @property
    def waiting_for(self) -> str | None:
        return self._replay.waiting_for

    def put(
        self,
        *,
        segments: Sequence[Segment] = (),
        trajectories: Sequence[tuple[Permit, Trajectory]] = (),
        episodes: Sequence[EpisodeResult] = (),
        returns: Moments = _NONE,
    ) -> None:
        """Hand over a push; wait while too many are waiting, or until the time that `hurry` gave is over.

        Raises:
            Exception: what an earlier push met.
        """
        if not (segments or trajectories or episodes):
            return
        content = segments or (), tuple(episodes), tuple(trajectories), returns
        push = Push(self._worker, self._incarnation, self._sequence, *content)
        self._sequence += 1
        self.steps_taken += push.steps
        while not self.finished:
            self.check()
            begun = time.monotonic()
            try:
                self._queue.put(push, timeout=0.2)
                return
            except queue.Full:
                if time.monotonic() > self._end:
                    return
            finally:
                self.seconds_waited += time.monotonic() - begun

    def check(self) -> None:
        """Raise what a push met."""
        if self._error is not None:
            raise self._error

    def _send_all(self) -> None:
        try:
            while (push := self._queue.get()) is not None:
                reply = self._replay.insert(push, stop=self._abort)
                if reply is None:
                    return
                self.env_steps = max(self.env_steps, reply.env_steps)
                self.accepted += reply.accepted
                self.steps_sent += push.steps if reply.accepted or reply.repeated else 0
                self.finished = self.finished or reply.finished
        except BaseException as error:
            self._error = error

    def hurry(self, seconds: float) -> None:
        """Give up what is not sent in `seconds` from now."""
        self._end = time.monotonic() + seconds

    def close(self) -> None:
        """Send what is waiting, for as long as `hurry` gave or else a short time; then give up."""
        end = time.monotonic() + _SECONDS_TO_SEND_THE_REST if math.isinf(self._end) else self._end
        while self._thread.is_alive() and time.monotonic() < end:
            try:
                self._queue.put(None, timeout=0.05)
                break
            except queue.Full:
                continue
        self._thread.join(max(end - time.monotonic(), 0.0))
        self._abort.set()
        self._thread.join(1.0)


RolloutActor = actor_class(RolloutWorker, max_concurrency=2)
