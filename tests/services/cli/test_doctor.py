"""`squall doctor`: the checks of this machine, and of simulated machines with one problem."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest

from services.cli import machine_checks
from services.cli.machine_checks import OK, PROBLEM, WARNING, Finding, check_machine
from tests.services.running import ROOT, environment, squall


def finding(check: str) -> Finding:
    return next(found for found in check_machine().findings if found.check == check)


def test_a_healthy_machine() -> None:
    machine = check_machine()
    assert {found.check for found in machine.findings} == {
        "installation", "packages", "processors", "memory", "shared memory", "gpu", "atari", "loopback",
    }  # fmt: skip
    assert [found for found in machine.findings if found.verdict == PROBLEM] == []
    assert all(bool(found.advice) == (found.verdict != OK) for found in machine.findings)
    assert None not in machine.versions.values()


@pytest.mark.parametrize(("free", "verdict"), [(8 * 2**30, OK), (2**31, WARNING), (2**30, PROBLEM)])
def test_memory(free: int, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "available_memory", lambda: free)
    assert finding("memory").verdict == verdict
    assert f"{free / 2**30:.1f} GiB" in finding("memory").found


@pytest.mark.parametrize(("free", "verdict"), [(2**31, OK), (2**29, WARNING), (64 * 2**20, PROBLEM)])
def test_shared_memory(free: int, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "disk_usage", lambda _: namedtuple("Usage", "free")(free))
    assert finding("shared memory").verdict == verdict
    assert ("shm_size" in finding("shared memory").advice) == (verdict != OK)


def test_a_limit_on_processors_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "cpu.max"
    limit.write_text("50000 100000\n")
    monkeypatch.setattr(machine_checks, "_CPU_LIMIT", limit)
    assert (finding("processors").verdict, finding("processors").found) == (WARNING, "0.5 cores")


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "PACKAGES", ("ray", "not-a-package"))
    assert (finding("packages").verdict, finding("packages").found) == (PROBLEM, "no not-a-package")


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(machine_checks, "_gpu", broken)
    assert any(found.verdict == PROBLEM and "no such luck" in found.found for found in check_machine().findings)


def test_a_folder_that_hides_a_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "replay").mkdir()
    shutil.copy(ROOT / "replay" / "__init__.py", tmp_path / "replay")
    code = (
        "import importlib.util, services.cli.machine_checks as checks, sys;"
        f"sys.modules.pop('replay'); sys.path.insert(0, {str(tmp_path)!r});"
        "importlib.invalidate_caches(); print(checks._installation())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True, check=True, timeout=60
    )
    assert "problem" in done.stdout
    assert f"'replay' comes from {tmp_path}" in done.stdout


@pytest.mark.parametrize(("offset", "verdict"), [(0.0, OK), (1.5, OK), (-30.0, PROBLEM), (30.0, PROBLEM)])
def test_clocks(offset: float, verdict: str) -> None:
    assert machine_checks._check_clock("there", offset, 0.0).verdict == verdict


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_the_command_looks_from_inside_a_worker_and_leaves_nothing(tmp_path: Path) -> None:
    began = time.time()
    done = squall(tmp_path / "runs", "doctor", "--json", timeout=240)
    findings = json.loads(done.stdout)
    assert done.returncode == int(any(found["verdict"] == PROBLEM for found in findings)), done.stderr
    workers = [found for found in findings if found["place"].startswith("worker on ")]
    assert {"installation", "packages", "atari", "clock"} <= {found["check"] for found in workers}
    assert not [found for found in workers if found["check"] == "versions"]
    assert next(found for found in findings if found["check"] == "ray")["verdict"] == OK
    assert not (tmp_path / "runs").exists()
    left = [p for p in psutil.process_iter(["create_time", "environ"]) if (p.info["create_time"] or 0) > began]
    assert not [p for p in left if (p.info["environ"] or {}).get("SQUALL_HOME") == str(tmp_path / "runs")]


def test_a_store_that_is_away_and_a_cluster_that_is_not_there_are_problems(tmp_path: Path) -> None:
    done = squall(tmp_path, "doctor", "--store", "redis://:hunter2@127.0.0.1:1/0", "--json", timeout=240)
    assert done.returncode == 1
    found = next(found for found in json.loads(done.stdout) if found["place"] == "store")
    assert found["verdict"] == PROBLEM
    assert "hunter2" not in done.stdout + done.stderr
