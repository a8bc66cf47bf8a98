"""Commands that users send to a live run: stop it, scale its workers, write a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from learner.checkpoints import LAST
from replay.remote import is_ready
from services.store.records import Command
from services.supervision.processes import Process, describe_exit
from services.supervision.progress import RunObserver
from services.supervision.workers import WorkerManager


class CommandHandler:
    """Executes a run's commands and sends their results. It never blocks: a checkpoint's result is sent later."""

    def __init__(
        self, observer: RunObserver, learner: Process, worker_manager: WorkerManager, checkpoints: Path
    ) -> None:
        """Create a handler.

        Args:
            observer: the source of commands, which also receives their results.
            learner: the process that writes checkpoints.
            worker_manager: scales the workers.
            checkpoints: folder of the checkpoints.
        """
        self._observer, self._learner, self._worker_manager = observer, learner, worker_manager
        self._checkpoints = checkpoints
        self._pending: list[tuple[Command, Any]] = []

    def handle(self, state: str) -> bool:
        """Execute new commands, and send the results of checkpoints that are complete.

        Args:
            state: the coordinator's state; only a starting or running run accepts other commands than `stop`.

        Returns:
            Whether a command stops the run.
        """
        stop = False
        for command in self._observer.commands():
            if command.kind == "stop":
                stop = True
                self._observer.answer(command, {"ok": True})
            elif state not in ("starting", "running"):
                self._observer.answer(command, {"error": f"the run is {state}"})
            elif command.kind == "scale":
                self._observer.answer(command, self._worker_manager.handle_scale(command.arguments.get("actors")))
            elif command.kind == "checkpoint" and self._learner.handle is not None:
                self._pending.append((command, self._learner.handle.checkpoint.remote(LAST)))
            else:
                self._observer.answer(command, {"error": f"cannot execute {command.kind!r} now"})
        for command, reference in [pair for pair in self._pending if is_ready(pair[1])]:
            self._pending.remove((command, reference))
            self._observer.answer(command, self._checkpoint_result(reference))
        return stop

    def close(self) -> None:
        """Send a result for every pending checkpoint, because the run has ended."""
        for command, reference in self._pending:
            complete = is_ready(reference)
            self._observer.answer(
                command, self._checkpoint_result(reference) if complete else {"error": "the run ended"}
            )

    def _checkpoint_result(self, reference: Any) -> dict[str, Any]:
        try:
            weights = ray.get(reference)
        except RayError as error:
            return {"error": f"no checkpoint: {describe_exit(error).line}"}
        path = str(self._checkpoints / LAST)
        self._observer.event("checkpoint", f"wrote {path}")
        return {"checkpoint": path, "weights_version": weights.version}
