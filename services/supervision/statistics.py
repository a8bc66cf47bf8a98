"""Statistics of a run, as the snapshot for `squall status`, the metrics, and the summary need them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from actors.evaluation import Evaluation
from learner.learner import LearnerReport
from replay.server import ReplayStats
from replay.trajectory_server import QueueStats
from replay.types import EpisodeResult
from services.supervision.progress import Progress
from services.supervision.topology import Topology

RATE_WINDOW_SECONDS = 10.0
RETURNS_KEPT = 100


class RunStatistics:
    """The newest reports of learner and replay, the last episodes, and rates over the last seconds.

    Attributes:
        stats: newest statistics of the replay or trajectory server.
        learner: newest report of the learner.
        policy_lag: mean number of versions by which the workers' weights are behind the newest weights.
    """

    def __init__(self, topology: Topology, progress: Progress) -> None:
        """Create empty statistics.

        Args:
            topology: the run's topology.
            progress: the run's progress, which the coordinator keeps up to date.
        """
        self._topology, self._progress = topology, progress
        self.stats: ReplayStats | QueueStats | None = None
        self.learner: LearnerReport | None = None
        self.policy_lag: float | None = None
        self._returns: deque[float] = deque(maxlen=RETURNS_KEPT)
        self._lengths: deque[int] = deque(maxlen=RETURNS_KEPT)
        self._rates: deque[tuple[float, int, int]] = deque()

    def update_replay(self, stats: ReplayStats | QueueStats) -> None:
        """Store new statistics of the replay or trajectory server."""
        self.stats = stats
        now = time.monotonic()
        self._rates.append((now, stats.counters.env_steps, self.updates))
        while now - self._rates[0][0] > RATE_WINDOW_SECONDS:
            self._rates.popleft()

    def update_policy_lag(self, acting: Sequence[int]) -> None:
        """Compute the policy lag from the versions of the weights that the workers act with."""
        behind = [max(self.weights_version - version, 0) for version in acting if version >= 0]
        self.policy_lag = sum(behind) / len(behind) if behind else None

    def add_episodes(self, episodes: Sequence[EpisodeResult]) -> None:
        """Add episodes that ended."""
        self._returns.extend(episode.episode_return for episode in episodes)
        self._lengths.extend(episode.length for episode in episodes)

    @property
    def updates(self) -> int:
        """Number of updates."""
        return 0 if self.learner is None else self.learner.updates

    @property
    def weights_version(self) -> int:
        """Version of the last published weights, -1 before the first."""
        return -1 if self.learner is None else self.learner.weights_version

    def rates(self) -> tuple[float, float]:
        """Return environment steps and updates per second, over the last `RATE_WINDOW_SECONDS`."""
        if len(self._rates) < 2:
            return 0.0, 0.0
        (start, first_steps, first_updates), (end, steps, updates) = self._rates[0], self._rates[-1]
        seconds = max(end - start, 1e-9)
        return (steps - first_steps) / seconds, max(updates - first_updates, 0) / seconds

    def _exploration_rate(self) -> float | None:
        return self._topology.policy.exploration_rate(self._progress.counters.env_steps)

    def snapshot(self) -> dict[str, Any]:
        """Return the part of `squall status` that describes the run as a whole."""
        steps_rate, updates_rate = self.rates()
        counters = self._progress.counters
        return {
            "env_steps": counters.env_steps,
            "steps": self._topology.steps,
            "updates": self.updates,
            "samples_per_insert": counters.samples_per_insert,
            "samples_per_insert_wanted": self._topology.samples_per_insert,
            "episodes": self._progress.episodes,
            "train_return_mean": _mean(self._returns),
            "exploration_rate": self._exploration_rate(),
            "env_steps_per_second": steps_rate,
            "updates_per_second": updates_rate,
            "weights_version": self.weights_version,
            "policy_lag": self.policy_lag,
            "replay": None if self.stats is None else asdict(self.stats),
            "best_return": self._progress.best_return,
            "seconds": self._progress.seconds,
        }

    def metrics(self) -> dict[str, float] | None:
        """Return metrics by TensorBoard tag, or None before learner and replay have reported."""
        learner, stats = self.learner, self.stats
        if stats is None or learner is None:
            return None
        steps_rate, updates_rate = self.rates()
        values: dict[str, float | None] = {
            "rollout/ep_rew_mean": _mean(self._returns),
            "rollout/ep_len_mean": _mean(self._lengths),
            "rollout/exploration_rate": self._exploration_rate(),
            "rollout/policy_lag": self.policy_lag,
            "time/fps": steps_rate,
            "time/updates_per_second": updates_rate,
            "time/total_timesteps": stats.counters.env_steps,
            "train/n_updates": learner.updates,
            "train/weights_version": learner.weights_version,
            "replay/size": stats.size,
            "replay/bytes": stats.bytes,
            "replay/samples_per_insert": stats.counters.samples_per_insert,
            **_replay_metrics(stats),
            **learner.metrics,
        }
        return {tag: float(value) for tag, value in values.items() if value is not None}

    def summary(self, scores: tuple[Evaluation, Evaluation] | None) -> dict[str, Any]:
        """Return the numbers of the run's summary.

        Args:
            scores: final evaluations of the best and the last weights; None if the run was not scored.
        """
        counters, seconds = self._progress.counters, self._progress.seconds
        best, last = scores or (None, None)
        return {
            "env_steps": counters.env_steps,
            "updates": self.updates,
            "samples_per_insert": round(counters.samples_per_insert, 4),
            "episodes": self._progress.episodes,
            "train_return_mean": _mean(self._returns),
            "eval_return_mean": best and best.mean,
            "eval_return_std": best and best.std,
            "eval_episodes": len(best.episodes) if best else 0,
            "final_return_mean": last and last.mean,
            "wall_seconds": round(seconds, 1),
            "env_steps_per_second": round(counters.env_steps / seconds, 1) if seconds else 0.0,
            "updates_per_second": round(self.updates / seconds, 1) if seconds else 0.0,
            "weights_version": self.weights_version,
            "replay_size": 0 if self.stats is None else self.stats.size,
            "replay_bytes": 0 if self.stats is None else self.stats.bytes,
        }


def _replay_metrics(stats: ReplayStats | QueueStats) -> dict[str, float | None]:
    if isinstance(stats, ReplayStats):
        return {"replay/stale_updates": stats.stale_updates, "replay/sample_age": stats.sample_age}
    return {"replay/discarded_steps": stats.discarded_steps}


def _mean(values: deque[float] | deque[int]) -> float | None:
    return sum(values) / len(values) if values else None
