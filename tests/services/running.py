"""Helpers that run the real `squall` command in processes of its own, and find processes that it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from replay.errors import SquallError
from services.store import remote_control
from services.store.locate import open_store

SQUALL = [sys.executable, "-m", "services.cli.main"]
ROOT = Path(__file__).parents[2]

SMALL = ("dqn", "CartPole-v1", "--set", "warm_start_size=500", "--set", "eval_episodes=2", "--set", "eval_every=1000")
LONG = (*SMALL, "--steps", "1000000")
ON_POLICY = (
    "a2c", "CartPole-v1", "--set", "eval_every=4000", "--set", "eval_episodes=2", "--set", "final_eval_episodes=3",
)  # fmt: skip


def environment(home: Path, mark: str = "", store: str = "") -> dict[str, str]:
    """Return the environment variables of a command whose runs are in folder `home`; `mark` identifies its children."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SQUALL_"))}
    return {**kept, "SQUALL_HOME": str(home), "SQUALL_STORE": store, "SQUALL_TEST_MARK": mark, "PYTHONPATH": str(ROOT)}


def squall(home: Path, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a command, and wait until it exits."""
    return subprocess.run(
        [*SQUALL, *arguments], env=environment(home), capture_output=True, text=True, timeout=timeout, check=False
    )


class Run:
    """A process that executes `squall train ... --name NAME --json`; `store` is its SQUALL_STORE."""

    def __init__(self, home: Path, name: str, *arguments: str, store: str = "") -> None:
        self.home, self.name, self.mark = home, name, uuid.uuid4().hex
        self.store = ["--store", store] if store else []
        self._store_url = store or None
        home.mkdir(parents=True, exist_ok=True)
        self.out, self.err = home / f"{name}.{self.mark[:6]}.out", home / f"{name}.{self.mark[:6]}.err"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [*SQUALL, "train", *arguments, "--json"],
                env=environment(home, self.mark, store),
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def status(self) -> dict[str, Any]:
        """Return what `squall status --json` prints, or an empty mapping if it fails.

        The store is read in this process, because a `squall status` command per call would slow the run down.
        """
        try:
            with open_store(self._store_url, self.home, create=False) as store:
                status: dict[str, Any] = json.loads(json.dumps(remote_control.status(store, self.name)))
                return status
        except SquallError:
            return {}

    def wait_for(self, condition: Callable[[dict[str, Any]], bool], seconds: float = 90) -> dict[str, Any]:
        """Read the status until `condition` holds; return it."""
        end = time.monotonic() + seconds
        status: dict[str, Any] = {}
        while time.monotonic() < end:
            status = self.status()
            if status and condition(status):
                return status
            assert self.process.poll() is None, f"the run ended: {self.err.read_text()}"
            time.sleep(0.3)
        raise AssertionError(f"waited {seconds} s; {json.dumps(status, indent=1)}\n{self.err.read_text()}")

    def pid_of(self, role: str, index: int = 0) -> int:
        """Return the pid of one of the run's processes."""
        status = self.wait_for(lambda s: any(p["role"] == role and p["pid"] for p in s.get("processes", ())))
        return next(p["pid"] for p in status["processes"] if p["role"] == role and p["index"] == index)

    def finish(self, seconds: float) -> dict[str, Any]:
        """Wait for the end of the run, and return its summary."""
        self.process.wait(seconds)
        text = self.out.read_text()
        assert self.process.returncode == 0, self.err.read_text() + text
        assert text.count("\n") == 1, f"more than one line on standard output: {text}"
        summary: dict[str, Any] = json.loads(text)
        return summary

    def leftovers(self, seconds: float = 10) -> list[str]:
        """Return the processes of this run that have not exited after `seconds`."""
        end = time.monotonic() + seconds
        while (left := self._children()) and time.monotonic() < end:
            time.sleep(0.2)
        return left

    def _children(self) -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                marked = process.environ().get("SQUALL_TEST_MARK") == self.mark
                if marked and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
            except psutil.Error:
                continue
        return found

    def kill_everything(self) -> None:
        """Kill all remaining processes of the run, after a test that failed."""
        for line in self._children():
            try:
                os.kill(int(line.split()[0]), signal.SIGKILL)
            except OSError:
                continue
        self.process.wait(10)


Start = Callable[..., Run]
"""Takes a run's name and arguments of `squall train`, and returns the started run."""
