"""The worker pool: starts, scales, and drains a run's rollout workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from replay.trajectory_server import QueueSpec
from services.supervision.autoscaling import Autoscaler
from services.supervision.placement import cluster_cpus, memory_shortage
from services.supervision.processes import Process
from services.supervision.progress import RunObserver
from services.supervision.topology import Topology

LEAVE_SECONDS = 10.0
MAX_STARTS_PER_TICK = 4
MIN_CONCURRENT_STARTS = 4
MAX_WORKERS = 10_000
# The rest of `LEAVE_SECONDS` is for the calls, and for releasing permits.
_SEND_SECONDS = LEAVE_SECONDS - 2.0


@dataclass
class _Draining:
    process: Process
    deadline: float


class WorkerPool:
    """The rollout workers of a run, by index.

    An index is reused after its worker has exited, with a new incarnation and so with new seeds.

    Attributes:
        workers: the workers that the run should have, in the order they were added.
        starting: those of `workers` that `start_some` has not started yet.
    """

    def __init__(self, start: Callable[[int, int, int], Any], *, first_incarnation: int) -> None:
        """Create an empty pool.

        Args:
            start: takes an index, an incarnation, and the number of workers, and returns the actor's handle.
            first_incarnation: number of every index's first incarnation.
        """
        self._start, self._first_incarnation = start, first_incarnation
        self._wanted = 0
        self._last_incarnations: dict[int, int] = {}
        self._draining: list[_Draining] = []
        self.workers: list[Process] = []
        self.starting: list[Process] = []

    @property
    def draining(self) -> list[Process]:
        """The workers that were asked to leave and have not exited yet."""
        return [draining.process for draining in self._draining]

    def scale(self, wanted: int) -> None:
        """Set the number of workers; `start_some` starts new ones.

        The newest workers leave first. A leaving worker sends its unsent rows before it exits, for at most
        `LEAVE_SECONDS`.
        """
        self._wanted = wanted
        starting = [self._new(index) for index in self._free_indices(wanted - len(self.workers))]
        self.workers += starting
        self.starting += starting
        for process in [self.workers.pop() for _ in range(len(self.workers) - wanted)]:
            if process in self.starting:
                self.starting.remove(process)
                continue
            self._last_incarnations[process.index] = process.incarnation
            if process.handle is not None:
                process.handle.stop.remote(_SEND_SECONDS)
            self._draining.append(_Draining(process, time.monotonic() + LEAVE_SECONDS))
        for rank, process in enumerate(sorted(self.workers, key=lambda process: process.index)):
            if process.handle is not None:
                process.handle.set_rank.remote(rank, wanted)

    def start_some(self, limit: int) -> None:
        """Start up to `MAX_STARTS_PER_TICK` workers, so that at most `limit` workers start at the same time."""
        busy = sum(worker.report is None and not worker.pending for worker in self.workers if worker.handle is not None)
        for _ in range(min(MAX_STARTS_PER_TICK, limit - busy, len(self.starting))):
            self.starting.pop(0).start()

    def _rank(self, index: int) -> int:
        """Return the rank of an index among the workers; the two differ while workers with lower indices leave."""
        return sum(process.index < index for process in self.workers)

    def _start_ranked(self, index: int, incarnation: int) -> Any:
        handle = self._start(index, incarnation, self._wanted)
        handle.set_rank.remote(self._rank(index), self._wanted)
        return handle

    def _free_indices(self, count: int) -> Iterator[int]:
        # The index of a leaving worker is not free: a server that knows of a newer incarnation discards the pushes of
        # the older one as repeats.
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
            first_incarnation=self._last_incarnations.get(index, self._first_incarnation - 1) + 1,
            made_progress=lambda _, now: now.pushes > 0,
        )

    def reap(self) -> list[tuple[Process, str]]:
        """Remove the leaving workers that have exited or are too late; return each with a message about its exit."""
        exits = []
        for draining in list(self._draining):
            process = draining.process
            reason = process.poll()
            late = time.monotonic() > draining.deadline
            if process.done:
                message = exit_message(process.result)
            elif reason is not None:
                message = f"died while it was leaving: {reason.line}"
            elif late or process.handle is None:
                message = f"was killed: it did not leave within {LEAVE_SECONDS:.0f} s"
            else:
                continue
            process.kill()
            self._draining.remove(draining)
            exits.append((process, message))
        return exits


def exit_message(report: Any) -> str:
    """Return a message about a worker that has left, from its last report."""
    if not report.steps_unsent:
        return f"left, with everything sent: {report.steps_sent:,} steps"
    return f"left, with {report.steps_sent:,} steps sent; {report.steps_unsent:,} steps were not accepted"


class WorkerManager:
    """Controls the size of a run's worker pool: by commands, or by the autoscaler."""

    def __init__(self, topology: Topology, observer: RunObserver, *, first_incarnation: int) -> None:
        """Describe the first workers; `start_some` starts them.

        Args:
            topology: the run's topology.
            observer: notified of each change.
            first_incarnation: number of every worker's first incarnation.
        """
        self._topology, self._observer = topology, observer
        self._autoscaler = Autoscaler(max_workers(topology)) if topology.auto else None
        self.worker_pool = WorkerPool(topology.start_worker, first_incarnation=first_incarnation)
        self.worker_pool.scale(topology.actors)

    def handle_scale(self, wanted: Any) -> dict[str, Any]:
        """Apply a scale command and return its result.

        Args:
            wanted: number of workers, or `auto`; unchecked, because it comes from a user.
        """
        before = len(self.worker_pool.workers)
        if wanted == "auto":
            self._autoscaler = Autoscaler(max_workers(self._topology))
            self._observer.event("scale", f"the number of workers is automatic, at most {self._autoscaler.maximum}")
            return {"actors": before, "before": before, "auto": True}
        # Only a run that accepts external experience can do without workers.
        external = self._topology.server_config is not None and not isinstance(self._topology.replay, QueueSpec)
        minimum = 0 if external else 1
        if not isinstance(wanted, int) or isinstance(wanted, bool) or not minimum <= wanted <= MAX_WORKERS:
            return {"error": f"actors must be auto or a whole number from {minimum} to {MAX_WORKERS}, got {wanted!r}"}
        shortage = memory_shortage(wanted, self._topology.cpus_per_actor) if wanted > before else None
        if shortage is not None:
            return {"error": shortage}
        self._autoscaler = None
        self._scale(wanted)
        return {"actors": wanted, "before": before}

    def _scale(self, wanted: int, reason: str = "") -> None:
        before = len(self.worker_pool.workers)
        self.worker_pool.scale(wanted)
        self._observer.event("scale", f"scaled from {before} to {wanted} workers{reason and ': '}{reason}")

    def start_some(self, *, learner_ready: bool) -> None:
        """Start some of the workers that have not been started yet.

        Args:
            learner_ready: whether the learner has started. Until then, one CPU is left to the learner, because the
                learner's start takes longest, and the starts of workers would delay it on few cores.
        """
        if self.worker_pool.starting:
            cpus = cluster_cpus()
            limit = max(MIN_CONCURRENT_STARTS, cpus) if learner_ready else max(1, cpus - 1)
            # Ray limits the starts of workers that reserve a CPU. Any other start takes CPU time from running workers.
            self.worker_pool.start_some(MAX_WORKERS if self._topology.cpus_per_actor else limit)

    def autoscale(self, learner: Any) -> None:
        """With `--actors auto`, scale to the number of workers that the learner needs.

        Args:
            learner: the learner's newest report, or None.
        """
        reports = [worker.report for worker in self.worker_pool.workers]
        if self._autoscaler is None or None in reports or learner is None:
            return
        if not learner.updates or self.worker_pool.draining:
            return  # before its first update, the learner always waits for experience
        waits = {(report.worker, report.incarnation): report.seconds_waited for report in reports}
        change = self._autoscaler.update(learner.seconds_waited, waits)
        if change is not None:
            self._scale(*change)


def max_workers(topology: Topology) -> int:
    """Return the largest number of workers for `--actors auto`: one per CPU, or fewer if each reserves several CPUs."""
    return max(1, int(cluster_cpus() / max(topology.cpus_per_actor, 1.0)))
