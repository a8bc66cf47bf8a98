"""Coordinator: starts a run's processes, watches, recreates and stops them, and tells how it goes.

It lives in the `squall train` process and does nothing that blocks: every question to another process is asked
in one tick and its answer looked for in later ones.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from learner.checkpoints import LAST
from replay.errors import DeadlineExceeded
from replay.remote import is_ready
from services.config import RunConfig
from services.errors import CrashLoop, RunFailed
from services.store.records import Command
from services.supervision.endpoint_process import EndpointProcess
from services.supervision.evaluation import EvaluationScheduler
from services.supervision.metrics import RunMetrics
from services.supervision.placement import no_room
from services.supervision.processes import START_SECONDS, Process, ProcessExit, describe_exit
from services.supervision.progress import Progress, RunObserver
from services.supervision.replay import ReplayGroup
from services.supervision.statistics import RunStatistics
from services.supervision.topology import FIRST_SESSION_WORKER, Topology, last_session
from services.supervision.workers import WorkerManager

TICK_SECONDS = 0.1
REPORT_SECONDS = 0.5
SNAPSHOT_SECONDS = 1.0
METRICS_SECONDS = 5.0
STOP_SECONDS = 6.0
SEND_SECONDS = 3.0
CLOSE_SECONDS = 4.0
SCORING_SECONDS = 3600.0
INCARNATIONS_PER_RESUME = 1_000


class _Interrupted(Exception):
    """Somebody wants the run stopped while it is being scored."""


class Coordinator:
    """Supervises one run from start to end."""

    def __init__(
        self,
        topology: Topology,
        config: RunConfig,
        folder: Path,
        observer: RunObserver,
        progress: Progress | None = None,
    ) -> None:
        """Describe the processes; `run` starts them.

        Args:
            topology: the topology.
            config: the run's configuration.
            folder: the run's folder.
            observer: told how it goes, and asked whether to stop.
            progress: where a resumed run goes on from.
        """
        self.topology, self.config, self.observer = topology, config, observer
        self.checkpoints = folder / "checkpoints"
        self.resuming = progress is not None
        self.progress = progress or Progress(next_evaluation=config.eval_every)
        self.stopped_because: str | None = None
        self.statistics = RunStatistics(topology, self.progress)
        self._seconds_before = self.progress.seconds
        self._begun = time.monotonic()
        self._due: dict[str, float] = {}
        self._metrics_board = RunMetrics(topology.run)
        self._state = "starting"
        self._evaluator_started = False
        first = self.progress.resume_count * INCARNATIONS_PER_RESUME
        self.weights = Process("weights", 0, lambda _: topology.start_weight_store(), first_incarnation=first)
        self.replay = ReplayGroup(
            topology,
            first_incarnation=first,
            counters=lambda: self.progress.counters,
            version=lambda: self.progress.weights_version,
        )
        self.learner = Process(
            "learner", 0, lambda _: topology.start_learner(), run=self._fit, first_incarnation=first,
            is_at_work=lambda before, now: now.updates > before.updates,
        )  # fmt: skip
        self.evaluator = Process("evaluator", 0, lambda _: topology.start_evaluator(), first_incarnation=first)
        self.endpoint_process = EndpointProcess(
            topology.start_endpoint, served=topology.server_config is not None, first_incarnation=first
        )
        self.worker_manager = WorkerManager(topology, observer, first_incarnation=first)
        self.worker_pool = self.worker_manager.worker_pool
        self._checkpointing: list[tuple[Command, Any]] = []
        self.evaluation_scheduler = EvaluationScheduler(
            self.learner,
            self.evaluator,
            observer,
            self.progress,
            self.checkpoints,
            every=config.eval_every,
            episodes=config.eval_episodes,
            final_episodes=config.final_eval_episodes,
            goal=config.stop_at_return,
        )

    def _fit(self, handle: Any) -> Any:
        last = self.checkpoints / LAST
        again = self.resuming or self.learner.restarts > 0
        goes_on = again and last.exists()
        if again and not goes_on:
            self.observer.event("note", "the learner begins anew: there is no checkpoint yet")
        return handle.fit.remote(str(last) if goes_on else None, self.progress.weights_version)

    @property
    def processes(self) -> list[Process]:
        """All processes that shall be up, in the order they are started."""
        replay = self.replay.processes
        return [
            self.weights,
            *replay,
            self.learner,
            *self.worker_pool.workers,
            self.evaluator,
            *self.endpoint_process.processes,
        ]

    def run(self) -> dict[str, Any]:
        """Run until the steps or the goal are reached, somebody stops it, or it cannot go on; return the summary.

        Raises:
            RunFailed: a process died again and again, or did not start.
        """
        self._begun = time.monotonic()
        try:
            for process in self.processes:
                if process not in (*self.worker_pool.starting, self.evaluator):
                    process.start()
            self._watch_over()
            self._count_seconds()
            if self.stopped_because is not None:
                self._stop_in_order()
            elif self.learner.done:
                self._finish("steps")
            else:
                self._stop_in_order()
                if self.stopped_because is None:
                    self._finish("return")
            self._close_reception()
            self._metrics()
            self._state = "ended"
            self._snapshot()
            return self._summary()
        except (CrashLoop, DeadlineExceeded) as error:
            raise RunFailed(str(error)) from error
        finally:
            for command, reference in self._checkpointing:
                written = is_ready(reference)
                self.observer.answer(command, self._checkpointed(reference) if written else {"error": "the run ended"})
            for process in [*self.processes, *self.worker_pool.draining]:
                process.kill()

    # Watching.

    def _watch_over(self) -> None:
        """Tick until the learner is done, an evaluation reaches the goal, or somebody wants a stop."""
        end = time.monotonic() + START_SECONDS
        while not self.learner.done and self.stopped_because is None and not self.evaluation_scheduler.reached_goal:
            self._tick()
            if self.worker_pool.starting:
                end = time.monotonic() + START_SECONDS
            if self._state == "starting":
                self._look_whether_all_are_up(end)

    def _look_whether_all_are_up(self, end: float) -> None:
        """Begin to run once all that learning takes is up.

        Of the workers one is enough, if the cluster lacks room for more. The evaluator starts later.
        """
        pending = [process for process in self.worker_pool.workers if process.pending]
        if len(pending) == len(self.worker_pool.workers):
            pending = []
        silent = [p for p in self.processes if p.report is None and p not in (*pending, self.evaluator)]
        if not silent:
            self._state = "running"
            count = len(self.worker_pool.workers)
            some = f"{count - len(pending)} of {count} workers are up: {pending[0].pending}" if pending else ""
            self.observer.event("running", some or "all are at work")
            for endpoint in self.endpoint_process.told() or ():
                self.observer.event("serve", f"serves over gRPC on {endpoint['address']}")
        elif time.monotonic() > end:
            names = ", ".join(f"{p.name} ({p.pending})" if p.pending else p.name for p in silent)
            raise RunFailed(f"did not start within {START_SECONDS:.0f} s: {names}")

    def _tick(self) -> None:
        time.sleep(TICK_SECONDS)
        self._obey()
        self.worker_manager.start_some(learner_is_up=self.learner.report is not None)
        self._poll(self.processes)
        if self.learner.report is not None:
            self._start_evaluator()
        for process, word in self.worker_pool.reap():
            self.observer.event("scale", f"{process.name} {word}")
            self.replay.release(process)
        self._read_replay()
        self._every("report", REPORT_SECONDS, self._ask_for_reports)
        self._every("snapshot", SNAPSHOT_SECONDS, self._snapshot)
        self._every("metrics", METRICS_SECONDS, self._metrics)
        if self._state == "running":
            self.worker_manager.size(self.statistics.learner)
        self.evaluation_scheduler.tick()

    def _start_evaluator(self) -> None:
        """Start the evaluator unless it was: after the learner, whose start on few cores would take longer with it."""
        if not self._evaluator_started:
            self._evaluator_started = True
            self.evaluator.start()

    # Commands.

    def _obey(self) -> None:
        """Look at signals and commands; whatever is wanted is under way when this returns."""
        self.stopped_because = self.stopped_because or self.observer.stop_wanted()
        for command in self.observer.commands():
            if command.kind == "stop":
                self.stopped_because = self.stopped_because or "stopped"
                self.observer.answer(command, {"ok": True})
            elif self._state not in ("starting", "running"):
                self.observer.answer(command, {"error": f"the run is {self._state}"})
            elif command.kind == "scale":
                self.observer.answer(command, self.worker_manager.scale_as_told(command.arguments.get("actors")))
            elif command.kind == "checkpoint" and self.learner.handle is not None:
                self._checkpointing.append((command, self.learner.handle.checkpoint.remote(LAST)))
            else:
                self.observer.answer(command, {"error": f"cannot obey {command.kind!r} now"})
        for command, reference in [pair for pair in self._checkpointing if is_ready(pair[1])]:
            self._checkpointing.remove((command, reference))
            self.observer.answer(command, self._checkpointed(reference))

    def _checkpointed(self, reference: Any) -> dict[str, Any]:
        try:
            weights = ray.get(reference)
        except RayError as error:
            return {"error": f"no checkpoint: {describe_exit(error).line}"}
        path = str(self.checkpoints / LAST)
        self.observer.event("checkpoint", f"wrote {path}")
        return {"checkpoint": path, "weights_version": weights.version}

    # Watching, in parts.

    def _every(self, what: str, seconds: float, action: Callable[[], None]) -> None:
        now = time.monotonic()
        if now >= self._due.get(what, 0.0):
            self._due[what] = now + seconds
            action()

    def _poll(self, processes: list[Process]) -> None:
        for process in processes:
            death = process.poll()
            if death is not None:
                self._recreate(process, death)

    def _recreate(self, process: Process, death: ProcessExit) -> None:
        self.observer.event("death", f"{process.name} is gone: {death.line}\n{death.details}".strip())
        if process in self.replay.processes:
            heard = self.endpoint_process.heard_of_the_end or any(worker.done for worker in self.worker_pool.workers)
            self.replay.handle_exit(process, all_steps=heard)
        if process in self.endpoint_process.processes:
            self.endpoint_process.handle_exit(process)
            self.replay.release_from(FIRST_SESSION_WORKER, last_session(process.incarnation))
        if process in (self.learner, self.evaluator):
            self.evaluation_scheduler.give_up()
        if process in self.worker_pool.workers:
            self.replay.release(process)
        # The run goes on without an endpoint; one that never was up was asked for something that cannot be.
        pause = process.restart(dispensable=process in self.endpoint_process.processes and self._state != "starting")
        when = f" in {pause:.0f} s" if pause else ""
        self.observer.event("restart", f"{process.name} is recreated{when}, incarnation {process.incarnation}")
        if process in (self.weights, self.replay.front) and self.learner.handle is not None:
            self.learner.handle.publish_again.remote()

    def _ask_for_reports(self) -> None:
        self._count_seconds()
        for process in self.processes:
            process.ask_for_report()
        for process in self.worker_pool.workers:
            process.seek_room(lambda: no_room(self.topology.cpus_per_actor))
        self.learner.seek_room(lambda: no_room(self.topology.placement.learner_gpus, "GPU"))
        self.replay.ask_for_episodes()
        if self.learner.handle is not None and not self.learner.done:
            self.learner.handle.note_progress.remote(self.progress.counters.env_steps, self.progress.plain())
        self.endpoint_process.note_progress(self.progress.counters.env_steps)

    def _count_seconds(self) -> None:
        self.progress.seconds = self._seconds_before + time.monotonic() - self._begun

    def _read_replay(self) -> None:
        self.statistics.learner = self.learner.result or self.learner.report
        self.progress.weights_version = max(self.progress.weights_version, self.statistics.weights_version)
        self.statistics.take_versions(
            [w.report.weights_version for w in self.worker_pool.workers if w.report is not None]
        )
        stats = self.replay.stats()
        if stats is not None:
            self.statistics.take_stats(stats)
            self.progress.counters = stats.counters
        episodes = self.replay.episodes()
        self.progress.episodes += len(episodes)
        self.statistics.take_episodes(episodes)

    # The end.

    def _finish(self, why: str) -> None:
        """Take in the final totals and score the run; an interruption leaves it unscored."""
        self.stopped_because = why
        self._state = "scoring"
        self.replay.finish()
        self.endpoint_process.finish()
        self.replay.final_report(self._read_replay)
        end = time.monotonic() + SCORING_SECONDS
        try:
            self.evaluation_scheduler.finish(lambda: self._tick_while_scoring(end))
        except _Interrupted:
            self.observer.event("interrupted", "interrupted while being scored; `squall evaluate` plays the episodes")

    def _tick_while_scoring(self, end: float) -> None:
        time.sleep(TICK_SECONDS)
        for process in (self.evaluator, *self.endpoint_process.processes):
            self._poll([process])
            process.ask_for_report()
        self._every("snapshot", SNAPSHOT_SECONDS, self._snapshot)
        reason, self.stopped_because = self.stopped_because, None
        self._obey()
        if self.stopped_because is not None:
            raise _Interrupted
        self.stopped_because = reason
        if time.monotonic() > end:
            raise DeadlineExceeded(f"waited {SCORING_SECONDS:.0f} s for the final evaluation")

    def _stop_in_order(self) -> None:
        """Let workers and sessions send what they have and the learner write its checkpoint, within deadlines."""
        self._state = "stopping"
        self._snapshot()
        stopping = [
            p
            for p in [*self.worker_pool.workers, *self.worker_pool.draining, self.learner]
            if p.handle is not None and not p.done
        ]
        for process in stopping:
            process.handle.stop.remote()
        if self.stopped_because is not None:  # else it serves on while the run is scored
            self.endpoint_process.close()
        begun = time.monotonic()
        while (
            any(not process.done and process.handle is not None for process in stopping)
            and time.monotonic() < begun + STOP_SECONDS
        ) or (self.endpoint_process.is_closing and time.monotonic() < begun + SEND_SECONDS):
            time.sleep(0.02)
            for process in stopping:
                death = process.poll()
                if death is not None:
                    self.observer.event("death", f"{process.name} is gone: {death.line}")
            self._every("snapshot", SNAPSHOT_SECONDS, self._snapshot)
            self._obey()  # a second `squall stop` gets its answer too
        if self.stopped_because is not None:
            self._close_reception()
        self.replay.final_report(self._read_replay)

    def _close_reception(self) -> None:
        """Have the endpoint closed, within a deadline; no session waits for a learner that has left."""
        self.replay.finish()
        self.endpoint_process.close()
        end = time.monotonic() + CLOSE_SECONDS
        while self.endpoint_process.is_closing and time.monotonic() < end:
            time.sleep(0.02)
            self._every("snapshot", SNAPSHOT_SECONDS, self._snapshot)

    # What others see.

    def _waiting(self) -> dict[str, str]:
        waiting = {}
        for process in [self.learner, *self.worker_pool.workers, *self.endpoint_process.processes]:
            reason = getattr(process.report, "waiting_for", None)
            if reason and not process.done:
                waiting[process.name] = reason
        return waiting

    def _snapshot(self) -> None:
        own = {
            "name": "coordinator", "role": "coordinator", "index": 0, "node": socket.gethostname(), "pid": os.getpid(),
            "state": self._state, "incarnation": self.progress.resume_count, "restarts": 0, "steps_sent": None,
            "last_word": "", "last_death": None,
        }  # fmt: skip
        self.observer.snapshot(
            {
                "state": self._state,
                **self.statistics.snapshot(),
                "waiting": self._waiting(),
                "evaluations": self.evaluation_scheduler.history[-100:],
                "actors": len(self.worker_pool.workers),
                "endpoints": self.endpoint_process.told(),
                "processes": [
                    own,
                    *(process.describe(ended=self._state == "ended") for process in self.processes),
                    *({**process.describe(), "state": "leaving"} for process in self.worker_pool.draining),
                ],
            }
        )

    def _metrics(self) -> None:
        statistics = self.statistics.metrics()
        if statistics is not None:
            scores = (
                {"eval/mean_reward": self.evaluation_scheduler.history[-1]["mean"]}
                if self.evaluation_scheduler.history
                else {}
            )
            self._metrics_board.record({**statistics, **scores}, self.processes, len(self.worker_pool.workers))
            self.observer.metrics(self.progress.counters.env_steps, statistics)

    def _summary(self) -> dict[str, Any]:
        return {
            "algorithm": self.config.algorithm,
            "environment": self.config.environment,
            "seed": self.config.seed,
            "actors": len(self.worker_pool.workers),
            **self.statistics.summary(self.evaluation_scheduler.final),
            "stopped_because": self.stopped_because,
        }
