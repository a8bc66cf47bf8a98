"""ReplayGroup: a run's replay as its coordinator sees it, be it one server or a desk and its shards."""

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

LAST_REPORT_SECONDS = 5.0


class ReplayGroup:
    """The processes, what they say taken together, and the episodes that ended.

    `front` keeps the totals: the one server, or the desk.
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
            topology: the topology.
            first_incarnation: number of each process's first incarnation.
            counters: returns the run's totals as they are known now.
            version: returns the newest version of the weights that anybody heard of.
        """
        self._topology, self._counters, self._version = topology, counters, version
        self._carried = counters()
        self._counted: tuple[tuple[int, int, int], ...] = ()
        self._highest_priority = 1.0
        self._read: Any = None
        self._draining: Any = None
        self._finished = False
        common: dict[str, Any] = {"first_incarnation": first_incarnation, "report_method": "stats"}
        sharded = topology.replay_shards > 1
        self.front = Process("router" if sharded else "replay", 0, self._start_front, **common)
        self.shards = [self._shard(shard, common) for shard in range(topology.replay_shards if sharded else 0)]

    def _start_front(self, incarnation: int) -> Any:
        if self.shards:
            return self._topology.start_router(incarnation, self._carried, self._highest_priority, self._counted)
        return self._topology.start_replay(incarnation, self._carried, self._highest_priority, self._version())

    def _shard(self, shard: int, common: dict[str, Any]) -> Process:
        def start(incarnation: int) -> Any:
            return self._topology.start_shard(shard, incarnation, with_others=not self.shards[shard].restarts)

        return Process("replay", shard, start, numbered=True, **common)

    @property
    def processes(self) -> list[Process]:
        """All of them, in the order they are started."""
        return [self.front, *self.shards]

    def handle_exit(self, process: Process, *, all_steps: bool) -> None:
        """Make ready for the next incarnation of a process that is gone.

        Args:
            process: one of these.
            all_steps: whether workers have heard that the run has its steps; the last report may be older than that.
        """
        if process is not self.front:
            if self.front.handle is not None:
                self.front.handle.lost.remote(process.index, process.incarnation)
            return
        self._carried = self._counters()
        if all_steps:
            steps = max(self._carried.env_steps, self._topology.steps)
            self._carried = replace(self._carried, env_steps=steps)
        self._draining = None

    def release(self, worker: Process) -> None:
        """Let others have what a worker that is gone was to send; without that it is waited for.

        On-policy these are its permits, of a replay in shards the steps that are set aside for it.
        """
        if (self.shards or isinstance(self._topology.replay, QueueSpec)) and self.front.handle is not None:
            self.front.handle.revoke.remote(worker.index, worker.incarnation)

    def release_from(self, first: int, incarnation: int) -> None:
        """Do so for all senders numbered `first` and up, to this incarnation of theirs; their one process is gone."""
        if self.shards and self.front.handle is not None:
            self.front.handle.revoke_from.remote(first, incarnation)

    def finish(self) -> None:
        """Accept no more experience, once: whoever waits to send some is told that the run is finished."""
        if not self._finished and self.front.handle is not None:
            self._finished = True
            self.front.handle.finish.remote()

    def ask_for_episodes(self) -> None:
        """Ask for the episodes that ended, unless they are on their way."""
        if self._draining is None and self.front.handle is not None:
            self._draining = self.front.handle.drain_episodes.remote()

    def stats(self) -> ReplayStats | QueueStats | None:
        """Return what they say together, if there is news."""
        stats = self.front.report
        if stats is None or stats is self._read:
            return None
        self._read = stats
        if self.shards:
            stats = add_up(stats, [shard.report for shard in self.shards if shard.report is not None])
        if isinstance(stats, ReplayStats):
            self._counted = stats.counted
            self._highest_priority = max(self._highest_priority, stats.highest_priority)
        told: ReplayStats | QueueStats = stats
        return told

    def episodes(self) -> tuple[EpisodeResult, ...]:
        """Return the episodes that came since the last call."""
        if self._draining is None or not is_ready(self._draining):
            return ()
        draining, self._draining = self._draining, None
        try:
            ended: tuple[EpisodeResult, ...] = ray.get(draining)
        except RayError:
            return ()
        return ended

    def final_report(self, take_in: Callable[[], None]) -> None:
        """Have the final totals and episodes taken in, which the last report may not have seen."""
        # A shard sends the desk its last word before it answers here, so the desk is asked after the shards. A report
        # that is on its way may be older than the last push.
        for processes in (self.shards, [self.front]):
            end = time.monotonic() + LAST_REPORT_SECONDS
            before = [process.report for process in processes]
            for process in processes:
                process.ask_for_report(anew=True)
            waited_for = list(zip(processes, before, strict=True))
            while any(p.report is b and p.handle is not None for p, b in waited_for) and time.monotonic() < end:
                time.sleep(0.01)
                for process in processes:
                    process.poll()
        self.ask_for_episodes()
        take_in()
        while self._draining is not None and self.front.handle is not None and time.monotonic() < end:
            time.sleep(0.01)
            take_in()
