"""OnPolicyWorker: produces the units it holds permits for, each under exactly the weights the permit names."""

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
_SECONDS_BEFORE_ASKING_AGAIN = 0.02
_SECONDS_TO_GIVE_BACK = 2.0


class Queue(Protocol):
    """Where permits come from and trajectories go: a `TrajectoryClient`."""

    waiting_for: str | None

    def request_permits(
        self, worker: int, incarnation: int, count: int, *, stop: threading.Event | None = None
    ) -> PermitReply | None:
        """See `TrajectoryClient.request_permits`."""
        ...

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply | None:
        """See `TrajectoryClient.insert`."""
        ...

    def revoke(self, worker: int, incarnation: int, *, seconds: float | None = None) -> None:
        """See `TrajectoryClient.revoke`."""
        ...


class OnPolicyWorker(RolloutWorker):
    """A rollout worker whose trajectories each begin under a permit, and end before the weights change."""

    def __init__(self, spec: RolloutSpec, *, queue: Queue, **process: Any) -> None:
        """Make the environment and the policy.

        Args:
            spec: what to roll out; its `trajectory_rows` says how long a unit is.
            queue: where permits come from and trajectories go.
            process: the other arguments of `RolloutWorker`.
        """
        super().__init__(spec, replay=queue, **process)
        self._queue = queue

    def _roll_out(self) -> None:
        builder = TrajectoryBuilder(self.spec.num_envs, self.spec.gamma, rows=self.spec.trajectory_rows)
        builder.begin(self._lanes.reset())
        episodes: list[EpisodeResult] = []
        while not self._sender.finished and not self._stop.is_set():
            if not builder.busy and not self._begin_units(builder):
                continue
            asked_for = builder.holding
            row = self._lanes.step(self._policy, step=self._sender.env_steps)
            self._count(row)
            episodes += (r for lane, r in row.episodes if lane in asked_for or not self._whole_episodes)
            complete = builder.add(
                row.action, row.log_probability, row.reward, row.terminated, row.truncated, row.observation, row.failed
            )
            if complete:
                self._send(trajectories=complete, episodes=episodes)
                episodes = []

    def _leave(self) -> None:
        # A server that is away forgets the permits with everything else, and the coordinator takes them back too.
        with contextlib.suppress(DeadlineExceeded):
            self._queue.revoke(self.worker, self.incarnation, seconds=_SECONDS_TO_GIVE_BACK)

    @property
    def _whole_episodes(self) -> bool:
        return self.spec.trajectory_rows is None

    def _begin_units(self, builder: TrajectoryBuilder) -> bool:
        """Wait for permits and for their weights, and assign them to lanes; False if that came to nothing.

        Whole episodes begin at a reset, so lanes that are inside an episode nobody asked for are reset.
        """
        begun = time.monotonic()
        reply = self._queue.request_permits(self.worker, self.incarnation, self.spec.num_envs, stop=self._stop)
        self._seconds_waited += time.monotonic() - begun
        if reply is None or reply.finished:
            self._stop.set()
            return False
        if not self._load_version(reply.permits[0].version):
            # They are those of a server or store that was recreated; the learner is about to publish anew.
            self._queue.revoke(self.worker, self.incarnation)
            self._stop.wait(_SECONDS_BEFORE_ASKING_AGAIN)
            return False
        if self._whole_episodes:
            builder.begin(self._lanes.reset())
        for lane, permit in zip(builder.idle, reply.permits, strict=False):
            builder.assign(lane, permit)
        return True

    def _load_version(self, version: int) -> bool:
        """Wait until the policy has the weights of `version`; False if they are already newer, or on a stop."""
        end = time.monotonic() + _SECONDS_FOR_WEIGHTS
        self._waiting_for = f"version {version} of the weights"
        while self._weights.version < version and not self._stop.wait(0.001):
            self._pull()
            if time.monotonic() > end:
                raise DeadlineExceeded(f"version {version} of the weights did not come in {_SECONDS_FOR_WEIGHTS:.0f} s")
        self._waiting_for = None
        return self._weights.version == version


OnPolicyActor = actor_class(OnPolicyWorker, max_concurrency=2)
