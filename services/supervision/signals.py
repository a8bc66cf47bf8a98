"""Handling of SIGINT and SIGTERM: the first signal requests a graceful stop, the second one kills the run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil

# A service manager may send SIGTERM both to a process and to its group. A SIGTERM so soon after another signal is a
# repeat.
_REPEAT_SECONDS = 1.0


class StopSignals:
    """Handler of both signals for the duration of a `with` block.

    Attributes:
        wanted: `interrupted` after SIGINT, `terminated` after SIGTERM, None before a signal.
    """

    def __init__(self, on_second: Callable[[], None]) -> None:
        """Create a handler; a `with` block installs it.

        Args:
            on_second: called at the second signal.
        """
        self._on_second = on_second
        self._previous: dict[signal.Signals, Any] = {}
        self._received_at = 0.0
        self.wanted: str | None = None

    def __enter__(self) -> StopSignals:
        """Install the handlers."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.getsignal(number)
        self.install()
        return self

    def install(self) -> None:
        """Install the handlers. Call this again after `ray.init`, which replaces the handler of SIGTERM."""
        for number in self._previous:
            signal.signal(number, self._handle)

    def forget(self) -> None:
        """Forget received signals, so that the next signal counts as the first."""
        self.wanted = None

    def __exit__(self, *_: object) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        if number == signal.SIGTERM and time.monotonic() - self._received_at < _REPEAT_SECONDS:
            return
        if self.wanted is not None:
            self._on_second()
        self._received_at = time.monotonic()
        self.wanted = "interrupted" if number == signal.SIGINT else "terminated"


def kill_and_exit() -> None:
    """Kill all child processes, recursively, and exit with status 130 without any cleanup."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h")  # show the cursor, which the live display has hidden
    os._exit(130)
