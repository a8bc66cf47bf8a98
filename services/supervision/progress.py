"""Progress: how far a run is, and what of it survives a resume. RunObserver: whom the coordinator tells."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from learner.checkpoints import read_checkpoint
from replay.server import Counters
from services.store.records import Command

BEST_RETURN = "best.json"
_RESUMES = "generation"  # the key of `resume_count` in checkpoints


@dataclass
class Progress:
    """How far a run is; part of every checkpoint, as plain values.

    Attributes:
        counters: steps, samples and inserts.
        episodes: episodes finished.
        best_return: mean return of the best periodic evaluation, or None.
        next_evaluation: step count of the next evaluation.
        evaluations: evaluations begun.
        seconds: time spent on it.
        resume_count: how often the run was resumed.
        weights_version: the newest version of the weights that the coordinator heard of.
    """

    counters: Counters = field(default_factory=Counters)
    episodes: int = 0
    best_return: float | None = None
    next_evaluation: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    resume_count: int = 0
    weights_version: int = -1

    def plain(self) -> dict[str, Any]:
        """Return this as plain values, under the keys of checkpoints."""
        values = asdict(self)
        return {**values, _RESUMES: values.pop("resume_count")}

    @classmethod
    def resumed(cls, checkpoint: Path) -> Progress:
        """Return the progress in a checkpoint, resumed once more; fresh if there is no checkpoint yet."""
        saved = read_checkpoint(checkpoint)["squall"]["run"] if checkpoint.exists() else {}
        values = {"resume_count" if key == _RESUMES else key: value for key, value in saved.items()}
        progress = cls(**{**values, "counters": Counters(**saved.get("counters", {}))})
        # The best checkpoint may be newer than the last one, and its score must not be forgotten with the rest.
        best = checkpoint.with_name(BEST_RETURN)
        if best.exists():
            progress.best_return = json.loads(best.read_text())["return_mean"]
        return replace(progress, resume_count=progress.resume_count + 1)


class RunObserver:
    """Where a coordinator tells how it goes; every method may be called often and must not block."""

    def snapshot(self, snapshot: dict[str, Any]) -> None:
        """Take the state of the run, once a second."""

    def event(self, kind: str, text: str) -> None:
        """Take word of something that happened; the first line of `text` says it all."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Take figures, by tag, at an environment step."""

    def stop_wanted(self) -> str | None:
        """Return the signal by which somebody wants the run stopped, or None."""
        return None

    def commands(self) -> list[Command]:
        """Return the commands that came since the last call.

        Raises:
            RunTakenOver: another coordinator has the run; this one must end at once, without a checkpoint.
        """
        return []

    def answer(self, command: Command, result: dict[str, Any]) -> None:
        """Tell whoever sent a command what came of it."""
