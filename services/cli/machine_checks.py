"""`squall doctor`: looks at this machine, at the store, and from inside a worker at every node of the cluster.

A finding says what was seen, and where it is not good, what to do.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from replay.errors import SquallError
from replay.table import available_memory
from services.cli.installation import hidden_packages, package_location
from services.store.locate import open_default_store, runs_dir
from services.supervision.ray_cluster import LEAST_OBJECT_STORE, RayCluster

OK, WARNING, PROBLEM = "ok", "warning", "problem"
PACKAGES = ("ray", "torch", "pytorch-lightning", "gymnasium", "ale-py", "numpy", "redis", "grpcio")
NODE_SECONDS = 90.0

_ENOUGH_MEMORY, _LITTLE_MEMORY = 4 * 2**30, 3 * 2**29
_ENOUGH_SHARED_MEMORY = 2**30
_ENOUGH_DISK = 2 * 2**30
_SECONDS_OFF = 2.0
_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        place: host, or what else was asked.
        check: what was looked at, such as "memory".
        verdict: `OK`, `WARNING` (works, not well) or `PROBLEM` (does not work).
        found: what was seen.
        advice: what to do about it.
    """

    place: str
    check: str
    verdict: str
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Machine:
    """What one process saw: of the driver's machine, or of a worker's on some node."""

    host: str
    clock: float
    versions: dict[str, str | None]
    findings: list[Finding]


def examine(store_url: str | None = None) -> list[Finding]:
    """Look at everything, within a few minutes at most; what fails is a finding, not an error."""
    here = look()
    findings = [*here.findings, *_check_runs_folder(here.host), *_look_at_store(store_url)]
    address = os.environ.get("RAY_ADDRESS")
    cluster = address or "a Ray of this machine's own"
    try:
        with RayCluster(LEAST_OBJECT_STORE):
            nodes = _nodes()
            findings.append(Finding(cluster, "ray", OK, f"Ray {ray.__version__}, nodes: {len(nodes)}"))
            for node in nodes:
                findings += _look_at_node(node, here)
    except SquallError as error:
        advice = (
            "start a cluster there, or unset RAY_ADDRESS" if address else "see the reason; without Ray nothing runs"
        )
        findings.append(Finding(cluster, "ray", PROBLEM, str(error), advice))
    return findings


def look() -> Machine:
    """Look at the machine of the calling process."""
    host = socket.gethostname()
    versions = {name: _version(name) for name in PACKAGES} | {"python": ".".join(map(str, sys.version_info[:3]))}
    findings = []
    for check in (_installation, _packages, _processors, _memory, _shared_memory, _gpu, _atari, _loopback):
        try:
            verdict, found, advice = check()
        except Exception as error:  # a check that cannot be made says so
            verdict, found, advice = PROBLEM, f"{type(error).__name__}: {error}", "this should work on any machine"
        findings.append(Finding(host, check.__name__.strip("_").replace("_", " "), verdict, found, advice))
    return Machine(host, time.time(), versions, findings)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


_Verdict = tuple[str, str, str]


def _installation() -> _Verdict:
    if hidden := hidden_packages():
        return PROBLEM, hidden, "what one process takes from there the others would not understand"
    return OK, f"Squall's packages come from {package_location('services')}", ""


def _packages() -> _Verdict:
    seen = {name: _version(name) for name in PACKAGES}
    missing = [name for name, found in seen.items() if found is None]
    words = ", ".join(f"{name} {found}" for name, found in seen.items() if found is not None)
    if missing:
        return PROBLEM, f"no {', '.join(missing)}", "pip install -c constraints.txt squall"
    return OK, f"Python {sys.version.split()[0]}, {words}", ""


def _processors() -> _Verdict:
    usable = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if _CPU_LIMIT.exists():
        quota, _, period = _CPU_LIMIT.read_text().partition(" ")
        if quota != "max":
            usable = min(usable, int(quota) / int(period))
    if usable < 2:
        return WARNING, f"{usable:g} cores", "the learner and the workers take turns; two cores or more are better"
    return OK, f"{usable:g} cores", ""


def _memory() -> _Verdict:
    free = available_memory()
    advice = "each process takes some 300 MB beside the replay: fewer --actors, a smaller replay_size, or more memory"
    verdict = OK if free >= _ENOUGH_MEMORY else WARNING if free >= _LITTLE_MEMORY else PROBLEM
    return verdict, f"{_gigabytes(free)} available", "" if verdict == OK else advice


def _shared_memory() -> _Verdict:
    if not Path("/dev/shm").exists():
        return OK, "no /dev/shm on this system", ""
    free = psutil.disk_usage("/dev/shm").free
    verdict = OK if free >= _ENOUGH_SHARED_MEMORY else WARNING if free >= LEAST_OBJECT_STORE else PROBLEM
    advice = "Ray keeps batches and weights there: in a container raise shm_size, to 2g for images"
    return verdict, f"{_gigabytes(free)} free in /dev/shm", "" if verdict == OK else advice


def _gpu() -> _Verdict:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return OK, f"{', '.join(names)}, with CUDA {torch.version.cuda}", ""
    if not Path("/proc/driver/nvidia").exists():
        return OK, "none: the learner trains on processors", ""
    if torch.version.cuda is None:
        advice = "install a CUDA build of PyTorch, see https://pytorch.org/get-started"
        return WARNING, f"an NVIDIA driver, but PyTorch {torch.__version__} is built without CUDA", advice
    return WARNING, "an NVIDIA driver, but PyTorch reaches no GPU", "look at CUDA_VISIBLE_DEVICES, and run nvidia-smi"


def _atari() -> _Verdict:
    from actors.environments import specify

    environment = specify("PongNoFrameskip-v4").make(1)
    try:
        environment.reset(seed=0)
        for _ in range(3):
            environment.step(environment.action_space.sample())
    finally:
        environment.close()
    return OK, "Pong plays", ""


def _loopback() -> _Verdict:
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=5),
        ):
            return OK, f"port {server.getsockname()[1]} of 127.0.0.1 answers", ""
    except OSError as error:
        return PROBLEM, f"no port of 127.0.0.1 answers: {error}", "a firewall is in the way of Ray's own connections"


def _check_runs_folder(host: str) -> Iterator[Finding]:
    folder = runs_dir()
    there = next(parent for parent in [folder, *folder.parents] if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            free = psutil.disk_usage(str(there)).free
    except OSError as error:
        yield Finding(host, "runs", PROBLEM, f"{there} cannot be written: {error}", "set SQUALL_HOME to another folder")
        return
    enough = free >= _ENOUGH_DISK
    advice = "" if enough else "checkpoints take room: set SQUALL_HOME to a folder on another disk"
    yield Finding(host, "runs", OK if enough else WARNING, f"{folder}, {_gigabytes(free)} free", advice)


def _look_at_store(url: str | None) -> Iterator[Finding]:
    try:
        with open_default_store(url) as store:
            began = time.monotonic()
            health = store.health()
            took = time.monotonic() - began
    except SquallError as error:
        advice = "start it, or name another with --store; a run goes on without its store, a start does not"
        yield Finding("store", "answers", PROBLEM, str(error), advice)
        return
    yield Finding("store", "answers", OK, f"{health.server}, in {1000 * took:.0f} ms")
    for warning in health.warnings:
        yield Finding("store", "keeps", WARNING, *warning.split(": ", 1))
    if health.clock is not None:
        yield _clock("store", health.clock - time.time(), took)


def _nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"]]


def _look_at_node(node: dict[str, Any], here: Machine) -> Iterator[Finding]:
    place = node["NodeManagerHostname"]
    task = ray.remote(num_cpus=0, max_retries=0)(look).options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    )
    began = time.time()
    reference = task.remote()
    try:
        seen: Machine = ray.get(reference, timeout=NODE_SECONDS)
    except Exception as error:  # of the worker, or none came
        ray.cancel(reference, force=True)
        reason = (str(error) or repr(error)).strip().splitlines()[-1]
        advice = "look whether Squall is installed there, the same version as here"
        yield Finding(f"worker on {place}", "starts", PROBLEM, reason, advice)
        return
    ended = time.time()
    yield from (Finding(f"worker on {place}", f.check, f.verdict, f.found, f.advice) for f in seen.findings)
    for package, found in seen.versions.items():
        if found != here.versions[package]:
            advice = "install the same on every node: what one pickles the other must read"
            text = f"{package} {found} there, {here.versions[package]} here"
            yield Finding(f"worker on {place}", "versions", PROBLEM, text, advice)
    # Its clock was read some time between, so only what lies outside of that is off.
    off = min(0.0, seen.clock - began) + max(0.0, seen.clock - ended)
    yield _clock(f"worker on {place}", off, 0.0)


def _clock(place: str, off: float, doubt: float) -> Finding:
    if abs(off) <= _SECONDS_OFF + doubt:
        return Finding(place, "clock", OK, f"within {_SECONDS_OFF:g} s of this machine's")
    advice = "runs would read lost that are not: set both clocks, with chrony or ntpd"
    return Finding(place, "clock", PROBLEM, f"{off:+.1f} s from this machine's", advice)


def _gigabytes(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
