"""Evaluation of a run: periodic evaluations choose the best checkpoint, final evaluations score the best and the last.

A DQN's return fluctuates toward the end of training, so a run reports the scores of both checkpoints. The best weights
are scored on fresh episodes, because the maximum of many noisy means is biased upward.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from actors.evaluation import Evaluation
from actors.weights import pack
from learner.checkpoints import BEST, LAST, load_algorithm
from replay.remote import is_ready
from services.supervision.processes import Process
from services.supervision.progress import BEST_RETURN, Progress, RunObserver

CANDIDATE = "candidate.ckpt"


class EvaluationScheduler:
    """Schedules evaluations: the learner writes a candidate checkpoint, the evaluator plays, and the best is kept.

    `tick` never blocks.
    """

    def __init__(
        self,
        learner: Process,
        evaluator: Process,
        observer: RunObserver,
        progress: Progress,
        checkpoints: Path,
        *,
        every: int,
        episodes: int,
        final_episodes: int,
        goal: float | None = None,
    ) -> None:
        """Create a scheduler; `tick` starts evaluations.

        Args:
            learner: the process that writes checkpoints.
            evaluator: the process that plays episodes.
            observer: notified of every evaluation.
            progress: the run's progress, which keeps the best return.
            checkpoints: folder of the checkpoints.
            every: environment steps between periodic evaluations; 0 for none.
            episodes: number of episodes of a periodic evaluation.
            final_episodes: number of episodes of a final evaluation.
            goal: mean return of a periodic evaluation at which `reached_goal` becomes true; None for no goal.
        """
        self._learner, self._evaluator, self._observer = learner, evaluator, observer
        self._progress, self._checkpoints = progress, checkpoints
        self._every, self._episodes, self._final_episodes = every, episodes, final_episodes
        self._goal = goal
        self.reached_goal = False
        # Phase ("checkpoint" or "episodes"), reference to its result, and environment steps at its start.
        self._pending: tuple[str, Any, int] | None = None
        self.history: list[dict[str, float]] = []
        self.final: tuple[Evaluation, Evaluation] | None = None

    @property
    def playing(self) -> bool:
        """Whether the evaluator is playing the episodes of a periodic evaluation."""
        return self._pending is not None and self._pending[0] == "episodes"

    def cancel(self) -> None:
        """Drop the pending evaluation, because a process that it needs has exited."""
        self._pending = None

    def tick(self) -> None:
        """Start an evaluation when it is due, or advance the pending one if its result has arrived."""
        if self._pending is not None:
            self._advance()
            return
        steps = self._progress.counters.env_steps
        due = self._every and steps >= self._progress.next_evaluation
        if due and self._learner.report is not None and not self._learner.done and self._evaluator.handle is not None:
            self._progress.next_evaluation = steps - steps % self._every + self._every
            self._progress.evaluations += 1
            self._pending = ("checkpoint", self._learner.handle.checkpoint.remote(CANDIDATE), steps)

    def _advance(self) -> None:
        assert self._pending is not None
        phase, reference, steps = self._pending
        if not is_ready(reference):
            return
        self._pending = None
        try:
            answer = ray.get(reference)
        except RayError as error:
            # The coordinator, which polls the process, reports its exit.
            if self._learner.handle is not None and not self._learner.done:
                self._observer.event("evaluation", f"no evaluation at {steps:,} steps: {type(error).__name__}")
            return
        if phase == "checkpoint":
            evaluate = self._evaluator.handle.evaluate
            episodes = evaluate.remote(answer, self._episodes, "evaluation", self._progress.evaluations)
            self._pending = ("episodes", episodes, steps)
        else:
            self._record(answer, steps)

    def _record(self, evaluation: Evaluation, steps: int) -> None:
        self.history.append({"env_steps": steps, "mean": evaluation.mean, "std": evaluation.std})
        text = f"mean return {evaluation.mean:.1f} +- {evaluation.std:.1f} at {steps:,} steps"
        best = self._progress.best_return
        # A tie goes to the later weights, which were trained longer.
        if not math.isfinite(evaluation.mean):
            text += ": the returns are not finite"
        elif best is None or evaluation.mean >= best:
            self._progress.best_return = evaluation.mean
            (self._checkpoints / BEST_RETURN).write_text(
                json.dumps({"return_mean": evaluation.mean, "env_steps": steps})
            )
            os.replace(self._checkpoints / CANDIDATE, self._checkpoints / BEST)
            text += ", the best so far"
        self._observer.event("evaluation", text)
        if self._goal is not None and evaluation.mean >= self._goal and not self.reached_goal:
            self.reached_goal = True
            self._observer.event("goal", f"a mean return of {self._goal:g} is reached: the run stops learning")
        length = sum(episode.length for episode in evaluation.episodes) / len(evaluation.episodes)
        self._observer.metrics(steps, {"eval/mean_reward": evaluation.mean, "eval/mean_ep_length": length})

    def finish(self, while_waiting: Callable[[], None]) -> None:
        """Complete a pending periodic evaluation, then score the best and the last checkpoint; set `final` to both.

        Args:
            while_waiting: called repeatedly; may raise to cancel the evaluation.
        """
        while self.playing:
            while_waiting()
            if self.playing:
                self._advance()
        best, last_path = self._checkpoints / BEST, self._checkpoints / LAST
        # There is no last checkpoint if the learner died while it was being stopped.
        last = self._score(last_path if last_path.exists() else best, "final-last", while_waiting)
        self.final = (self._score(best, "final-best", while_waiting) if best.exists() else last, last)
        (self._checkpoints / CANDIDATE).unlink(missing_ok=True)

    def _score(self, checkpoint: Path, role: str, while_waiting: Callable[[], None]) -> Evaluation:
        weights = pack(load_algorithm(checkpoint).policy, 0)
        for handle in self._evaluators(while_waiting):
            reference = handle.evaluate.remote(weights, self._final_episodes, role, 0)
            while not is_ready(reference):
                while_waiting()
            try:
                evaluation: Evaluation = ray.get(reference)
                return evaluation
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except RayError:
                continue
        raise AssertionError("unreachable: _evaluators yields until the coordinator raises")

    def _evaluators(self, while_waiting: Callable[[], None]) -> Iterator[Any]:
        """Yield the evaluator's handle, and after each exit of the evaluator its successor's handle."""
        previous = None
        while True:
            while self._evaluator.handle is None or self._evaluator.handle is previous:
                while_waiting()
            previous = self._evaluator.handle
            yield previous
