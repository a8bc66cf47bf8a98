"""SIGINT and SIGTERM: the first is a wish to stop in order, the second an end at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil

# What ends a process from outside may send SIGTERM to it and to its group: that is one wish.
_SAME_WISH_SECONDS = 1.0


class StopSignals:
    """Takes both signals over for as long as a `with` block lasts; `wanted` says what came."""

    def __init__(self, at_once: Callable[[], None]) -> None:
        """Say what to do at the second signal."""
        self._at_once = at_once
        self._before: dict[signal.Signals, Any] = {}
        self._came = 0.0
        self.wanted: str | None = None

    def __enter__(self) -> StopSignals:
        """Take the signals over."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.getsignal(number)
        self.take_over()
        return self

    def take_over(self) -> None:
        """Take the signals over, again after `ray.init`, which puts a handler of its own on SIGTERM."""
        for number in self._before:
            signal.signal(number, self._received)

    def forget(self) -> None:
        """Forget what came: the next signal is a first one again."""
        self.wanted = None

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _received(self, number: int, _: object) -> None:
        if number == signal.SIGTERM and time.monotonic() - self._came < _SAME_WISH_SECONDS:
            return
        if self.wanted is not None:
            self._at_once()
        self._came = time.monotonic()
        self.wanted = "interrupted" if number == signal.SIGINT else "terminated"


def end_at_once() -> None:
    """Kill this process's children and theirs, and leave without another word."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h")  # the live display hid the cursor
    os._exit(130)
