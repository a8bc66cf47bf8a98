"""RunStatistics: what is known of how a run goes, in the shapes that status, metrics and summary want."""

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
    """The newest reports of learner and replay, the last episodes, and rates over the last seconds."""

    def __init__(self, topology: Topology, progress: Progress) -> None:
        """Know nothing yet.

        Args:
            topology: what the run is.
            progress: how far it is, kept up to date by whoever supervises it.
        """
        self._topology, self._progress = topology, progress
        self.stats: ReplayStats | QueueStats | None = None
        self.learner: LearnerReport | None = None
        self.policy_lag: float | None = None
        self._returns: deque[float] = deque(maxlen=RETURNS_KEPT)
        self._lengths: deque[int] = deque(maxlen=RETURNS_KEPT)
        self._rates: deque[tuple[float, int, int]] = deque()

    def take_stats(self, stats: ReplayStats | QueueStats) -> None:
        """Take in what the replay or trajectory server says."""
        self.stats = stats
        now = time.monotonic()
        self._rates.append((now, stats.counters.env_steps, self.updates))
        while now - self._rates[0][0] > RATE_WINDOW_SECONDS:
            self._rates.popleft()

    def take_versions(self, acting: Sequence[int]) -> None:
        """Take in the versions of the weights that workers act with."""
        behind = [max(self.weights_version - version, 0) for version in acting if version >= 0]
        self.policy_lag = sum(behind) / len(behind) if behind else None

    def take_episodes(self, episodes: Sequence[EpisodeResult]) -> None:
        """Take in episodes that ended."""
        self._returns.extend(episode.episode_return for episode in episodes)
        self._lengths.extend(episode.length for episode in episodes)

    @property
    def updates(self) -> int:
        """Updates made."""
        return 0 if self.learner is None else self.learner.updates

    @property
    def weights_version(self) -> int:
        """Version of the weights published last, -1 before the first."""
        return -1 if self.learner is None else self.learner.weights_version

    def speed(self) -> tuple[float, float]:
        """Return environment steps and updates a second, over the last seconds."""
        if len(self._rates) < 2:
            return 0.0, 0.0
        (begin, steps, updates), (end, steps_now, updates_now) = self._rates[0], self._rates[-1]
        seconds = max(end - begin, 1e-9)
        return (steps_now - steps) / seconds, max(updates_now - updates, 0) / seconds

    def _exploration_rate(self) -> float | None:
        return self._topology.policy.exploration_rate(self._progress.counters.env_steps)

    def snapshot(self) -> dict[str, Any]:
        """Return what `squall status` shows of the run as a whole."""
        steps_rate, updates_rate = self.speed()
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
        """Return figures by TensorBoard tag, or None before there are any."""
        learner, stats = self.learner, self.stats
        if stats is None or learner is None:
            return None
        steps_rate, updates_rate = self.speed()
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
            **_particular(stats),
            **learner.metrics,
        }
        return {tag: float(value) for tag, value in values.items() if value is not None}

    def summary(self, scores: tuple[Evaluation, Evaluation] | None) -> dict[str, Any]:
        """Return the figures of a run's summary; `scores` are those of the best and the last weights."""
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


def _particular(stats: ReplayStats | QueueStats) -> dict[str, float | None]:
    if isinstance(stats, ReplayStats):
        return {"replay/stale_updates": stats.stale_updates, "replay/sample_age": stats.sample_age}
    return {"replay/discarded_steps": stats.discarded_steps}


def _mean(values: deque[float] | deque[int]) -> float | None:
    return sum(values) / len(values) if values else None
