"""Checks of docker-compose.yml and the files under deploy/ that need no cluster."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from services.supervision import ray_environment

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SECRETS = {"REDIS_PASSWORD", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "SQUALL_GRPC_TOKEN", "GRAFANA_PASSWORD"}
MANIFESTS = ("raycluster.yaml", "rayjob.yaml")


def _make_env(file: Path, path: str = os.defpath) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DEPLOY / "make-env", file], capture_output=True, text=True, check=False, timeout=60, env={"PATH": path}
    )


def test_make_env_makes_fresh_secrets_for_their_owner_alone_and_never_overwrites(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert _make_env(first).returncode == _make_env(second).returncode == 0
    values = dict(line.split("=", 1) for line in first.read_text().splitlines())
    assert values.keys() == SECRETS
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    secrets = {name: value for name, value in values.items() if name != "RAY_AUTH_MODE"}
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in secrets.values())
    assert not set(secrets.values()) & {line.split("=", 1)[1] for line in second.read_text().splitlines()}
    before = first.read_text()
    again = _make_env(first)
    assert again.returncode == 1
    assert str(first) in again.stderr
    assert first.read_text() == before


@pytest.mark.parametrize("od", ["exit 1", "echo 00ff"])
def test_make_env_writes_nothing_without_random_bytes(tmp_path: Path, od: str) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "od").write_text(f"#!/bin/sh\n{od}\n")
    (programs / "od").chmod(0o755)
    done = _make_env(tmp_path / "env", f"{programs}:{os.defpath}")
    assert done.returncode == 1
    assert "wrote nothing" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "env").exists()


def test_make_env_does_not_write_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "env").symlink_to(tmp_path / "elsewhere")
    assert _make_env(tmp_path / "env").returncode == 1
    assert not (tmp_path / "elsewhere").exists()


@pytest.fixture
def ray_defaults(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return the variables that Squall sets for a Ray that it starts itself."""
    wanted = ("RAY_worker_niceness", "RAY_max_direct_call_object_size")
    for name in list(os.environ):
        if name.startswith("RAY_"):
            monkeypatch.delenv(name)
    before = dict(os.environ)
    ray_environment.set_ray_defaults()
    found = {name: os.environ[name] for name in wanted}
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    return found


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return content


def test_compose_publishes_on_loopback_only_and_restarts_everything(compose: dict[str, Any]) -> None:
    wanted = {"redis", "ray-head", "ray-worker", "gateway", "tensorboard", "prometheus", "grafana"}
    assert compose["services"].keys() == wanted
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["restart"] == "unless-stopped", name
        assert service.get("healthcheck"), name
    optional = {name for name, service in compose["services"].items() if "profiles" in service}
    assert optional == {"prometheus", "grafana"}
    for service in ("ray-head", "ray-worker"):
        options = dict(part.split("=") for part in compose["services"][service]["command"] if "=" in part)
        assert int(options["--object-store-memory"]) < 2 * 2**30
        assert compose["services"][service]["shm_size"] == "2gb"


def test_compose_builds_its_image_once_and_pulls_it_from_nowhere(compose: dict[str, Any]) -> None:
    ours = {name: service for name, service in compose["services"].items() if service["image"] == "squall"}
    assert ours.keys() == {"ray-head", "ray-worker", "gateway", "tensorboard"}
    assert {service["pull_policy"] for service in ours.values()} == {"never"}
    assert [name for name, service in compose["services"].items() if "build" in service] == ["ray-head"]


def test_compose_takes_every_secret_from_the_environment_and_fails_without(compose: dict[str, Any]) -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    used = set(re.findall(r"\$\{(\w+)", text))
    assert used == SECRETS
    assert len(re.findall(r"\$\{\w+:\?", text)) == text.count("${")
    ignored = subprocess.run(["git", "check-ignore", ".env"], cwd=ROOT, capture_output=True, check=False, timeout=20)
    assert ignored.returncode == 0 or not (ROOT / ".git").exists()
    assert ".env" in (ROOT / ".rayignore").read_text().splitlines()


def test_the_board_shows_all_metrics_and_its_source_is_provisioned(compose: dict[str, Any]) -> None:
    board = json.loads((DEPLOY / "grafana/dashboards/squall.json").read_text())
    [source] = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    [provider] = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/squall.yml").read_text())["providers"]
    mounts = [volume.split(":")[1] for volume in compose["services"]["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounts
    assert {target["datasource"]["uid"] for panel in board["panels"] for target in panel["targets"]} == {source["uid"]}
    [job] = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert all(name in compose["services"] for name in job["dns_sd_configs"][0]["names"])
    for service in job["dns_sd_configs"][0]["names"]:
        port = job["dns_sd_configs"][0]["port"]
        assert f"--metrics-export-port={port}" in compose["services"][service]["command"]


def test_a_cluster_of_containers_is_set_as_one_of_our_own(
    compose: dict[str, Any], ray_defaults: dict[str, str]
) -> None:
    for service in ("ray-head", "ray-worker"):
        environment = compose["services"][service]["environment"]
        assert {name: environment.get(name) for name in ray_defaults} == ray_defaults, service
    options = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())["docker"]["run_options"]
    assert {f"--env {name}={value}" for name, value in ray_defaults.items()} <= set(options)
    for manifest in MANIFESTS:
        for group, pod in _groups(_specification(manifest)):
            environment = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
            assert {name: environment.get(name) for name in ray_defaults} == ray_defaults, (manifest, group)


def test_the_launcher_file_fits_rays_schema() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    cluster = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "no_such_key": 1}, schema)


def _specification(name: str) -> dict[str, Any]:
    documents = list(yaml.safe_load_all((DEPLOY / "kuberay" / name).read_text()))
    [found] = [document for document in documents if document["kind"] in ("RayCluster", "RayJob")]
    assert found["apiVersion"] == "ray.io/v1"
    specification: dict[str, Any] = found["spec"]
    return specification.get("rayClusterSpec", specification)


def _groups(specification: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for group in (specification["headGroupSpec"], *specification["workerGroupSpecs"]):
        yield group, group["template"]["spec"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_have_image_token_home_and_shared_memory(name: str) -> None:
    specification = _specification(name)
    assert specification["rayVersion"] == ray.__version__
    assert specification["authOptions"] == {"mode": "token", "secretName": "squall"}
    for group, pod in _groups(specification):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        [container] = pod["containers"]
        assert "/squall:" in container["image"]
        environment = {entry["name"]: entry for entry in container["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        for secret in ("RAY_AUTH_TOKEN", "SQUALL_STORE", "SQUALL_GRPC_TOKEN"):
            assert environment[secret]["valueFrom"]["secretKeyRef"]["name"] == "squall"
            assert "value" not in environment[secret]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert mounts[environment["SQUALL_HOME"]["value"]]["persistentVolumeClaim"]["claimName"] == "squall-runs"


@pytest.mark.parametrize("name", MANIFESTS)
def test_cpu_workers_are_autoscaled_and_one_learner_has_a_gpu(name: str) -> None:
    specification = _specification(name)
    assert specification["enableInTreeAutoscaling"] is True
    groups = {group["groupName"]: group for group in specification["workerGroupSpecs"]}
    assert groups.keys() == {"learner", "rollout"}
    assert (groups["learner"]["minReplicas"], groups["learner"]["maxReplicas"]) == (1, 1)
    assert groups["rollout"]["minReplicas"] == 0
    assert groups["rollout"]["maxReplicas"] > 1
    for group, gpus in (("learner", "1"), ("rollout", None)):
        [container] = groups[group]["template"]["spec"]["containers"]
        assert container["resources"]["limits"].get("nvidia.com/gpu") == gpus


def test_the_job_runs_a_command_that_squall_understands_and_takes_its_cluster_down() -> None:
    [job] = yaml.safe_load_all((DEPLOY / "kuberay/rayjob.yaml").read_text())
    arguments = job["spec"]["entrypoint"].split()
    assert arguments[:2] == ["squall", "train"]
    assert arguments[-2:] == ["--cpus-per-actor", "1"]
    assert job["spec"]["shutdownAfterJobFinishes"] is True
