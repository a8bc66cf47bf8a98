"""Coordinator: starts a run's processes, watches, recreates and stops them, and tells the store how it goes.

It lives in the `squall train` process and does nothing that blocks: every question to another process is asked
in one tick and its answer looked for in later ones.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError

from actors.evaluation import Evaluation
from actors.weights import Weights, pack
from learner.training import BEST, LAST, LearnerReport, load_algorithm, read_checkpoint
from replay.remote import is_ready
from replay.server import Counters, ReplayStats
from replay.types import DeadlineExceeded, SquallError
from services.config import RunConfig
from services.processes import CrashLoop, Death, Process
from services.program import Program

TICK_SECONDS = 0.1
REPORT_SECONDS = 0.5
SNAPSHOT_SECONDS = 1.0
METRICS_SECONDS = 5.0
START_SECONDS = 180.0
STOP_SECONDS = 6.0
DRAIN_SECONDS = 600.0
EVALUATION_SECONDS = 3600.0
RATE_WINDOW_SECONDS = 10.0
LAST_REPORT_SECONDS = 5.0
RETURNS_KEPT = 100
INCARNATIONS_A_GENERATION = 1_000
CANDIDATE = "candidate.ckpt"


class RunFailed(SquallError):
    """A run that could not go on; the text says why."""


@dataclass
class Progress:
    """How far a run is; what of it must survive a resume is part of every checkpoint, as plain values.

    Attributes:
        counters: steps, samples and inserts.
        episodes: episodes finished.
        best_return: mean return of the best evaluation, or None.
        best_updates: updates behind it.
        next_evaluation: step count of the next evaluation.
        evaluations: evaluations begun.
        wall_seconds: time spent before this process.
        generation: how often the run was resumed.
    """

    counters: Counters = field(default_factory=Counters)
    episodes: int = 0
    best_return: float | None = None
    best_updates: int = 0
    next_evaluation: int = 0
    evaluations: int = 0
    wall_seconds: float = 0.0
    generation: int = 0

    def plain(self) -> dict[str, Any]:
        """Return this as plain values."""
        return asdict(self)

    @classmethod
    def resumed(cls, checkpoint: Path) -> Progress:
        """Return the progress in a checkpoint, one generation later; fresh if there is no checkpoint yet."""
        if not checkpoint.exists():
            return cls(generation=1)
        saved = read_checkpoint(checkpoint)["squall"]["run"]
        saved = {**saved, "counters": Counters(**saved.get("counters", {}))}
        progress = cls(**saved)
        return replace(progress, generation=progress.generation + 1)


class Watcher:
    """Where a coordinator tells how it goes; every method may be called often and must not block."""

    def snapshot(self, snapshot: dict[str, Any]) -> None:
        """Take the state of the run, once a second."""

    def event(self, kind: str, text: str) -> None:
        """Take word of something that happened."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Take figures, by tag, at an environment step."""

    def stop_wanted(self) -> str | None:
        """Return why somebody wants the run stopped, or None."""
        return None


class Coordinator:
    """Supervises one run from start to end."""

    def __init__(
        self, program: Program, config: RunConfig, folder: Path, watcher: Watcher, progress: Progress | None = None
    ) -> None:
        """Describe the processes; `run` starts them.

        Args:
            program: the topology.
            config: the run's configuration.
            folder: the run's folder.
            watcher: told how it goes.
            progress: where a resumed run goes on from.
        """
        self.program, self.config, self.folder, self.watcher = program, config, folder, watcher
        self.resuming = progress is not None
        self.progress = progress or Progress(next_evaluation=config.eval_every)
        self._carried = self.progress.counters
        self._highest_priority = 1.0
        self._returns: deque[float] = deque(maxlen=RETURNS_KEPT)
        self._lengths: deque[int] = deque(maxlen=RETURNS_KEPT)
        self._rates: deque[tuple[float, int, int]] = deque()
        self._begun = time.monotonic()
        self._due: dict[str, float] = {}
        self._evaluating: tuple[str, Any, int] | None = None
        self._draining: Any = None
        self._stats: ReplayStats | None = None
        self._state = "starting"
        self.stopped_because: str | None = None
        self.evaluations: list[dict[str, float]] = []
        first = self.progress.generation * INCARNATIONS_A_GENERATION
        self.weights = Process("weights", 0, lambda _: program.start_weight_store(), first_incarnation=first)
        self.replay = Process("replay", 0, self._start_replay, first_incarnation=first)
        self.replay.report_method = "stats"
        self.learner = Process("learner", 0, lambda _: program.start_learner(), run=self._fit, first_incarnation=first)
        self.evaluator = Process("evaluator", 0, lambda _: program.start_evaluator(), first_incarnation=first)
        self.workers = [
            Process(
                "worker",
                index,
                lambda incarnation, index=index: program.start_worker(index, incarnation),  # type: ignore[misc]
                run=lambda handle: handle.run.remote(),
                first_incarnation=first,
            )
            for index in range(program.actors)
        ]

    # How each process starts.

    def _start_replay(self, incarnation: int) -> Any:
        return self.program.start_replay(incarnation, self._carried, self._highest_priority)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    def _fit(self, handle: Any) -> Any:
        last = self.checkpoints / LAST
        goes_on = last.exists() and (self.resuming or self.learner.restarts > 0)
        return handle.fit.remote(str(last) if goes_on else None)

    @property
    def processes(self) -> list[Process]:
        """All processes, in the order they are started."""
        return [self.weights, self.replay, self.learner, *self.workers, self.evaluator]

    # The run.

    def run(self) -> dict[str, Any]:
        """Run until the steps are done, somebody stops it, or it cannot go on; return the summary.

        Raises:
            RunFailed: a process died again and again, or did not start.
        """
        self._begun = time.monotonic()
        try:
            for process in self.processes:
                process.start()
            self._snapshot()
            self._watch_over()
            if self.stopped_because is None:
                self._finish()
            else:
                self._stop_in_order()
            return self._summary()
        except CrashLoop as error:
            raise RunFailed(str(error)) from error
        finally:
            for process in self.processes:
                process.kill()

    def _watch_over(self) -> None:
        """Tick until the learner is done or somebody wants a stop."""
        started_by = time.monotonic() + START_SECONDS
        while not self.learner.done:
            self._tick()
            if self.stopped_because is not None:
                return
            if self._state == "starting":
                silent = [process.name for process in self.processes if process.report is None]
                if not silent:
                    self._state = "running"
                    self.watcher.event("running", "all processes are up")
                elif time.monotonic() > started_by:
                    raise RunFailed(f"did not start within {START_SECONDS:.0f} s: {', '.join(silent)}")

    def _tick(self) -> None:
        time.sleep(TICK_SECONDS)
        self.stopped_because = self.stopped_because or self.watcher.stop_wanted()
        for process in self.processes:
            death = process.poll()
            if death is not None:
                self._recreate(process, death)
        self._read_replay()
        self._every("report", REPORT_SECONDS, self._ask_for_reports)
        self._every("snapshot", SNAPSHOT_SECONDS, self._snapshot)
        self._every("metrics", METRICS_SECONDS, self._metrics)
        self._evaluate_when_due()

    def _every(self, what: str, seconds: float, action: Callable[[], None]) -> None:
        now = time.monotonic()
        if now >= self._due.get(what, 0.0):
            self._due[what] = now + seconds
            action()

    def _ask_for_reports(self) -> None:
        for process in self.processes:
            process.ask_for_report()
        if self._draining is None and self.replay.handle is not None:
            self._draining = self.replay.handle.drain_episodes.remote()
        if self.learner.handle is not None and not self.learner.done:
            self.progress.wall_seconds += REPORT_SECONDS
            self.learner.handle.note_progress.remote(self.progress.counters.env_steps, self.progress.plain())

    def _read_replay(self) -> None:
        stats = self.replay.report
        if stats is not None and stats is not self._stats:
            self._stats = stats
            self.progress.counters = stats.counters
            self._highest_priority = max(self._highest_priority, stats.highest_priority)
            now = time.monotonic()
            self._rates.append((now, stats.counters.env_steps, self._updates))
            while now - self._rates[0][0] > RATE_WINDOW_SECONDS:
                self._rates.popleft()
        if self._draining is not None and is_ready(self._draining):
            try:
                episodes = ray.get(self._draining)
            except RayError:
                episodes = ()
            self._draining = None
            self.progress.episodes += len(episodes)
            self._returns.extend(episode.episode_return for episode in episodes)
            self._lengths.extend(episode.length for episode in episodes)

    def _read_replay_last(self) -> None:
        """Take in the final totals, which the last report may not have seen."""
        end = time.monotonic() + LAST_REPORT_SECONDS
        before = self.replay.report
        self.replay.ask_for_report()
        while self.replay.report is before and self.replay.handle is not None and time.monotonic() < end:
            time.sleep(0.01)
            self.replay.poll()
        self._ask_for_reports()
        while self._draining is not None and self.replay.handle is not None and time.monotonic() < end:
            time.sleep(0.01)
            self._read_replay()

    def _recreate(self, process: Process, death: Death) -> None:
        self.watcher.event("death", f"{process.name} is gone: {death.line}\n{death.details}".strip())
        if process is self.replay:
            self._carried = self.progress.counters
            self._draining = None
        if process in (self.learner, self.evaluator):
            self._evaluating = None
        process.restart()
        self.watcher.event("restart", f"{process.name} is recreated, incarnation {process.incarnation}")
        if process is self.weights and self.learner.handle is not None:
            self.learner.handle.publish_again.remote()

    @property
    def _updates(self) -> int:
        report: LearnerReport | None = self.learner.result or self.learner.report
        return 0 if report is None else report.updates

    # Evaluation.

    def _evaluate_when_due(self) -> None:
        """Begin an evaluation when its step has come, and take in the one that is under way."""
        if self._evaluating is not None:
            self._go_on_evaluating()
        elif (
            self.config.eval_every
            and self.progress.counters.env_steps >= self.progress.next_evaluation
            and self.learner.report is not None
            and not self.learner.done
            and self.evaluator.handle is not None
        ):
            steps = self.progress.counters.env_steps
            self.progress.next_evaluation = steps - steps % self.config.eval_every + self.config.eval_every
            self.progress.evaluations += 1
            self._evaluating = ("checkpoint", self.learner.handle.checkpoint.remote(CANDIDATE), steps)

    def _go_on_evaluating(self) -> None:
        assert self._evaluating is not None
        phase, reference, steps = self._evaluating
        if not is_ready(reference):
            return
        self._evaluating = None
        try:
            answer = ray.get(reference)
        except RayError as error:
            self.watcher.event("evaluation", f"the evaluation at {steps} steps failed: {type(error).__name__}")
            return
        if phase == "checkpoint":
            arguments = (answer, self.config.eval_episodes, "evaluation", self.progress.evaluations)
            self._evaluating = ("episodes", self.evaluator.handle.evaluate.remote(*arguments), steps)
        else:
            self._take_evaluation(answer, steps)

    def _take_evaluation(self, evaluation: Evaluation, steps: int) -> None:
        self.evaluations.append({"env_steps": steps, "mean": evaluation.mean, "std": evaluation.std})
        best = self.progress.best_return
        text = f"mean return {evaluation.mean:.1f} +- {evaluation.std:.1f} at {steps:,} steps"
        # At a tie the later weights, which have seen more.
        if best is None or evaluation.mean >= best:
            self.progress.best_return = evaluation.mean
            self.progress.best_updates = self._updates
            os.replace(self.checkpoints / CANDIDATE, self.checkpoints / BEST)
            text += ", the best so far"
        self.watcher.event("evaluation", text)
        self.watcher.metrics(
            steps, {"eval/mean_reward": evaluation.mean, "eval/mean_ep_length": _mean_length(evaluation)}
        )

    # The end.

    def _finish(self) -> None:
        """Wait for an evaluation under way, then score the best and the last weights on fresh episodes."""
        self.stopped_because = "steps"
        self._state = "evaluating"
        self._read_replay_last()
        end = time.monotonic() + EVALUATION_SECONDS
        while self._evaluating is not None and self._evaluating[0] == "episodes":
            self._tick_quietly(end, "the last periodic evaluation")
        last = self._score(self.checkpoints / LAST, "final-last", end)
        best = self.checkpoints / BEST
        self._final = (self._score(best, "final-best", end) if best.exists() else last, last)

    def _score(self, checkpoint: Path, role: str, end: float) -> Evaluation:
        weights = pack(load_algorithm(checkpoint).policy, 0)
        while True:
            reference = self.evaluator.handle.evaluate.remote(weights, self.config.final_eval_episodes, role, 0)
            while self.evaluator.handle is not None and not is_ready(reference):
                self._tick_quietly(end, f"the evaluation of {checkpoint.name}")
                if self.stopped_because == "interrupted":
                    raise RunFailed("interrupted during the final evaluation; `squall evaluate` repeats it")
            try:
                evaluation: Evaluation = ray.get(reference)
                return evaluation
            except RayError as error:
                if self.evaluator.poll() is None and self.evaluator.handle is not None:
                    raise RunFailed(f"the evaluation of {checkpoint.name} failed: {error}") from error

    _final: tuple[Evaluation, Evaluation] | None = None

    def _tick_quietly(self, end: float, what: str) -> None:
        """Tick while only the evaluator is at work."""
        time.sleep(TICK_SECONDS)
        self.evaluator.ask_for_report()
        death = self.evaluator.poll()
        if death is not None:
            self._recreate(self.evaluator, death)
        if self._evaluating is not None:
            self._go_on_evaluating()
        wanted = self.watcher.stop_wanted()
        if wanted is not None:
            self.stopped_because = "interrupted"
            self._evaluating = None
        self._every("snapshot", SNAPSHOT_SECONDS, self._snapshot)
        if time.monotonic() > end:
            raise DeadlineExceeded(f"waited {EVALUATION_SECONDS:.0f} s for {what}")

    def _stop_in_order(self) -> None:
        """Let workers send what they have and the learner write its checkpoint, within a deadline."""
        self._state = "stopping"
        self._snapshot()
        for process in [*self.workers, self.learner]:
            if process.handle is not None and not process.done:
                process.handle.stop.remote()
        end = time.monotonic() + STOP_SECONDS
        while time.monotonic() < end and not (self.learner.done and all(worker.done for worker in self.workers)):
            time.sleep(0.02)
            for process in [*self.workers, self.learner]:
                if process.handle is not None and process.poll() is not None:
                    process.done = True
            self._every("snapshot", SNAPSHOT_SECONDS, self._snapshot)

    # What others see.

    def pids(self) -> list[int]:
        """Return the pids of all processes that told theirs."""
        return [pid for process in self.processes if (pid := process.pid()) is not None]

    @property
    def elapsed(self) -> float:
        """Seconds since this process began to run."""
        return time.monotonic() - self._begun

    def rates(self) -> tuple[float, float]:
        """Return environment steps and updates a second, over the last seconds."""
        if len(self._rates) < 2:
            return 0.0, 0.0
        (begin, steps, updates), (end, steps_now, updates_now) = self._rates[0], self._rates[-1]
        seconds = max(end - begin, 1e-9)
        return (steps_now - steps) / seconds, max(updates_now - updates, 0) / seconds

    def waiting(self) -> dict[str, str]:
        """Return who waits for what."""
        waiting = {}
        for process in [self.learner, *self.workers]:
            reason = getattr(process.report, "waiting_for", None)
            if reason and not process.done:
                waiting[process.name] = reason
        return waiting

    def _snapshot(self) -> None:
        self.watcher.snapshot(self.snapshot())

    def snapshot(self) -> dict[str, Any]:
        """Return the state of the run as plain JSON values."""
        steps_rate, updates_rate = self.rates()
        counters, learner = self.progress.counters, self.learner.result or self.learner.report
        stats = None if self._stats is None else asdict(self._stats)
        return {
            "state": self._state,
            "env_steps": counters.env_steps,
            "steps": self.program.steps,
            "updates": self._updates,
            "samples_per_insert": counters.samples_per_insert,
            "samples_per_insert_wanted": self.program.replay.samples_per_insert,
            "episodes": self.progress.episodes,
            "train_return_mean": _mean(self._returns),
            "exploration_rate": self._exploration_rate(),
            "env_steps_per_second": steps_rate,
            "updates_per_second": updates_rate,
            "weights_version": -1 if learner is None else learner.weights_version,
            "replay": stats,
            "waiting": self.waiting(),
            "best_return": self.progress.best_return,
            "evaluations": self.evaluations[-100:],
            "seconds": self.progress.wall_seconds,
            "processes": [self._describe_self(), *(self._describe(process) for process in self.processes)],
        }

    def _exploration_rate(self) -> float | None:
        schedule = self.program.policy.exploration
        return schedule.at(self.progress.counters.env_steps)

    def _describe_self(self) -> dict[str, Any]:
        return {
            "role": "coordinator", "index": 0, "node": socket.gethostname(), "pid": os.getpid(), "state": self._state,
            "incarnation": self.progress.generation, "restarts": 0, "last_word": "", "last_death": None,
        }  # fmt: skip

    def _describe(self, process: Process) -> dict[str, Any]:
        report = process.report
        state = getattr(report, "state", None) or process.state
        return {
            "role": process.role,
            "index": process.index,
            "node": getattr(report, "node", socket.gethostname()),
            "pid": process.pid(),
            "state": "done" if process.done else state,
            "incarnation": process.incarnation,
            "restarts": process.restarts,
            "last_word": getattr(report, "last_word", ""),
            "last_death": None if process.last_death is None else process.last_death.line,
        }

    def _metrics(self) -> None:
        learner, stats = self.learner.report, self._stats
        if stats is None or learner is None:
            return
        steps_rate, updates_rate = self.rates()
        values: dict[str, float | None] = {
            "rollout/ep_rew_mean": _mean(self._returns),
            "rollout/ep_len_mean": _mean(self._lengths),
            "rollout/exploration_rate": self._exploration_rate(),
            "time/fps": steps_rate,
            "time/updates_per_second": updates_rate,
            "time/total_timesteps": float(stats.counters.env_steps),
            "train/n_updates": float(learner.updates),
            "train/weights_version": float(learner.weights_version),
            "replay/size": float(stats.size),
            "replay/bytes": float(stats.bytes),
            "replay/samples_per_insert": stats.counters.samples_per_insert,
            "replay/stale_updates": float(stats.stale_updates),
            **learner.metrics,
        }
        self.watcher.metrics(
            stats.counters.env_steps, {tag: value for tag, value in values.items() if value is not None}
        )

    def _summary(self) -> dict[str, Any]:
        """Return the run's summary; see DESIGN in the README for the fields."""
        self._state = "finished"
        self._snapshot()
        counters, learner = self.progress.counters, self.learner.result or self.learner.report
        seconds = self.progress.wall_seconds
        best, last = self._final or (None, None)
        return {
            "algorithm": self.config.algorithm,
            "environment": self.config.environment,
            "seed": self.config.seed,
            "actors": self.config.actors,
            "env_steps": counters.env_steps,
            "updates": self._updates,
            "samples_per_insert": round(counters.samples_per_insert, 4),
            "episodes": self.progress.episodes,
            "train_return_mean": _mean(self._returns),
            "eval_return_mean": best and best.mean,
            "eval_return_std": best and best.std,
            "eval_episodes": self.config.final_eval_episodes if best else 0,
            "final_return_mean": last and last.mean,
            "wall_seconds": round(seconds, 1),
            "env_steps_per_second": round(counters.env_steps / seconds, 1) if seconds else 0.0,
            "updates_per_second": round(self._updates / seconds, 1) if seconds else 0.0,
            "weights_version": -1 if learner is None else learner.weights_version,
            "replay_size": 0 if self._stats is None else self._stats.size,
            "replay_bytes": 0 if self._stats is None else self._stats.bytes,
            "stopped_because": self.stopped_because,
        }


def _mean(values: deque[float] | deque[int]) -> float | None:
    return sum(values) / len(values) if values else None


def _mean_length(evaluation: Evaluation) -> float:
    return sum(episode.length for episode in evaluation.episodes) / len(evaluation.episodes)


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a wish, and the second into an end at once."""

    def __init__(self, at_once: Callable[[], None]) -> None:
        """Say what to do at the second signal."""
        self._at_once = at_once
        self._before: dict[signal.Signals, Any] = {}
        self.wanted: str | None = None

    def __enter__(self) -> StopSignals:
        """Take the signals over."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _received(self, number: int, _: object) -> None:
        if self.wanted is not None:
            self._at_once()
        self.wanted = "interrupted" if number == signal.SIGINT else "terminated"


def end_at_once(pids: list[int]) -> None:
    """Kill processes of ours and leave, without another word."""
    for child in psutil.Process().children(recursive=True):
        pids.append(child.pid)
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            continue
    os._exit(130)


__all__ = ["Coordinator", "Progress", "RunFailed", "StopSignals", "Watcher", "Weights", "end_at_once"]
