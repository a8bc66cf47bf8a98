"""The processes of a run's replay, as the coordinator supervises them: one server, or a router and its shards."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from replay.remote import is_ready
from replay.server import Counters, ReplayStats
from replay.sharding.router import add_up
from replay.trajectory_server import QueueSpec, QueueStats
from replay.types import EpisodeResult
from services.supervision.processes import Process
from services.supervision.topology import Topology

FINAL_REPORT_SECONDS = 5.0


class ReplayGroup:
    """The replay's processes, their combined statistics, and the episodes that ended.

    Attributes:
        primary: the process that keeps the totals: the only server, or the router.
        shards: the shards of a sharded replay; empty otherwise.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        first_incarnation: int,
        counters: Callable[[], Counters],
        version: Callable[[], int],
    ) -> None:
        """Describe the processes.

        Args:
            topology: the run's topology.
            first_incarnation: number of each process's first incarnation.
            counters: returns the run's totals as the coordinator knows them.
            version: returns the newest version of the weights that the coordinator knows.
        """
        self._topology, self._counters, self._version = topology, counters, version
        self._carried = counters()
        self._counted: tuple[tuple[int, int, int], ...] = ()
        self._highest_priority = 1.0
        self._last_stats: Any = None
        self._pending_episodes: Any = None
        self._finished = False
        common: dict[str, Any] = {"first_incarnation": first_incarnation, "report_method": "stats"}
        sharded = topology.replay_shards > 1
        self.primary = Process("router" if sharded else "replay", 0, self._start_primary, **common)
        self.shards = [self._shard(shard, common) for shard in range(topology.replay_shards if sharded else 0)]

    def _start_primary(self, incarnation: int) -> Any:
        if self.shards:
            return self._topology.start_router(incarnation, self._carried, self._highest_priority, self._counted)
        return self._topology.start_replay(incarnation, self._carried, self._highest_priority, self._version())

    def _shard(self, shard: int, common: dict[str, Any]) -> Process:
        def start(incarnation: int) -> Any:
            return self._topology.start_shard(shard, incarnation, with_others=not self.shards[shard].restarts)

        return Process("replay", shard, start, numbered=True, **common)

    @property
    def processes(self) -> list[Process]:
        """All processes, in the order of their start."""
        return [self.primary, *self.shards]

    def handle_exit(self, process: Process, *, finished: bool) -> None:
        """Prepare the next incarnation of a process that has exited.

        Args:
            process: one of this group's processes.
            finished: whether workers know that the run has all its steps; the last report of the replay may be older.
        """
        if process is not self.primary:
            if self.primary.handle is not None:
                self.primary.handle.lost.remote(process.index, process.incarnation)
            return
        self._carried = self._counters()
        if finished:
            steps = max(self._carried.env_steps, self._topology.steps)
            self._carried = replace(self._carried, env_steps=steps)
        self._pending_episodes = None

    def release(self, worker: Process) -> None:
        """Release the reservations of a worker that has exited; otherwise the replay would wait for the worker.

        On-policy, these are the worker's permits; in a sharded replay, the steps of the worker's next push.
        """
        if (self.shards or isinstance(self._topology.replay, QueueSpec)) and self.primary.handle is not None:
            self.primary.handle.revoke.remote(worker.index, worker.incarnation)

    def release_from(self, first: int, incarnation: int) -> None:
        """Release the reservations of all senders whose common process has exited.

        Args:
            first: index of the first of these senders; all higher indices are released too.
            incarnation: the last incarnation of the senders to release.
        """
        if self.shards and self.primary.handle is not None:
            self.primary.handle.revoke_from.remote(first, incarnation)

    def finish(self) -> None:
        """Make the replay accept no more experience, and reply to senders that the run is finished; effective once."""
        if not self._finished and self.primary.handle is not None:
            self._finished = True
            self.primary.handle.finish.remote()

    def request_episodes(self) -> None:
        """Request the episodes that ended, unless a request is pending."""
        if self._pending_episodes is None and self.primary.handle is not None:
            self._pending_episodes = self.primary.handle.drain_episodes.remote()

    def stats(self) -> ReplayStats | QueueStats | None:
        """Return the combined statistics of all processes, or None if they have not changed since the last call."""
        stats = self.primary.report
        if stats is None or stats is self._last_stats:
            return None
        self._last_stats = stats
        if self.shards:
            stats = add_up(stats, [shard.report for shard in self.shards if shard.report is not None])
        if isinstance(stats, ReplayStats):
            self._counted = stats.counted
            self._highest_priority = max(self._highest_priority, stats.highest_priority)
        combined: ReplayStats | QueueStats = stats
        return combined

    def episodes(self) -> tuple[EpisodeResult, ...]:
        """Return the episodes that arrived since the last call."""
        if self._pending_episodes is None or not is_ready(self._pending_episodes):
            return ()
        pending, self._pending_episodes = self._pending_episodes, None
        try:
            ended: tuple[EpisodeResult, ...] = ray.get(pending)
        except RayError:
            return ()
        return ended

    def final_report(self, collect: Callable[[], None]) -> None:
        """Wait for the final totals and episodes, at most `FINAL_REPORT_SECONDS` for each kind of process.

        Args:
            collect: reads the reports and episodes that have arrived.
        """
        # A shard sends the router its last report before it answers here, so the router's report is requested last.
        # Each report is requested afresh, because a pending one may be older than the last push.
        for processes in (self.shards, [self.primary]):
            end = time.monotonic() + FINAL_REPORT_SECONDS
            before = [process.report for process in processes]
            for process in processes:
                process.request_report(fresh=True)
            pairs = list(zip(processes, before, strict=True))
            while any(p.report is b and p.handle is not None for p, b in pairs) and time.monotonic() < end:
                time.sleep(0.01)
                for process in processes:
                    process.poll()
        self.request_episodes()
        collect()
        while self._pending_episodes is not None and self.primary.handle is not None and time.monotonic() < end:
            time.sleep(0.01)
            collect()
