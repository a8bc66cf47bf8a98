"""EndpointProcess: the coordinator's view of a run's gRPC endpoint: keeps it up, passes progress on, closes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from replay.remote import is_ready
from services.rpc.auth import split_address
from services.supervision.processes import Process


class EndpointProcess:
    """The endpoint's process, if the run serves anything, and where it is to be found."""

    def __init__(self, start: Callable[[int, int | None], Any], *, served: bool, first_incarnation: int) -> None:
        """Describe the process.

        Args:
            start: takes an incarnation and the port that the one before had, and returns an actor's handle.
            served: whether the run serves anything.
            first_incarnation: number of the first incarnation.
        """
        self._port: int | None = None
        self._closing: list[Any] = []
        endpoint = Process(
            "endpoint", 0, lambda incarnation: start(incarnation, self._port), first_incarnation=first_incarnation
        )
        self.processes = [endpoint] if served else []

    @property
    def _handles(self) -> list[Any]:
        return [process.handle for process in self.processes if process.handle is not None]

    @property
    def heard_of_the_end(self) -> bool:
        """Whether the replay told it that the run has all its steps."""
        return any(getattr(process.report, "finished", False) for process in self.processes)

    def handle_exit(self, process: Process) -> None:
        """Make ready for the next incarnation: whoever knows the address of one that is gone shall find it there."""
        if process.report is not None:
            self._port = split_address(process.report.address)[1]

    def note_progress(self, env_steps: int) -> None:
        """Pass on how far the run is."""
        for handle in self._handles:
            handle.note_progress.remote(env_steps)

    def finish(self) -> None:
        """Have sessions end, with the word that the run takes no more; the policy is served on."""
        for handle in self._handles:
            handle.finish.remote()

    def close(self) -> None:
        """Begin to close it, once: sessions end as `finish` says and send what they have, as workers do."""
        if not self._closing:
            self._closing = [handle.close.remote() for handle in self._handles]

    @property
    def is_closing(self) -> bool:
        """Whether it was told to close and has not yet done so, nor died."""
        return any(not is_ready(reference) for reference in self._closing)

    def told(self) -> list[dict[str, Any]] | None:
        """Return what a gateway needs of an endpoint that takes calls; None if the run serves nothing."""
        if not self.processes:
            return None
        up = [] if self._closing else [process.report for process in self.processes]
        return [report.plain() for report in up if report is not None]
