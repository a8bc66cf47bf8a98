"""The process of a run's gRPC endpoint, as the coordinator supervises it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from replay.remote import is_ready
from services.rpc.auth import split_address
from services.supervision.processes import Process


class EndpointProcess:
    """The supervised endpoint: recreated on the same port, notified of the run's progress, and closed at its end.

    A run that serves nothing has no endpoint; `processes` is empty then, and all calls have no effect.
    """

    def __init__(self, start: Callable[[int, int | None], Any], *, served: bool, first_incarnation: int) -> None:
        """Describe the process.

        Args:
            start: takes an incarnation and the previous incarnation's port, and returns the actor's handle.
            served: whether the run has an endpoint.
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
    def saw_finish(self) -> bool:
        """Whether the endpoint knows from the replay that the run has all its steps."""
        return any(getattr(process.report, "finished", False) for process in self.processes)

    def handle_exit(self, process: Process) -> None:
        """Remember the port of an endpoint that has exited, so that clients reach its successor at the same address."""
        if process.report is not None:
            self._port = split_address(process.report.address)[1]

    def note_progress(self, env_steps: int) -> None:
        """Notify the endpoint of the run's number of environment steps."""
        for handle in self._handles:
            handle.note_progress.remote(env_steps)

    def finish(self) -> None:
        """End experience sessions, because the run accepts no more experience; the policy is still served."""
        for handle in self._handles:
            handle.finish.remote()

    def close(self) -> None:
        """Start to close the endpoint, once. Sessions end as in `finish`, and send their unsent experience first."""
        if not self._closing:
            self._closing = [handle.close.remote() for handle in self._handles]

    @property
    def is_closing(self) -> bool:
        """Whether the endpoint was asked to close and has neither closed nor died."""
        return any(not is_ready(reference) for reference in self._closing)

    def describe(self) -> list[dict[str, Any]] | None:
        """Return for a gateway the endpoint that accepts calls, if any; None if the run serves nothing."""
        if not self.processes:
            return None
        reports = [] if self._closing else [process.report for process in self.processes]
        return [report.plain() for report in reports if report is not None]
