"""Progress of a run, which its checkpoints keep across resumes, and the observer that the coordinator reports to."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from learner.checkpoints import read_checkpoint
from replay.server import Counters
from services.store.records import Command

BEST_RETURN = "best.json"
_RESUME_COUNT_KEY = "generation"  # the key of `resume_count` in checkpoints


@dataclass
class Progress:
    """Progress of a run; every checkpoint contains it, as plain values.

    Attributes:
        counters: environment steps, samples, and inserts.
        episodes: number of finished episodes.
        best_return: mean return of the best periodic evaluation, or None.
        next_evaluation: environment step of the next evaluation.
        evaluations: number of evaluations started.
        seconds: time spent on the run, over all resumes.
        resume_count: number of times the run was resumed.
        weights_version: newest version of the weights that the coordinator knows.
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
        """Return the progress as plain values, under the keys of checkpoints."""
        values = asdict(self)
        values[_RESUME_COUNT_KEY] = values.pop("resume_count")
        return values

    @classmethod
    def resumed(cls, checkpoint: Path) -> Progress:
        """Return the progress in a checkpoint with one more resume; start from zero if the file does not exist."""
        saved = read_checkpoint(checkpoint)["squall"]["run"] if checkpoint.exists() else {}
        values = {"resume_count" if key == _RESUME_COUNT_KEY else key: value for key, value in saved.items()}
        progress = cls(**{**values, "counters": Counters(**saved.get("counters", {}))})
        # The best checkpoint may be newer than the last one, so its score is kept in a file of its own.
        best = checkpoint.with_name(BEST_RETURN)
        if best.exists():
            progress.best_return = json.loads(best.read_text())["return_mean"]
        return replace(progress, resume_count=progress.resume_count + 1)


class RunObserver:
    """Receiver of a coordinator's reports and source of its commands. Methods are called often and must not block."""

    def snapshot(self, snapshot: dict[str, Any]) -> None:
        """Receive the state of the run, once a second."""

    def event(self, kind: str, text: str) -> None:
        """Receive an event; the first line of `text` is a summary."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Receive metrics, by tag, at an environment step."""

    def stop_wanted(self) -> str | None:
        """Return `interrupted` or `terminated` after a signal that stops the run, else None."""
        return None

    def commands(self) -> list[Command]:
        """Return the commands that arrived since the last call.

        Raises:
            RunTakenOver: another coordinator has taken over the run; this one must end now, without a checkpoint.
        """
        return []

    def answer(self, command: Command, result: dict[str, Any]) -> None:
        """Send a command's result to its sender."""
