"""EvaluationScheduler: periodic greedy evaluations choose the best checkpoint; fresh ones score the best and the last.

DQN's end points swing, so the score of the best weights is told beside that of the last. The best is evaluated
again on episodes that did not choose it: the highest of many noisy means is too high.
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
    """Asks the learner for a candidate checkpoint, the evaluator for its episodes, and keeps the best. Never waits."""

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
        """Begin nothing yet; `tick` does.

        Args:
            learner: writes checkpoints.
            evaluator: plays episodes.
            observer: told of every evaluation.
            progress: the run's; remembers the best.
            checkpoints: folder of the checkpoints.
            every: environment steps between periodic evaluations; 0 for none.
            episodes: of a periodic evaluation.
            final_episodes: of a final one.
            goal: mean return of a periodic evaluation at which `reached_goal` becomes true.
        """
        self._learner, self._evaluator, self._observer = learner, evaluator, observer
        self._progress, self._checkpoints = progress, checkpoints
        self._every, self._episodes, self._final_episodes = every, episodes, final_episodes
        self._goal = goal
        self.reached_goal = False
        self._asked: tuple[str, Any, int] | None = None
        self.history: list[dict[str, float]] = []
        self.final: tuple[Evaluation, Evaluation] | None = None

    @property
    def playing(self) -> bool:
        """Whether the evaluator is at work on a periodic evaluation."""
        return self._asked is not None and self._asked[0] == "episodes"

    def give_up(self) -> None:
        """Forget the evaluation under way, because a process it needs is gone."""
        self._asked = None

    def tick(self) -> None:
        """Begin an evaluation when its step has come, or take in what came of the one under way."""
        if self._asked is not None:
            self._go_on()
            return
        steps = self._progress.counters.env_steps
        due = self._every and steps >= self._progress.next_evaluation
        if due and self._learner.report is not None and not self._learner.done and self._evaluator.handle is not None:
            self._progress.next_evaluation = steps - steps % self._every + self._every
            self._progress.evaluations += 1
            self._asked = ("checkpoint", self._learner.handle.checkpoint.remote(CANDIDATE), steps)

    def _go_on(self) -> None:
        assert self._asked is not None
        phase, reference, steps = self._asked
        if not is_ready(reference):
            return
        self._asked = None
        try:
            answer = ray.get(reference)
        except RayError as error:
            # A death is seen, and told, by whoever polls the process.
            if self._learner.handle is not None and not self._learner.done:
                self._observer.event("evaluation", f"no evaluation at {steps:,} steps: {type(error).__name__}")
            return
        if phase == "checkpoint":
            play = self._evaluator.handle.evaluate
            asked = play.remote(answer, self._episodes, "evaluation", self._progress.evaluations)
            self._asked = ("episodes", asked, steps)
        else:
            self._take(answer, steps)

    def _take(self, evaluation: Evaluation, steps: int) -> None:
        self.history.append({"env_steps": steps, "mean": evaluation.mean, "std": evaluation.std})
        text = f"mean return {evaluation.mean:.1f} +- {evaluation.std:.1f} at {steps:,} steps"
        best = self._progress.best_return
        # At a tie the later weights, which have seen more.
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
        """Let a periodic evaluation end, then score the best and the last checkpoint; `final` holds both.

        Args:
            while_waiting: called again and again; it may raise to give up.
        """
        while self.playing:
            while_waiting()
            if self.playing:
                self._go_on()
        best, last_path = self._checkpoints / BEST, self._checkpoints / LAST
        # A learner that died while it was stopped may leave no last checkpoint behind.
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
        raise AssertionError("evaluators are made anew for ever, or the coordinator gives up")

    def _evaluators(self, while_waiting: Callable[[], None]) -> Iterator[Any]:
        """Yield the evaluator's handle, and its successor's after a death."""
        before = None
        while True:
            while self._evaluator.handle is None or self._evaluator.handle is before:
                while_waiting()
            before = self._evaluator.handle
            yield before
