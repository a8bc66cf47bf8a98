"""Drives the shipped docker-compose.yml on a real Docker engine.

SQUALL_ENGINE may name a program that gives a throw-away engine, for machines without one: `ENGINE build` (images can be
built, on the machine's own network), `ENGINE run` (containers in a network of their own), `ENGINE enter COMMAND...`
(runs it where the published ports are) and `ENGINE kill9 CONTAINER`. Without it DOCKER_HOST's engine is taken as it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROJECT = "squalltest"
BIN = Path(sys.executable).parent


def run(*command: str, timeout: float = 300, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command; an error shows what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT, **options)
    assert done.returncode == 0 or not check, (
        f"{command}: {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done


class Cluster:
    """The services of docker-compose.yml, under a project name and with secrets of this test's own."""

    def __init__(self, env_file: Path) -> None:
        self.env_file = env_file
        self.engine = os.environ.get("SQUALL_ENGINE")

    def compose(self, *arguments: str, timeout: float = 300, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run docker compose; the override is only for building on an engine of SQUALL_ENGINE."""
        override = ["-f", "tests/cluster/override.yml"] if self.engine else []
        files = ["-f", "docker-compose.yml", *override, "--env-file", str(self.env_file)]
        return run("docker", "compose", "-p", PROJECT, *files, *arguments, timeout=timeout, check=check)

    def build(self) -> None:
        """Build the image, and leave the engine so that containers can run."""
        if self.engine:
            run(self.engine, "build")
        self.compose("build", timeout=1200)
        if self.engine:
            run(self.engine, "run")

    def up(self, *services: str, workers: int = 2) -> None:
        """Bring services up and wait until they are healthy.

        A Ray that did not start in the time that it gives itself is started again by its restart policy, but
        `up --wait` gives up at the first.
        """
        end = time.monotonic() + 600
        while True:
            begun = time.monotonic()
            done = self.compose(
                "up", "-d", "--wait", "--scale", f"ray-worker={workers}", *services, timeout=900, check=begun > end
            )
            if done.returncode == 0:
                return
            time.sleep(5)

    def where_the_ports_are(self, *command: str) -> list[str]:
        """Return the command that runs this one where the published ports can be reached."""
        return [self.engine, "enter", *command] if self.engine else [*command]

    def exec(self, service: str, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in a container of a service."""
        return self.compose("exec", "-T", service, *command, check=check, timeout=120)

    def status(self, name: str, service: str = "ray-head") -> dict[str, Any]:
        """Return what `squall status --json` says, or an empty mapping if nothing can be said."""
        done = self.exec(service, "squall", "status", name, "--json", "--events", "1000", check=False)
        answer: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
        return answer

    def wait_for(
        self, name: str, condition: Callable[[dict[str, Any]], Any], seconds: float, service: str = "ray-head"
    ) -> dict[str, Any]:
        """Ask for a run's status until `condition` holds, and return it."""
        end = time.monotonic() + seconds
        while True:
            status = self.status(name, service)
            if status and condition(status):
                return status
            assert time.monotonic() < end, f"waited {seconds:.0f} s; last: {json.dumps(status, indent=1)[-6000:]}"
            time.sleep(0.5)

    def container_of(self, node: str) -> str:
        """Return the name of the container with this host name."""
        for name in self.containers():
            if run("docker", "inspect", "-f", "{{.Config.Hostname}}", name).stdout.strip() == node:
                return name
        raise AssertionError(f"no container is {node}: {self.containers()}")

    def containers(self) -> list[str]:
        """Return the names of the containers that there are."""
        lines = self.compose("ps", "-a", "--format", "json").stdout.splitlines()
        return [json.loads(line)["Name"] for line in lines]

    def kill9(self, container: str) -> None:
        """End a container's first process as a crash would, so that its restart policy acts."""
        if self.engine:
            run(self.engine, "kill9", container)
            return
        pid = run("docker", "inspect", "-f", "{{.State.Pid}}", container).stdout.strip()
        privileged = ["--rm", "--privileged", "--pid=host", "--user=0"]
        run("docker", "run", *privileged, "squall", "sh", "-c", f"kill -9 {pid}")

    def wait_until_restarted(self, container: str, before: str, seconds: float = 240) -> None:
        """Wait until a container runs that was started after `before`, and is healthy."""
        end = time.monotonic() + seconds
        form = "{{.State.StartedAt}} {{.State.Health.Status}}"
        while True:
            started, health = run("docker", "inspect", "-f", form, container).stdout.split()
            if started != before and health == "healthy":
                return
            assert time.monotonic() < end, f"{container}: started {started} (before: {before}), {health}"
            time.sleep(1)

    def started(self, container: str) -> str:
        """Return when a container was last started."""
        return run("docker", "inspect", "-f", "{{.State.StartedAt}}", container).stdout.strip()

    def logs(self) -> str:
        """Return the last lines of every service's log, for a failed test's report."""
        return self.compose("logs", "--tail", "40", "--no-color", check=False).stdout
