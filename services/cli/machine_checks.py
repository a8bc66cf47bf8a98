"""Checks of `squall doctor`: this machine, the run store, and every node of the cluster, from inside a Ray task.

Each check yields a finding, with advice if something is wrong.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from replay.errors import SquallError
from replay.memory import available_memory
from services.cli.installation import hidden_packages, package_location
from services.store.locate import open_default_store, runs_dir
from services.supervision.ray_cluster import MIN_OBJECT_STORE_BYTES, RayCluster

OK, WARNING, PROBLEM = "ok", "warning", "problem"
PACKAGES = ("ray", "torch", "pytorch-lightning", "gymnasium", "ale-py", "numpy", "redis", "grpcio")
NODE_SECONDS = 90.0

# Memory in bytes: below the first there is a warning, below the second a problem.
_ENOUGH_MEMORY, _MIN_MEMORY = 4 * 2**30, 3 * 2**29
_ENOUGH_SHARED_MEMORY = 2**30
_ENOUGH_DISK = 2 * 2**30
_MAX_CLOCK_OFFSET = 2.0
_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        place: the host, store, or cluster that was checked.
        check: name of the check, such as "memory".
        verdict: `OK`, `WARNING` (works, but not well), or `PROBLEM` (does not work).
        found: what the check observed.
        advice: what the user should do; empty if the verdict is `OK`.
    """

    place: str
    check: str
    verdict: str
    found: str
    advice: str = ""


@dataclass(frozen=True)
class MachineReport:
    """The findings on one machine: the driver's, or that of a node.

    Attributes:
        host: host name.
        clock: time of the machine, in Unix seconds.
        versions: version of Python and of each package in `PACKAGES`; None for a missing package.
        findings: results of the checks.
    """

    host: str
    clock: float
    versions: dict[str, str | None]
    findings: list[Finding]


def check_all(store_url: str | None = None) -> list[Finding]:
    """Run all checks, within a few minutes at most; a check that fails is a finding, not an error."""
    local = check_machine()
    findings = [*local.findings, *_check_runs_folder(local.host), *_check_store(store_url)]
    address = os.environ.get("RAY_ADDRESS")
    cluster = address or "local Ray"
    try:
        with RayCluster(MIN_OBJECT_STORE_BYTES):
            nodes = _nodes()
            findings.append(Finding(cluster, "ray", OK, f"Ray {ray.__version__}, nodes: {len(nodes)}"))
            for node in nodes:
                findings += _check_node(node, local)
    except SquallError as error:
        advice = "start a cluster at that address, or unset RAY_ADDRESS" if address else "Squall cannot run without Ray"
        findings.append(Finding(cluster, "ray", PROBLEM, str(error), advice))
    return findings


def check_machine() -> MachineReport:
    """Run the checks of the machine that the calling process runs on."""
    host = socket.gethostname()
    versions = {name: _version(name) for name in PACKAGES} | {"python": ".".join(map(str, sys.version_info[:3]))}
    findings = []
    for check in (_installation, _packages, _processors, _memory, _shared_memory, _gpu, _atari, _loopback):
        try:
            verdict, found, advice = check()
        except Exception as error:  # a check that raises is a finding too
            verdict, found, advice = PROBLEM, f"{type(error).__name__}: {error}", "this should work on any machine"
        findings.append(Finding(host, check.__name__.strip("_").replace("_", " "), verdict, found, advice))
    return MachineReport(host, time.time(), versions, findings)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


_Result = tuple[str, str, str]
"""Verdict, observation, and advice of a check."""


def _installation() -> _Result:
    if hidden := hidden_packages():
        return PROBLEM, hidden, "all processes must import the same code"
    return OK, f"Squall's packages are in {package_location('services')}", ""


def _packages() -> _Result:
    versions = {name: _version(name) for name in PACKAGES}
    missing = [name for name, found in versions.items() if found is None]
    listed = ", ".join(f"{name} {found}" for name, found in versions.items() if found is not None)
    if missing:
        return PROBLEM, f"no {', '.join(missing)}", "pip install -c constraints.txt squall"
    return OK, f"Python {sys.version.split()[0]}, {listed}", ""


def _processors() -> _Result:
    usable = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if _CPU_LIMIT.exists():
        quota, _, period = _CPU_LIMIT.read_text().partition(" ")
        if quota != "max":
            usable = min(usable, int(quota) / int(period))
    if usable < 2:
        return WARNING, f"{usable:g} cores", "learner and workers share a core; use two cores or more"
    return OK, f"{usable:g} cores", ""


def _memory() -> _Result:
    free = available_memory()
    advice = (
        "each process needs 300 MB, in addition to the replay: use fewer --actors, a smaller replay_size, or "
        "more memory"
    )
    verdict = OK if free >= _ENOUGH_MEMORY else WARNING if free >= _MIN_MEMORY else PROBLEM
    return verdict, f"{_gigabytes(free)} available", "" if verdict == OK else advice


def _shared_memory() -> _Result:
    if not Path("/dev/shm").exists():
        return OK, "no /dev/shm on this system", ""
    free = psutil.disk_usage("/dev/shm").free
    verdict = OK if free >= _ENOUGH_SHARED_MEMORY else WARNING if free >= MIN_OBJECT_STORE_BYTES else PROBLEM
    advice = "Ray stores batches and weights there; in a container, raise shm_size, to 2g for image observations"
    return verdict, f"{_gigabytes(free)} free in /dev/shm", "" if verdict == OK else advice


def _gpu() -> _Result:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return OK, f"{', '.join(names)}, with CUDA {torch.version.cuda}", ""
    if not Path("/proc/driver/nvidia").exists():
        return OK, "none: the learner uses the CPU", ""
    if torch.version.cuda is None:
        advice = "install a CUDA build of PyTorch: https://pytorch.org/get-started"
        return WARNING, f"an NVIDIA driver is loaded, but PyTorch {torch.__version__} is built without CUDA", advice
    return WARNING, "an NVIDIA driver is loaded, but PyTorch finds no GPU", "check CUDA_VISIBLE_DEVICES and nvidia-smi"


def _atari() -> _Result:
    from actors.environments import specify

    environment = specify("PongNoFrameskip-v4").make(1)
    try:
        environment.reset(seed=0)
        for _ in range(3):
            environment.step(environment.action_space.sample())
    finally:
        environment.close()
    return OK, "Pong runs", ""


def _loopback() -> _Result:
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=5),
        ):
            return OK, f"port {server.getsockname()[1]} of 127.0.0.1 answers", ""
    except OSError as error:
        return PROBLEM, f"no port of 127.0.0.1 answers: {error}", "check whether a firewall blocks Ray's connections"


def _check_runs_folder(host: str) -> Iterator[Finding]:
    folder = runs_dir()
    existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            free = psutil.disk_usage(str(existing)).free
    except OSError as error:
        text = f"{existing} is not writable: {error}"
        yield Finding(host, "runs", PROBLEM, text, "set SQUALL_HOME to another folder")
        return
    enough = free >= _ENOUGH_DISK
    advice = "" if enough else "checkpoints need disk space: set SQUALL_HOME to a folder on another disk"
    yield Finding(host, "runs", OK if enough else WARNING, f"{folder}, {_gigabytes(free)} free", advice)


def _check_store(url: str | None) -> Iterator[Finding]:
    try:
        with open_default_store(url) as store:
            start = time.monotonic()
            health = store.health()
            seconds = time.monotonic() - start
    except SquallError as error:
        advice = "start the store, or use another with --store; runs can continue without a store, but cannot start"
        yield Finding("store", "answers", PROBLEM, str(error), advice)
        return
    yield Finding("store", "answers", OK, f"{health.server}, in {1000 * seconds:.0f} ms")
    for warning in health.warnings:
        yield Finding("store", "keeps", WARNING, *warning.split(": ", 1))
    if health.clock is not None:
        yield _check_clock("store", health.clock - time.time(), seconds)


def _nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"]]


def _check_node(node: dict[str, Any], local: MachineReport) -> Iterator[Finding]:
    place = f"worker on {node['NodeManagerHostname']}"
    task = ray.remote(num_cpus=0, max_retries=0)(check_machine).options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    )
    start = time.time()
    reference = task.remote()
    try:
        report: MachineReport = ray.get(reference, timeout=NODE_SECONDS)
    except Exception as error:  # the task failed, or its result did not arrive in time
        ray.cancel(reference, force=True)
        reason = (str(error) or repr(error)).strip().splitlines()[-1]
        advice = "install the same version of Squall there as here"
        yield Finding(place, "starts", PROBLEM, reason, advice)
        return
    end = time.time()
    yield from (replace(finding, place=place) for finding in report.findings)
    for package, found in report.versions.items():
        if found != local.versions[package]:
            advice = "install the same version on every node, because nodes exchange pickled objects"
            text = f"{package} {found} there, {local.versions[package]} here"
            yield Finding(place, "versions", PROBLEM, text, advice)
    # The node's clock was read between `start` and `end`, so it is wrong only if its time lies outside that interval.
    offset = min(0.0, report.clock - start) + max(0.0, report.clock - end)
    yield _check_clock(place, offset, 0.0)


def _check_clock(place: str, offset: float, uncertainty: float) -> Finding:
    """Return the finding on a clock that differs from this machine's by `offset` seconds."""
    if abs(offset) <= _MAX_CLOCK_OFFSET + uncertainty:
        return Finding(place, "clock", OK, f"within {_MAX_CLOCK_OFFSET:g} s of this machine's clock")
    advice = "synchronize both clocks, with chrony or ntpd; otherwise live runs may be shown as lost"
    return Finding(place, "clock", PROBLEM, f"{offset:+.1f} s from this machine's clock", advice)


def _gigabytes(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
