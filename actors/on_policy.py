"""The on-policy rollout worker: produces one trajectory per permit, with exactly the weights that the permit names."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any, Protocol

from actors.rollout import RolloutSpec, RolloutWorker
from actors.segments import TrajectoryBuilder
from replay.errors import DeadlineExceeded
from replay.messages import InsertReply, PermitReply, Push
from replay.remote import actor_class
from replay.types import EpisodeResult

_SECONDS_FOR_WEIGHTS = 300.0
_SECONDS_BEFORE_RETRY = 0.02
_SECONDS_TO_REVOKE = 2.0


class Queue(Protocol):
    """The source of permits and receiver of trajectories: a `TrajectoryClient`."""

    waiting_for: str | None

    def request_permits(
        self, worker: int, incarnation: int, count: int, *, stop: threading.Event | None = None
    ) -> PermitReply | None:
        """Block until permits are available and return at most `count`, or None if `stop` was set first."""
        ...

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply | None:
        """Send a push and return the reply, or None if `stop` was set first."""
        ...

    def revoke(self, worker: int, incarnation: int, *, seconds: float | None = None) -> None:
        """Revoke the open permits of a worker, within `seconds`."""
        ...


class OnPolicyWorker(RolloutWorker):
    """The rollout loop of an on-policy run: each trajectory has a permit, and no trajectory mixes weight versions."""

    def __init__(self, spec: RolloutSpec, *, queue: Queue, **process: Any) -> None:
        """Make the environment and the policy.

        Args:
            spec: the description of the rollout; `trajectory_rows` is the length of a trajectory.
            queue: source of permits and receiver of trajectories.
            process: the other arguments of `RolloutWorker`.
        """
        super().__init__(spec, replay=queue, **process)
        self._queue = queue

    def _roll_out(self) -> None:
        builder = TrajectoryBuilder(self.spec.num_envs, self.spec.gamma, rows=self.spec.trajectory_rows)
        builder.begin(self._runner.reset())
        episodes: list[EpisodeResult] = []
        while not self._sender.finished and not self._stop.is_set():
            if not builder.busy and not self._begin_trajectories(builder):
                continue
            permitted = builder.permitted
            step = self._runner.step(self._policy, step=self._sender.env_steps)
            self._count(step)
            # In whole-episode mode, the results of episodes without a permit are not sent.
            episodes += (result for lane, result in step.episodes if lane in permitted or not self._whole_episodes)
            trajectories = builder.add(
                step.action,
                step.log_probability,
                step.reward,
                step.terminated,
                step.truncated,
                step.observation,
                step.failed,
            )
            if trajectories:
                self._send(trajectories=trajectories, episodes=episodes)
                episodes = []

    def _release(self) -> None:
        # The server need not answer: a dead server has lost the permits, and the coordinator revokes them as well.
        with contextlib.suppress(DeadlineExceeded):
            self._queue.revoke(self.worker, self.incarnation, seconds=_SECONDS_TO_REVOKE)

    @property
    def _whole_episodes(self) -> bool:
        return self.spec.trajectory_rows is None

    def _begin_trajectories(self, builder: TrajectoryBuilder) -> bool:
        """Wait for permits and their weights, then assign the permits to lanes; return False if that failed.

        A whole episode begins at a reset, so all lanes are reset, including lanes that are inside an episode but
        have no permit.
        """
        started = time.monotonic()
        reply = self._queue.request_permits(self.worker, self.incarnation, self.spec.num_envs, stop=self._stop)
        self._seconds_waited += time.monotonic() - started
        if reply is None or reply.finished:
            self._stop.set()
            return False
        if not self._load_version(reply.permits[0].version):
            # The permits name an older version, because the trajectory server or the weight store was recreated. The
            # learner is about to publish the current version.
            self._queue.revoke(self.worker, self.incarnation)
            self._stop.wait(_SECONDS_BEFORE_RETRY)
            return False
        if self._whole_episodes:
            builder.begin(self._runner.reset())
        for lane, permit in zip(builder.idle, reply.permits, strict=False):
            builder.assign(lane, permit)
        return True

    def _load_version(self, version: int) -> bool:
        """Wait until the policy has the weights of `version`.

        Return False if the policy already has newer weights or if `stop` was called.

        Raises:
            DeadlineExceeded: the weights did not arrive in time.
        """
        deadline = time.monotonic() + _SECONDS_FOR_WEIGHTS
        self._waiting_for = f"version {version} of the weights"
        while self._weights.version < version and not self._stop.wait(0.001):
            self._poll_weights()
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"version {version} of the weights did not arrive within {_SECONDS_FOR_WEIGHTS:.0f} s"
                )
        self._waiting_for = None
        return self._weights.version == version


OnPolicyActor = actor_class(OnPolicyWorker, max_concurrency=2)
