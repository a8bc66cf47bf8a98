"""Reports of a run: to the run store, a display, and TensorBoard; and the run's commands from the store."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from services.store.buffered import BufferedWriter
from services.store.records import Command
from services.supervision.progress import RunObserver
from services.supervision.signals import StopSignals

HEARTBEAT_SECONDS = 1.0
COMMAND_SECONDS = 0.5


class RunDisplay(Protocol):
    """A view of a run for a person, used as a context manager; `services.cli.display.Display` implements it."""

    def __enter__(self) -> RunDisplay:
        """Start to show the run."""
        ...

    def __exit__(self, *_: object) -> None:
        """Stop showing the run."""
        ...

    def snapshot(self, snapshot: dict[str, Any]) -> None:
        """Show the state of the run."""
        ...

    def event(self, kind: str, text: str) -> None:
        """Show an event."""
        ...


class NoDisplay:
    """A `RunDisplay` that shows nothing."""

    def __init__(self, run: str) -> None:
        """Accept the run's name, as every display does."""

    def __enter__(self) -> NoDisplay:
        """Do nothing."""
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing."""

    def snapshot(self, snapshot: dict[str, Any]) -> None:
        """Do nothing."""

    def event(self, kind: str, text: str) -> None:
        """Do nothing."""


class RunReporter(RunObserver):
    """A run's observer: forwards reports to store, display, and TensorBoard, and reads commands from the store."""

    def __init__(
        self, run: str, folder: Path, writer: BufferedWriter, display: RunDisplay, signals: StopSignals
    ) -> None:
        """Create a reporter, which has reported nothing yet.

        Args:
            run: name of the run.
            folder: the run's folder, where TensorBoard's files are written.
            writer: writes to the run store.
            display: shows the run.
            signals: signals that ask the run to stop.
        """
        self._run, self._writer, self._display, self._signals = run, writer, display, signals
        self._folder = folder
        self._state = "starting"
        self._next_commands = 0.0
        self._last_command = 0
        self._last_snapshot: dict[str, Any] = {"run": run, "state": "starting", "processes": []}

    @cached_property
    def _tensorboard(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # takes 0.25 s, so it is imported after the run's start

        return SummaryWriter(str(self._folder / "tensorboard"))

    @contextmanager
    def heartbeats(self) -> Iterator[None]:
        """Send heartbeats during a `with` block that may block for longer than readers wait for a heartbeat."""
        ended = threading.Event()

        def send() -> None:
            while not ended.wait(HEARTBEAT_SECONDS):
                self._writer.write_snapshot(self._last_snapshot, time.time())

        thread = threading.Thread(target=send, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def snapshot(self, snapshot: dict[str, Any]) -> None:
        """Write the state of the run to the store and show it; a snapshot is a heartbeat too."""
        state = {"starting": "starting", "stopping": "stopping"}.get(snapshot["state"], "running")
        if state != self._state:
            self._state = state
            self._writer.update_state(state)
        self._last_snapshot = {"run": self._run, **snapshot}
        self._writer.write_snapshot(self._last_snapshot, time.time())
        self._display.snapshot(snapshot)

    def event(self, kind: str, text: str) -> None:
        """Write an event to the store and show it."""
        self._writer.add_event(kind, text, time.time())
        self._display.event(kind, text)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Write metrics to the store and to TensorBoard."""
        self._writer.add_metrics(step, values, time.time())
        for tag, value in values.items():
            self._tensorboard.add_scalar(tag, value, step)
        self._tensorboard.flush()

    def stop_wanted(self) -> str | None:
        """Return `interrupted` or `terminated` after a signal that stops the run, else None."""
        return self._signals.wanted

    def commands(self) -> list[Command]:
        """Return new commands from the store, which is read every `COMMAND_SECONDS` at most."""
        if time.monotonic() < self._next_commands:
            return []
        self._next_commands = time.monotonic() + COMMAND_SECONDS
        new = [command for command in self._writer.pending_commands() if command.id > self._last_command]
        self._last_command = max([self._last_command, *(command.id for command in new)])
        return new

    def answer(self, command: Command, result: dict[str, Any]) -> None:
        """Write a command's result to the store."""
        self._writer.acknowledge(command.id, result)

    def close(self) -> None:
        """Close TensorBoard's files."""
        if "_tensorboard" in vars(self):
            self._tensorboard.close()
