"""Prometheus metrics of a run, recorded through Ray, which exports them on every node with `ray[default]`.

The coordinator records all metrics. Their exported names begin with `ray_squall_`, and each has the tags `run` and
`process`. An installation without `ray[default]` accepts and drops the metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

# TensorBoard tag -> metric name and description.
_GAUGES = {
    "time/fps": ("squall_env_steps_per_second", "environment steps per second"),
    "time/updates_per_second": ("squall_updates_per_second", "updates per second"),
    "replay/size": ("squall_replay_size", "transitions or trajectories in the replay"),
    "replay/bytes": ("squall_replay_bytes", "memory of the replay's contents, in bytes"),
    "replay/samples_per_insert": ("squall_samples_per_insert", "transitions sampled per transition inserted"),
    "replay/sample_age": ("squall_sample_age", "mean age of the last sample, in steps inserted since"),
    "rollout/policy_lag": ("squall_policy_lag", "versions between the newest weights and those that workers act with"),
    "train/weights_version": ("squall_weights_version", "version of the last published weights"),
    "rollout/ep_rew_mean": ("squall_episode_return_mean", "mean return of the last 100 episodes"),
    "rollout/ep_len_mean": ("squall_episode_length_mean", "mean length of the last 100 episodes"),
    "eval/mean_reward": ("squall_evaluation_return_mean", "mean return of the last periodic evaluation"),
}
_COUNTERS = {
    "time/total_timesteps": ("squall_env_steps", "environment steps accepted"),
    "train/n_updates": ("squall_updates", "updates"),
}
_TAGS = ("run", "process")


class RunMetrics:
    """The gauges and counters of one run."""

    def __init__(self, run: str) -> None:
        """Create the metrics without recording a value.

        Args:
            run: name of the run.
        """
        self._run = run
        self._gauges = {tag: Gauge(name, about, _TAGS) for tag, (name, about) in _GAUGES.items()}
        self._counters = {tag: Counter(name, about, _TAGS) for tag, (name, about) in _COUNTERS.items()}
        self._actors = Gauge("squall_actors", "rollout workers", _TAGS)
        self._restarts = Counter("squall_restarts", "number of times a process was recreated", _TAGS)
        self._waits = Counter("squall_wait_seconds", "time spent waiting, by cause", (*_TAGS, "cause"))
        self._counted: dict[tuple[str, ...], float] = {}

    def record(self, statistics: Mapping[str, float], processes: Iterable[Any], actors: int) -> None:
        """Record the run's statistics, and restarts and waiting times of its processes.

        Args:
            statistics: values by TensorBoard tag.
            processes: the supervised processes, each a `services.supervision.processes.Process`.
            actors: number of rollout workers that the run should have.
        """
        run_tags = {"run": self._run, "process": "coordinator"}
        for tag, gauge in self._gauges.items():
            if tag in statistics:
                gauge.set(statistics[tag], run_tags)
        for tag, counter in self._counters.items():
            self._count(counter, statistics.get(tag, 0.0), run_tags, tag)
        self._actors.set(actors, run_tags)
        for process in processes:
            tags = {"run": self._run, "process": process.name}
            self._count(self._restarts, process.restarts, tags, "restarts")
            waited = getattr(process.report, "seconds_waited", None)
            if waited is not None:
                cause = "experience" if process.role == "learner" else "learner"
                self._count(self._waits, waited, {**tags, "cause": cause}, "waits", str(process.incarnation))

    def _count(self, counter: Counter, total: float, tags: dict[str, str], *key: str) -> None:
        """Increase a counter to `total`, which a process may count from 0 in each incarnation."""
        full_key = (tags["process"], *key)
        increase = total - self._counted.get(full_key, 0.0)
        if increase > 0.0:
            counter.inc(increase, tags)
            self._counted[full_key] = total
