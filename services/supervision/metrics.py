"""Metrics: a run's figures for Prometheus, by way of Ray, which exports them on every node with `ray[default]`.

All are recorded by the coordinator's process, and named `ray_squall_...` where they come out. Every one has the tags
`run` and `process`. A Ray that exports nothing takes them without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

# TensorBoard tag -> name here and description.
_GAUGES = {
    "time/fps": ("squall_env_steps_per_second", "environment steps a second"),
    "time/updates_per_second": ("squall_updates_per_second", "updates a second"),
    "replay/size": ("squall_replay_size", "transitions or trajectories held"),
    "replay/bytes": ("squall_replay_bytes", "memory of what the replay holds"),
    "replay/samples_per_insert": ("squall_samples_per_insert", "transitions drawn for each one inserted"),
    "replay/sample_age": ("squall_sample_age", "mean age of what was drawn last, in steps inserted since"),
    "rollout/policy_lag": ("squall_policy_lag", "versions between the newest weights and those that workers act with"),
    "train/weights_version": ("squall_weights_version", "version of the weights published last"),
    "rollout/ep_rew_mean": ("squall_episode_return_mean", "mean return of the last 100 episodes"),
    "rollout/ep_len_mean": ("squall_episode_length_mean", "mean length of the last 100 episodes"),
    "eval/mean_reward": ("squall_evaluation_return_mean", "mean return of the last periodic evaluation"),
}
_COUNTERS = {
    "time/total_timesteps": ("squall_env_steps", "environment steps accepted"),
    "train/n_updates": ("squall_updates", "updates made"),
}
_TAGS = ("run", "process")


class RunMetrics:
    """Gauges and counters of one run."""

    def __init__(self, run: str) -> None:
        """Record nothing yet."""
        self._run = run
        self._gauges = {tag: Gauge(name, about, _TAGS) for tag, (name, about) in _GAUGES.items()}
        self._counters = {tag: Counter(name, about, _TAGS) for tag, (name, about) in _COUNTERS.items()}
        self._actors = Gauge("squall_actors", "rollout workers", _TAGS)
        self._restarts = Counter("squall_restarts", "times a process was recreated", _TAGS)
        self._waits = Counter("squall_wait_seconds", "time spent waiting, by cause", (*_TAGS, "cause"))
        self._counted: dict[tuple[str, ...], float] = {}

    def record(self, statistics: Mapping[str, float], processes: Iterable[Any], actors: int) -> None:
        """Record figures by TensorBoard tag, and what each supervised process tells.

        Args:
            statistics: as TensorBoard gets them.
            processes: those that there are, each a `services.processes.Process`.
            actors: rollout workers there shall be.
        """
        whole = {"run": self._run, "process": "coordinator"}
        for tag, gauge in self._gauges.items():
            if tag in statistics:
                gauge.set(statistics[tag], whole)
        for tag, counter in self._counters.items():
            self._count(counter, statistics.get(tag, 0.0), whole, tag)
        self._actors.set(actors, whole)
        for process in processes:
            tags = {"run": self._run, "process": process.name}
            self._count(self._restarts, process.restarts, tags, "restarts")
            waited = getattr(process.report, "seconds_waited", None)
            if waited is not None:
                cause = "experience" if process.role == "learner" else "learner"
                self._count(self._waits, waited, {**tags, "cause": cause}, "waits", str(process.incarnation))

    def _count(self, counter: Counter, total: float, tags: dict[str, str], *what: str) -> None:
        """Raise a counter to a total that was counted elsewhere; each incarnation of a process counts from 0."""
        key = (tags["process"], *what)
        more = total - self._counted.get(key, 0.0)
        if more > 0.0:
            counter.inc(more, tags)
            self._counted[key] = total
