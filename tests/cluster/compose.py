"""Control of the shipped docker-compose.yml on a real Docker engine.

Without SQUALL_ENGINE, the tests use the engine of DOCKER_HOST. On a machine without an engine, SQUALL_ENGINE may name a
program that provides a temporary one. Its commands are `ENGINE build` (prepare to build images, on the machine's own
network), `ENGINE run` (prepare to run containers, in a separate network), `ENGINE enter COMMAND...` (run a command that
reaches the published ports), and `ENGINE kill9 CONTAINER`.
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
    """Run a command; an error contains its output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT, **options)
    assert done.returncode == 0 or not check, (
        f"{command}: {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done


class Cluster:
    """The services of docker-compose.yml, with a project name and secrets that only these tests use."""

    def __init__(self, env_file: Path) -> None:
        self.env_file = env_file
        self.engine = os.environ.get("SQUALL_ENGINE")

    def compose(self, *arguments: str, timeout: float = 300, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run docker compose; the override file is used only with SQUALL_ENGINE, to build the image."""
        override = ["-f", "tests/cluster/override.yml"] if self.engine else []
        files = ["-f", "docker-compose.yml", *override, "--env-file", str(self.env_file)]
        return run("docker", "compose", "-p", PROJECT, *files, *arguments, timeout=timeout, check=check)

    def build(self) -> None:
        """Build the image, and prepare the engine to run containers."""
        if self.engine:
            run(self.engine, "build")
        self.compose("build", timeout=1200)
        if self.engine:
            run(self.engine, "run")

    def up(self, *services: str, workers: int = 2) -> None:
        """Start services and wait until they are healthy.

        If Ray does not start before its own timeout, the container's restart policy starts it again. `up --wait` fails
        at the first of these failures, so it is repeated.
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

    def wait_for_nodes(self, count: int, seconds: float = 120) -> None:
        """Block until the head has `count` live Ray nodes: a container is healthy a moment before its node is known."""
        code = (
            "import ray; ray.init(address='auto', log_to_driver=False, logging_level='ERROR');"
            "print('nodes', sum(node['Alive'] for node in ray.nodes()))"
        )
        end = time.monotonic() + seconds
        while f"nodes {count}" not in (seen := self.exec("ray-head", "python", "-c", code, check=False).stdout):
            assert time.monotonic() < end, f"waited {seconds:.0f} s for {count} nodes: {seen}"
            time.sleep(1)

    def with_ports(self, *command: str) -> list[str]:
        """Return the command that runs this command where the published ports are reachable."""
        return [self.engine, "enter", *command] if self.engine else [*command]

    def exec(self, service: str, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in a container of a service."""
        return self.compose("exec", "-T", service, *command, check=check, timeout=120)

    def status(self, name: str, service: str = "ray-head") -> dict[str, Any]:
        """Return the output of `squall status --json`, or an empty mapping if it fails."""
        done = self.exec(service, "squall", "status", name, "--json", "--events", "1000", check=False)
        answer: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
        return answer

    def wait_for(
        self, name: str, condition: Callable[[dict[str, Any]], Any], seconds: float, service: str = "ray-head"
    ) -> dict[str, Any]:
        """Read a run's status until `condition` holds; return it."""
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
        raise AssertionError(f"no container has the host name {node}: {self.containers()}")

    def containers(self) -> list[str]:
        """Return the names of all containers."""
        lines = self.compose("ps", "-a", "--format", "json").stdout.splitlines()
        return [json.loads(line)["Name"] for line in lines]

    def kill9(self, container: str) -> None:
        """Kill a container's first process, as a crash would, so that the restart policy applies."""
        if self.engine:
            run(self.engine, "kill9", container)
            return
        pid = run("docker", "inspect", "-f", "{{.State.Pid}}", container).stdout.strip()
        privileged = ["--rm", "--privileged", "--pid=host", "--user=0"]
        run("docker", "run", *privileged, "squall", "sh", "-c", f"kill -9 {pid}")

    def wait_until_restarted(self, container: str, before: str, seconds: float = 240) -> None:
        """Wait until a container has been started again after `before` and is healthy."""
        end = time.monotonic() + seconds
        form = "{{.State.StartedAt}} {{.State.Health.Status}}"
        while True:
            started, health = run("docker", "inspect", "-f", form, container).stdout.split()
            if started != before and health == "healthy":
                return
            assert time.monotonic() < end, f"{container}: started {started} (before: {before}), {health}"
            time.sleep(1)

    def started(self, container: str) -> str:
        """Return the time of a container's last start."""
        return run("docker", "inspect", "-f", "{{.State.StartedAt}}", container).stdout.strip()

    def logs(self) -> str:
        """Return the last lines of every service's log, for the report of a failed test."""
        return self.compose("logs", "--tail", "40", "--no-color", check=False).stdout
