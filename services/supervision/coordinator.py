"""The coordinator of a run: starts, recreates, and stops the run's processes, and reports the run's state.

The coordinator lives in the `squall train` process and never blocks on another process: it sends a request in one tick
and reads the result in a later one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from learner.checkpoints import LAST
from replay.errors import DeadlineExceeded
from services.config import RunConfig
from services.errors import CrashLoop, RunFailed
from services.supervision.commands import CommandHandler
from services.supervision.endpoint_process import EndpointProcess
from services.supervision.evaluation import EvaluationScheduler
from services.supervision.metrics import RunMetrics
from services.supervision.placement import resource_shortage
from services.supervision.processes import START_SECONDS, Process, ProcessExit, describe_this_process, waiting_reasons
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
    """A signal or command asked the run to stop during its final evaluation."""


class Coordinator:
    """Supervisor of one run, from its start to its end."""

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
            topology: the run's topology.
            config: the run's configuration.
            folder: the run's folder.
            observer: receives reports, and returns commands and requests to stop.
            progress: progress that a resumed run continues from; None for a new run.
        """
        self.topology, self.config, self.observer = topology, config, observer
        self.checkpoints = folder / "checkpoints"
        self.resuming = progress is not None
        self.progress = progress or Progress(next_evaluation=config.eval_every)
        self.stopped_because: str | None = None
        self.statistics = RunStatistics(topology, self.progress)
        self._seconds_before = self.progress.seconds
        self._started_at = time.monotonic()
        self._due: dict[str, float] = {}
        self._run_metrics = RunMetrics(topology.run)
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
            made_progress=lambda first_report, report: report.updates > first_report.updates,
        )  # fmt: skip
        self.evaluator = Process("evaluator", 0, lambda _: topology.start_evaluator(), first_incarnation=first)
        self.endpoint_process = EndpointProcess(
            topology.start_endpoint, served=topology.server_config is not None, first_incarnation=first
        )
        self.worker_manager = WorkerManager(topology, observer, first_incarnation=first)
        self.worker_pool = self.worker_manager.worker_pool
        self.command_handler = CommandHandler(observer, self.learner, self.worker_manager, self.checkpoints)
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
        resuming = self.resuming or self.learner.restarts > 0
        if resuming and not last.exists():
            self.observer.event("note", "the learner starts from scratch: there is no checkpoint yet")
        checkpoint = str(last) if resuming and last.exists() else None
        return handle.fit.remote(checkpoint, self.progress.weights_version)

    @property
    def processes(self) -> list[Process]:
        """All processes that the run should have, in the order of their start."""
        return [
            self.weights,
            *self.replay.processes,
            self.learner,
            *self.worker_pool.workers,
            self.evaluator,
            *self.endpoint_process.processes,
        ]

    def run(self) -> dict[str, Any]:
        """Run until the steps or the goal are reached, a user stops the run, or it fails; return the summary.

        Raises:
            RunFailed: a process died repeatedly, or did not start.
        """
        self._started_at = time.monotonic()
        try:
            for process in self.processes:
                if process not in (*self.worker_pool.starting, self.evaluator):
                    process.start()
            self._supervise()
            self._update_seconds()
            if self.stopped_because is not None:
                self._stop_gracefully()
            elif self.learner.done:
                self._finish("steps")
            else:
                self._stop_gracefully()
                if self.stopped_because is None:
                    self._finish("return")
            self._close_endpoint()
            self._report_metrics()
            self._state = "ended"
            self._report_snapshot()
            return self._summary()
        except (CrashLoop, DeadlineExceeded) as error:
            raise RunFailed(str(error)) from error
        finally:
            self.command_handler.close()
            for process in [*self.processes, *self.worker_pool.draining]:
                process.kill()

    # Supervision.

    def _supervise(self) -> None:
        """Tick until the learner is done, an evaluation reaches the goal, or the run is asked to stop."""
        end = time.monotonic() + START_SECONDS
        while not self.learner.done and self.stopped_because is None and not self.evaluation_scheduler.reached_goal:
            self._tick()
            if self.worker_pool.starting:
                end = time.monotonic() + START_SECONDS
            if self._state == "starting":
                self._check_started(end)

    def _check_started(self, end: float) -> None:
        """Set the state to running once all processes that learning needs have started.

        One worker is enough if the cluster lacks resources for the others. The evaluator starts later.
        """
        pending = [process for process in self.worker_pool.workers if process.pending]
        if len(pending) == len(self.worker_pool.workers):
            pending = []
        missing = [p for p in self.processes if p.report is None and p not in (*pending, self.evaluator)]
        if not missing:
            self._state = "running"
            count = len(self.worker_pool.workers)
            partial = f"{count - len(pending)} of {count} workers are running: {pending[0].pending}" if pending else ""
            self.observer.event("running", partial or "all processes are running")
            for endpoint in self.endpoint_process.describe() or ():
                self.observer.event("serve", f"serving over gRPC on {endpoint['address']}")
        elif time.monotonic() > end:
            names = ", ".join(f"{p.name} ({p.pending})" if p.pending else p.name for p in missing)
            raise RunFailed(f"did not start within {START_SECONDS:.0f} s: {names}")

    def _tick(self) -> None:
        time.sleep(TICK_SECONDS)
        self._handle_commands()
        self.worker_manager.start_some(learner_ready=self.learner.report is not None)
        self._poll(self.processes)
        if self.learner.report is not None:
            self._start_evaluator()
        for process, message in self.worker_pool.reap():
            self.observer.event("scale", f"{process.name} {message}")
            self.replay.release(process)
        self._read_reports()
        self._every(REPORT_SECONDS, "report", self._request_reports)
        self._every(SNAPSHOT_SECONDS, "snapshot", self._report_snapshot)
        self._every(METRICS_SECONDS, "metrics", self._report_metrics)
        if self._state == "running":
            self.worker_manager.autoscale(self.statistics.learner)
        self.evaluation_scheduler.tick()

    def _start_evaluator(self) -> None:
        """Start the evaluator, once.

        The evaluator starts after the learner, because on few cores its start would delay the learner's.
        """
        if not self._evaluator_started:
            self._evaluator_started = True
            self.evaluator.start()

    def _handle_commands(self) -> None:
        """Check for signals and commands, and set `stopped_because` if one of them stops the run."""
        self.stopped_because = self.stopped_because or self.observer.stop_wanted()
        if self.command_handler.handle(self._state):
            self.stopped_because = self.stopped_because or "stopped"

    def _every(self, seconds: float, name: str, action: Callable[[], None]) -> None:
        """Call `action` unless the last call under this name is less than `seconds` ago."""
        now = time.monotonic()
        if now >= self._due.get(name, 0.0):
            self._due[name] = now + seconds
            action()

    def _poll(self, processes: list[Process]) -> None:
        for process in processes:
            reason = process.poll()
            if reason is not None:
                self._recreate(process, reason)

    def _recreate(self, process: Process, reason: ProcessExit) -> None:
        self.observer.event("death", f"{process.name} has exited: {reason.line}\n{reason.details}".strip())
        if process in self.replay.processes:
            finished = self.endpoint_process.saw_finish or any(worker.done for worker in self.worker_pool.workers)
            self.replay.handle_exit(process, finished=finished)
        if process in self.endpoint_process.processes:
            self.endpoint_process.handle_exit(process)
            self.replay.release_from(FIRST_SESSION_WORKER, last_session(process.incarnation))
        if process in (self.learner, self.evaluator):
            self.evaluation_scheduler.cancel()
        if process in self.worker_pool.workers:
            self.replay.release(process)
        # A running run continues without its endpoint. An endpoint that has never started may be misconfigured.
        pause = process.restart(optional=process in self.endpoint_process.processes and self._state != "starting")
        when = f" in {pause:.0f} s" if pause else ""
        self.observer.event("restart", f"{process.name} is recreated{when}, incarnation {process.incarnation}")
        if process in (self.weights, self.replay.primary) and self.learner.handle is not None:
            self.learner.handle.publish_again.remote()

    def _request_reports(self) -> None:
        self._update_seconds()
        for process in self.processes:
            process.request_report()
        for process in self.worker_pool.workers:
            process.check_resources(lambda: resource_shortage(self.topology.cpus_per_actor))
        self.learner.check_resources(lambda: resource_shortage(self.topology.placement.learner_gpus, "GPU"))
        self.replay.request_episodes()
        if self.learner.handle is not None and not self.learner.done:
            self.learner.handle.note_progress.remote(self.progress.counters.env_steps, self.progress.plain())
        self.endpoint_process.note_progress(self.progress.counters.env_steps)

    def _update_seconds(self) -> None:
        self.progress.seconds = self._seconds_before + time.monotonic() - self._started_at

    def _read_reports(self) -> None:
        """Update statistics and progress from the reports that have arrived."""
        self.statistics.learner = self.learner.result or self.learner.report
        self.progress.weights_version = max(self.progress.weights_version, self.statistics.weights_version)
        reports = [worker.report for worker in self.worker_pool.workers if worker.report is not None]
        self.statistics.update_policy_lag([report.weights_version for report in reports])
        stats = self.replay.stats()
        if stats is not None:
            self.statistics.update_replay(stats)
            self.progress.counters = stats.counters
        episodes = self.replay.episodes()
        self.progress.episodes += len(episodes)
        self.statistics.add_episodes(episodes)

    # The end of the run.

    def _finish(self, reason: str) -> None:
        """Collect the final totals and score the run. If the run is interrupted meanwhile, it remains unscored."""
        self.stopped_because = reason
        self._state = "scoring"
        self.replay.finish()
        self.endpoint_process.finish()
        self.replay.final_report(self._read_reports)
        end = time.monotonic() + SCORING_SECONDS
        try:
            self.evaluation_scheduler.finish(lambda: self._tick_while_scoring(end))
        except _Interrupted:
            self.observer.event(
                "interrupted", "interrupted during the final evaluation; `squall evaluate` plays its episodes"
            )

    def _tick_while_scoring(self, end: float) -> None:
        time.sleep(TICK_SECONDS)
        for process in (self.evaluator, *self.endpoint_process.processes):
            self._poll([process])
            process.request_report()
        self._every(SNAPSHOT_SECONDS, "snapshot", self._report_snapshot)
        reason, self.stopped_because = self.stopped_because, None
        self._handle_commands()
        if self.stopped_because is not None:
            raise _Interrupted
        self.stopped_because = reason
        if time.monotonic() > end:
            raise DeadlineExceeded(f"waited {SCORING_SECONDS:.0f} s for the final evaluation")

    def _stop_gracefully(self) -> None:
        """Let workers and sessions send their experience and the learner write its checkpoint, within deadlines."""
        self._state = "stopping"
        self._report_snapshot()
        running = [*self.worker_pool.workers, *self.worker_pool.draining, self.learner]
        stopping = [process for process in running if process.handle is not None and not process.done]
        for process in stopping:
            process.handle.stop.remote()
        if self.stopped_because is not None:  # otherwise the endpoint serves the policy until the run is scored
            self.endpoint_process.close()
        start = time.monotonic()
        while (
            any(not process.done and process.handle is not None for process in stopping)
            and time.monotonic() < start + STOP_SECONDS
        ) or (self.endpoint_process.is_closing and time.monotonic() < start + SEND_SECONDS):
            time.sleep(0.02)
            for process in stopping:
                reason = process.poll()
                if reason is not None:
                    self.observer.event("death", f"{process.name} has exited: {reason.line}")
            self._every(SNAPSHOT_SECONDS, "snapshot", self._report_snapshot)
            self._handle_commands()  # answers a second `squall stop` too
        if self.stopped_because is not None:
            self._close_endpoint()
        self.replay.final_report(self._read_reports)

    def _close_endpoint(self) -> None:
        """Close the endpoint, within a deadline.

        The replay is finished first, so that no session waits for a learner that has exited.
        """
        self.replay.finish()
        self.endpoint_process.close()
        end = time.monotonic() + CLOSE_SECONDS
        while self.endpoint_process.is_closing and time.monotonic() < end:
            time.sleep(0.02)
            self._every(SNAPSHOT_SECONDS, "snapshot", self._report_snapshot)

    # Reports.

    def _report_snapshot(self) -> None:
        may_wait = [self.learner, *self.worker_pool.workers, *self.endpoint_process.processes]
        self.observer.snapshot(
            {
                "state": self._state,
                **self.statistics.snapshot(),
                "waiting": waiting_reasons(may_wait),
                "evaluations": self.evaluation_scheduler.history[-100:],
                "actors": len(self.worker_pool.workers),
                "endpoints": self.endpoint_process.describe(),
                "processes": [
                    describe_this_process("coordinator", self._state, self.progress.resume_count),
                    *(process.describe(ended=self._state == "ended") for process in self.processes),
                    *({**process.describe(), "state": "leaving"} for process in self.worker_pool.draining),
                ],
            }
        )

    def _report_metrics(self) -> None:
        statistics = self.statistics.metrics()
        if statistics is not None:
            history = self.evaluation_scheduler.history
            score = {"eval/mean_reward": history[-1]["mean"]} if history else {}
            self._run_metrics.record({**statistics, **score}, self.processes, len(self.worker_pool.workers))
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
