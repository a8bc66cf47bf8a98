"""The cluster of docker-compose.yml: runs continue when containers die, and outlive the whole cluster.

The tests depend on each other, in the order of this file. The images are built from the shipped Dockerfile, on the base
images of the engine; an engine of SQUALL_ENGINE has substitutes of the official ones.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.compose import BIN, PROJECT, ROOT, Cluster, run

pytestmark = pytest.mark.timeout(1500)

GOAL = 475
SERVICES = ("redis", "ray-head", "ray-worker", "gateway", "tensorboard")
HEAD, REDIS = f"{PROJECT}-ray-head-1", f"{PROJECT}-redis-1"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    env_file = tmp_path_factory.mktemp("cluster") / "env"
    run("deploy/make-env", str(env_file))
    cluster = Cluster(env_file)
    cluster.build()
    try:
        cluster.up(*SERVICES)
        yield cluster
    finally:
        cluster.compose("down", "-v", "-t", "2", "--remove-orphans", timeout=300, check=False)


@pytest.fixture(autouse=True)
def logs_of_a_failure(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[None]:
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed > failed:
        print(cluster.logs())


def _submit(cluster: Cluster, folder: Path, line: str) -> subprocess.Popen[str]:
    """Start a shell command in the repository's root, with the variables of .env exported as the README describes."""
    shell = f"set -a; . {shlex.quote(str(cluster.env_file))}; set +a; PATH={shlex.quote(str(BIN))}:$PATH; exec {line}"
    with (folder / "submit.log").open("w") as log:
        return subprocess.Popen(
            cluster.with_ports("bash", "-c", shell),
            cwd=ROOT,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            text=True,
        )


def _finish(job: subprocess.Popen[str], folder: Path, seconds: float) -> None:
    try:
        assert job.wait(seconds) == 0, (folder / "submit.log").read_text()[-6000:]
    finally:
        job.kill()
        job.wait()


def _summary(cluster: Cluster, name: str) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(cluster.exec("ray-head", "cat", f"/runs/{name}/summary.json").stdout)
    return summary


def _workers(status: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        p for p in status.get("processes", ()) if p["role"] == "worker" and p["state"] not in ("starting", "leaving")
    ]


def test_published_ports_are_on_loopback_and_nothing_runs_as_root(cluster: Cluster) -> None:
    for container in cluster.containers():
        bindings = json.loads(run("docker", "inspect", "-f", "{{json .HostConfig.PortBindings}}", container).stdout)
        assert all(b["HostIp"] == "127.0.0.1" for port in (bindings or {}).values() for b in port), (
            container,
            bindings,
        )
    seen = cluster.exec(
        "ray-head", "sh", "-c", "id -u; touch ~/writable /runs/writable && rm /runs/writable; command -v pip gcc"
    )
    assert seen.stdout.split()[0] == "1000"
    assert "/opt/squall" not in seen.stdout
    assert cluster.env_file.stat().st_mode & 0o077 == 0


def test_a_submitted_run_goes_on_when_a_worker_and_redis_are_killed(cluster: Cluster, tmp_path: Path) -> None:
    cluster.wait_for_nodes(3)
    job = _submit(
        cluster,
        tmp_path,
        "ray job submit --address http://127.0.0.1:8265 --working-dir . -- squall train dqn CartPole-v1 --actors 4 "
        f"--name first --stop-at-return {GOAL} --set eval_every=10000 --steps 200000",
    )
    status = cluster.wait_for("first", lambda s: len(_workers(s)) == 4, 300)
    assert len({worker["node"] for worker in _workers(status)}) > 1
    for actors in (2, 5, 1):
        cluster.exec("ray-head", "squall", "scale", "first", "--actors", str(actors))
        cluster.wait_for("first", lambda s, n=actors: len(_workers(s)) == s["actors"] == n, 120)

    [worker] = _workers(status := cluster.status("first"))
    container = cluster.container_of(worker["node"])
    if container == HEAD:
        container = f"{PROJECT}-ray-worker-1"
    started = cluster.started(container)
    cluster.kill9(container)
    steps = status["env_steps"]
    if container == cluster.container_of(worker["node"]):
        cluster.wait_for("first", lambda s: any(w["restarts"] for w in _workers(s)) and s["env_steps"] > steps, 240)
    cluster.exec("ray-head", "squall", "scale", "first", "--actors", "3")

    steps = cluster.wait_for("first", lambda s: s["env_steps"] > steps, 240)["env_steps"]
    redis_started = cluster.started(REDIS)
    cluster.kill9(REDIS)
    cluster.wait_until_restarted(REDIS, redis_started)
    cluster.wait_for("first", lambda s: s["env_steps"] > steps, 240)

    _finish(job, tmp_path, 900)
    cluster.wait_until_restarted(container, started)
    assert cluster.status("first")["state"] == "finished"
    summary = _summary(cluster, "first")
    assert summary["stopped_because"] == "return", summary
    kinds = [event["kind"] for event in cluster.status("first")["events"]]
    assert kinds.count("scale") >= 4
    assert "end" in kinds


def test_a_run_whose_head_is_killed_reads_lost_and_is_resumed(cluster: Cluster, tmp_path: Path) -> None:
    squall = f"squall submit --env-file {shlex.quote(str(cluster.env_file))}"
    line = f"{squall} -- train dqn CartPole-v1 --name second --steps 200000"
    job = _submit(cluster, tmp_path, line)
    try:
        has_checkpoint = ("ray-head", "test", "-f", "/runs/second/checkpoints/last.ckpt")
        cluster.wait_for("second", lambda s: s.get("updates", 0) > 500, 300)
        end = time.monotonic() + 120
        while cluster.exec(*has_checkpoint, check=False).returncode != 0:
            assert time.monotonic() < end, "no checkpoint"
            time.sleep(1)
        started = cluster.started(HEAD)
        cluster.kill9(HEAD)
        cluster.wait_for("second", lambda s: s["state"] == "lost", 120, "ray-worker")
        cluster.wait_until_restarted(HEAD, started)
        assert job.wait(300) != 0, (tmp_path / "submit.log").read_text()
    finally:
        job.kill()
        job.wait()

    cluster.up(*SERVICES)  # returns when all nodes are healthy again
    before = cluster.status("second")
    assert before["state"] == "lost"
    job = _submit(cluster, tmp_path, f"{squall} -- train --resume second --stop-at-return {GOAL}")
    _finish(job, tmp_path, 600)
    log = (tmp_path / "submit.log").read_text()
    assert "exit status 0" in log
    after = _summary(cluster, "second")
    assert after["stopped_because"] == "return"
    assert after["env_steps"] > 1000


def test_runs_and_checkpoints_outlive_the_cluster(cluster: Cluster) -> None:
    cluster.compose("down", "-t", "20", timeout=300)
    assert cluster.containers() == []
    cluster.up(*SERVICES)
    runs = json.loads(cluster.exec("ray-head", "squall", "runs", "--json").stdout)
    assert {run["name"]: run["state"] for run in runs} == {"first": "finished", "second": "finished"}
    played = cluster.exec("ray-worker", "squall", "evaluate", "first", "--episodes", "10", "--json").stdout
    assert json.loads(played)["return_mean"] > 400
    boards = run(*cluster.with_ports("curl", "-sf", "http://127.0.0.1:6006/data/runs")).stdout
    assert {"first/tensorboard", "second/tensorboard"} <= set(json.loads(boards))


def test_the_gateway_answers(cluster: Cluster) -> None:
    code = (
        "import grpc, sys; from grpc_health.v1 import health_pb2 as m, health_pb2_grpc as g;"
        "print(g.HealthStub(grpc.insecure_channel('127.0.0.1:50051')).Check(m.HealthCheckRequest(), timeout=20))"
    )
    assert "SERVING" in run(*cluster.with_ports(f"{BIN}/python", "-c", code)).stdout
