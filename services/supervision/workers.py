"""WorkerPool: a run's rollout workers, as many as are wanted; they join and leave while the run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from replay.trajectory_server import QueueSpec
from services.supervision.autoscaling import Autoscaler
from services.supervision.placement import cluster_cpus, too_many
from services.supervision.processes import Process
from services.supervision.progress import RunObserver
from services.supervision.topology import Topology

LEAVE_SECONDS = 10.0
STARTS_AT_ONCE = 4
_SECONDS_TO_SEND = LEAVE_SECONDS - 2.0
"""The rest is for giving back what was held, and for the way."""


@dataclass
class _Draining:
    process: Process
    deadline: float


class WorkerPool:
    """Workers by index. An index that comes free is used again, by another incarnation, whose seeds are new."""

    def __init__(self, start: Callable[[int, int, int], Any], *, first_incarnation: int) -> None:
        """Begin with nobody.

        Args:
            start: takes an index, an incarnation and how many workers there shall be, and returns an actor's handle.
            first_incarnation: number of every index's first incarnation.
        """
        self._start, self._first_incarnation = start, first_incarnation
        self._wanted = 0
        self._used: dict[int, int] = {}
        self._draining: list[_Draining] = []
        self.workers: list[Process] = []
        self.starting: list[Process] = []
        """Those of the workers who are yet to be started."""

    @property
    def draining(self) -> list[Process]:
        """Those who were told to leave and have not left yet."""
        return [draining.process for draining in self._draining]

    def scale(self, wanted: int) -> None:
        """Have `wanted` workers; `start_some` starts those who join.

        Who leaves sends what it has first, as long as there is time; the newest leave.
        """
        self._wanted = wanted
        starting = [self._new(index) for index in self._free_indices(wanted - len(self.workers))]
        self.workers += starting
        self.starting += starting
        for process in [self.workers.pop() for _ in range(len(self.workers) - wanted)]:
            if process in self.starting:
                self.starting.remove(process)
                continue
            self._used[process.index] = process.incarnation
            if process.handle is not None:
                process.handle.stop.remote(_SECONDS_TO_SEND)
            self._draining.append(_Draining(process, time.monotonic() + LEAVE_SECONDS))
        for rank, process in enumerate(sorted(self.workers, key=lambda process: process.index)):
            if process.handle is not None:
                process.handle.set_rank.remote(rank, wanted)

    def start_some(self, most: int) -> None:
        """Start a few of those who are to join, so that at most `most` workers are busy with their start."""
        busy = sum(worker.report is None and not worker.pending for worker in self.workers if worker.handle is not None)
        for _ in range(min(STARTS_AT_ONCE, most - busy, len(self.starting))):
            self.starting.pop(0).start()

    def _rank(self, index: int) -> int:
        """Return an index's place among those there are: while others leave there are gaps."""
        return sum(process.index < index for process in self.workers)

    def _start_ranked(self, index: int, incarnation: int) -> Any:
        handle = self._start(index, incarnation, self._wanted)
        handle.set_rank.remote(self._rank(index), self._wanted)
        return handle

    def _free_indices(self, count: int) -> Iterator[int]:
        # Not an index whose last holder is still leaving: a server that hears of the new incarnation takes what the
        # old one sends for a repeat.
        taken = {process.index for process in [*self.workers, *self.draining]}
        index = 0
        for _ in range(count):
            while index in taken:
                index += 1
            yield index
            index += 1

    def _new(self, index: int) -> Process:
        return Process(
            "worker",
            index,
            lambda incarnation: self._start_ranked(index, incarnation),
            run=lambda handle: handle.run.remote(),
            numbered=True,
            first_incarnation=self._used.get(index, self._first_incarnation - 1) + 1,
            is_at_work=lambda _, now: now.pushes > 0,
        )

    def reap(self) -> list[tuple[Process, str]]:
        """Let go of those who have left, and of those who took too long; return each with a word about it."""
        gone = []
        for draining in list(self._draining):
            process = draining.process
            death = process.poll()
            late = time.monotonic() > draining.deadline
            if process.done:
                word = exit_message(process.result)
            elif death is not None:
                word = f"died while it left: {death.line}"
            elif late or process.handle is None:
                word = f"was ended: it did not leave within {LEAVE_SECONDS:.0f} s"
            else:
                continue
            process.kill()
            self._draining.remove(draining)
            gone.append((process, word))
        return gone


def exit_message(report: Any) -> str:
    """Return a line about a worker that has left, from its last report."""
    if not report.steps_unsent:
        return f"left, with everything sent: {report.steps_sent:,} steps"
    return f"left, with {report.steps_sent:,} steps sent; {report.steps_unsent:,} steps were not taken"


MAX_WORKERS = 10_000


LEAST_STARTING = 4


class WorkerManager:
    """A run's crew and what decides its size."""

    def __init__(self, topology: Topology, observer: RunObserver, *, first_incarnation: int) -> None:
        """Describe the first workers; `start_some` starts them.

        Args:
            topology: the topology.
            observer: told of each change.
            first_incarnation: number of every worker's first incarnation.
        """
        self._topology, self._observer = topology, observer
        self._sizing = Autoscaler(max_workers(topology)) if topology.auto else None
        self.worker_pool = WorkerPool(topology.start_worker, first_incarnation=first_incarnation)
        self.worker_pool.scale(topology.actors)

    def scale_as_told(self, wanted: Any) -> dict[str, Any]:
        """Have as many workers as a command says; return the answer to it."""
        before = len(self.worker_pool.workers)
        if wanted == "auto":
            self._sizing = Autoscaler(max_workers(self._topology))
            self._observer.event("scale", f"the number of workers follows from who waits, up to {self._sizing.most}")
            return {"actors": before, "before": before, "auto": True}
        # None at all only where experience may come from outside.
        outside = self._topology.server_config is not None and not isinstance(self._topology.replay, QueueSpec)
        least = 0 if outside else 1
        if not isinstance(wanted, int) or isinstance(wanted, bool) or not least <= wanted <= MAX_WORKERS:
            return {"error": f"actors must be auto or a whole number from {least} to {MAX_WORKERS}, got {wanted!r}"}
        refused = too_many(wanted, self._topology.cpus_per_actor) if wanted > before else None
        if refused is not None:
            return {"error": refused}
        self._sizing = None
        self._scale(wanted)
        return {"actors": wanted, "before": before}

    def _scale(self, wanted: int, why: str = "") -> None:
        before = len(self.worker_pool.workers)
        self.worker_pool.scale(wanted)
        self._observer.event("scale", f"scaled from {before} to {wanted} workers{why and ': '}{why}")

    def start_some(self, *, learner_is_up: bool) -> None:
        """Start a few of the workers who are yet to be started; until the learner is up one CPU is left to its start.

        That is the longest of all starts, and waits for the workers' on a machine of few cores.
        """
        # Those that keep a CPU have places that Ray counts; of the others each start takes one from those at work.
        if self.worker_pool.starting:
            cpus = cluster_cpus()
            most = max(LEAST_STARTING, cpus) if learner_is_up else max(1, cpus - 1)
            self.worker_pool.start_some(MAX_WORKERS if self._topology.cpus_per_actor else most)

    def size(self, learner: Any) -> None:
        """With `--actors auto`, have as many workers as the learner, whose report this is, needs."""
        reports = [worker.report for worker in self.worker_pool.workers]
        if self._sizing is None or None in reports or learner is None:
            return
        if not learner.updates or self.worker_pool.draining:
            return  # the first experience is always waited for
        waits = {(report.worker, report.incarnation): report.seconds_waited for report in reports}
        better = self._sizing.look(learner.seconds_waited, waits)
        if better is not None:
            self._scale(*better)


def max_workers(topology: Topology) -> int:
    """Return how many workers `--actors auto` may have: one for each CPU, or as many as the cluster has room for."""
    return max(1, int(cluster_cpus() / max(topology.cpus_per_actor, 1.0)))
