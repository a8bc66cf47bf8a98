"""Staffing: how many rollout workers a run has, as it is told or as who waits for whom shows, and their start."""

from __future__ import annotations

from typing import Any

from replay.trajectory_server import QueueSpec
from services.crew import Crew
from services.placement import cluster_cpus, too_many
from services.program import Program
from services.progress import Watcher
from services.sizing import AutoSize

MOST_ACTORS = 10_000
LEAST_STARTING = 4


class Staffing:
    """A run's crew and what decides its size."""

    def __init__(self, program: Program, watcher: Watcher, *, first_incarnation: int) -> None:
        """Describe the first workers; `start_some` starts them.

        Args:
            program: the topology.
            watcher: told of each change.
            first_incarnation: number of every worker's first incarnation.
        """
        self._program, self._watcher = program, watcher
        self._sizing = AutoSize(most_actors(program)) if program.auto else None
        self.crew = Crew(program.start_worker, first_incarnation=first_incarnation)
        self.crew.scale(program.actors)

    def scale_as_told(self, wanted: Any) -> dict[str, Any]:
        """Have as many workers as a command says; return the answer to it."""
        before = len(self.crew.workers)
        if wanted == "auto":
            self._sizing = AutoSize(most_actors(self._program))
            self._watcher.event("scale", f"the number of workers follows from who waits, up to {self._sizing.most}")
            return {"actors": before, "before": before, "auto": True}
        # None at all only where experience may come from outside.
        outside = self._program.listening is not None and not isinstance(self._program.replay, QueueSpec)
        least = 0 if outside else 1
        if not isinstance(wanted, int) or isinstance(wanted, bool) or not least <= wanted <= MOST_ACTORS:
            return {"error": f"actors must be auto or a whole number from {least} to {MOST_ACTORS}, got {wanted!r}"}
        refused = too_many(wanted, self._program.cpus_per_actor) if wanted > before else None
        if refused is not None:
            return {"error": refused}
        self._sizing = None
        self._scale(wanted)
        return {"actors": wanted, "before": before}

    def _scale(self, wanted: int, why: str = "") -> None:
        before = len(self.crew.workers)
        self.crew.scale(wanted)
        self._watcher.event("scale", f"scaled from {before} to {wanted} workers{why and ': '}{why}")

    def start_some(self, *, learner_is_up: bool) -> None:
        """Start a few of the workers who are yet to be started; until the learner is up one CPU is left to its start.

        That is the longest of all starts, and waits for the workers' on a machine of few cores.
        """
        # Those that keep a CPU have places that Ray counts; of the others each start takes one from those at work.
        if self.crew.joining:
            cpus = cluster_cpus()
            most = max(LEAST_STARTING, cpus) if learner_is_up else max(1, cpus - 1)
            self.crew.start_some(MOST_ACTORS if self._program.cpus_per_actor else most)

    def size(self, learner: Any) -> None:
        """With `--actors auto`, have as many workers as the learner, whose report this is, needs."""
        reports = [worker.report for worker in self.crew.workers]
        if self._sizing is None or None in reports or learner is None:
            return
        if not learner.updates or self.crew.leaving:
            return  # the first experience is always waited for
        waits = {(report.worker, report.incarnation): report.seconds_waited for report in reports}
        better = self._sizing.look(learner.seconds_waited, waits)
        if better is not None:
            self._scale(*better)


def most_actors(program: Program) -> int:
    """Return how many workers `--actors auto` may have: one for each CPU, or as many as the cluster has room for."""
    return max(1, int(cluster_cpus() / max(program.cpus_per_actor, 1.0)))
