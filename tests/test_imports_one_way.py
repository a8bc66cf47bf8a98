"""Imports go one way between packages and between the rooms of `services`; heavy libraries stay where they belong.

Every import counts: at module level, in a function, under TYPE_CHECKING, or through importlib.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("replay", "actors", "learner", "services")

# Room -> rooms it may import. The modules beside the rooms (config, errors, runs) are rooms of their own.
ROOMS: dict[str, tuple[str, ...]] = {
    "services.errors": (),
    "services.config": ("services.errors",),
    "services.store": ("services.errors",),
    "services.rpc": ("services.errors", "services.store"),
    "services.client": ("services.errors", "services.rpc"),
    "services.supervision": ("services.errors", "services.config", "services.store", "services.rpc"),
    "services.runs": ("services.errors", "services.config", "services.store", "services.rpc", "services.supervision"),
    "services.cli": (
        "services.errors",
        "services.config",
        "services.store",
        "services.rpc",
        "services.supervision",
        "services.runs",
    ),
    "services.experience_client": ("services.client",),
    "replay.sharding": ("replay",),
}
# Rooms that the modules around them must not import.
INNER = ("replay.sharding",)

# Who may import a library: files, or folders with their slash. Libraries not named here are free.
FENCES = {
    "ray": (
        "replay/remote.py",
        "replay/client.py",
        "replay/sharding/client.py",
        "actors/weights.py",
        "learner/learner.py",
        "services/supervision/",
        "services/cli/machine_checks.py",
        "services/cli/job_server.py",
    ),
    "matplotlib": ("services/cli/curves.py",),
    "torch": ("actors/", "learner/", "services/"),
    "pytorch_lightning": ("learner/", "services/"),
    "lightning": (),  # the same library under its other name
}


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and absolute module name; a relative import cannot leave its package."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=str(module), level=0, names=names):
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield node.lineno, module


def room_of(module: str) -> str | None:
    """Return the room that a module's dotted name lies in, or None."""
    return next((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), None)


def violations(root: Path) -> list[str]:
    """Return `file:line: what is wrong` for every import that crosses an arrow or a fence."""
    found: list[str] = []
    for position, package in enumerate(PACKAGES):
        for path in sorted((root / package).rglob("*.py")):
            file = path.relative_to(root).as_posix()
            room = room_of(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
            for line, module in imports(path.read_text(encoding="utf-8")):
                top, other = module.partition(".")[0], room_of(module)
                if top in PACKAGES[position + 1 :]:
                    complaint = f"{package} must not import {top}"
                elif top in FENCES and not file.startswith(FENCES[top]):
                    complaint = f"{top} is fenced off here"
                elif top == package and room and other and other != room and other not in ROOMS[room]:
                    complaint = f"{room} must not import {other}"
                elif top == package and not room and other in INNER:
                    complaint = f"{package} must not import {other}"
                else:
                    continue
                if f"{file}:{line}: {complaint}" not in found:
                    found.append(f"{file}:{line}: {complaint}")
    return found


def write(root: Path, file: str, source: str) -> None:
    path = root / file
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_the_real_package(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin == str(ROOT / package / "__init__.py")


def test_imports_go_one_way() -> None:
    assert violations(ROOT) == []


def test_every_room_is_there_and_every_module_of_services_is_in_one() -> None:
    for room in ROOMS:
        assert importlib.util.find_spec(room) is not None, room
    for path in (ROOT / "services").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        assert module == "services" or room_of(module) is not None, module


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("replay/table.py", "import actors", "1: replay must not import actors"),
        ("replay/table.py", "import numpy, services.cli", "1: replay must not import services"),
        ("replay/table.py", "from replay.sharding import router", "1: replay must not import replay.sharding"),
        ("actors/rollout.py", "\nfrom learner.learner import fit", "2: actors must not import learner"),
        ("actors/rollout.py", "importlib.import_module('learner.x')", "1: actors must not import learner"),
        ("actors/rollout.py", "__import__('learner')", "1: actors must not import learner"),
        ("learner/algorithms/dqn.py", "def f():\n import services", "2: learner must not import services"),
        ("learner/algorithms/dqn.py", "def f():\n from ray.util import queue", "2: ray is fenced off here"),
        ("learner/learner.py", "import lightning.pytorch", "1: lightning is fenced off here"),
        ("actors/policies.py", "import pytorch_lightning as pl", "1: pytorch_lightning is fenced off here"),
        ("replay/table.py", "import torch.nn", "1: torch is fenced off here"),
        (
            "services/runs.py",
            "from services.cli.display import Display",
            "1: services.runs must not import services.cli",
        ),
        ("services/runs.py", "from services import cli", "1: services.runs must not import services.cli"),
        (
            "services/rpc/policy.py",
            "from services.supervision import topology",
            "1: services.rpc must not import services.supervision",
        ),
        (
            "services/client/run_client.py",
            "import services.supervision.topology",
            "1: services.client must not import services.supervision",
        ),
        (
            "services/store/base.py",
            "from services.config import x",
            "1: services.store must not import services.config",
        ),
    ],
)
def test_a_violation_is_found(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    write(tmp_path, file, source)
    assert violations(tmp_path) == [f"{file}:{complaint}"]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("replay/client.py", "import ray\nfrom replay.table import TransitionTable"),
        ("replay/sharding/router.py", "from replay.table import TransitionTable"),
        ("actors/rollout.py", "import replay, torch\nfrom .segments import Lane"),
        ("learner/algorithms/dqn.py", "import pytorch_lightning\nimport actors\nfrom ..presets import x"),
        ("services/cli/train.py", "import replay, actors, learner, services.config"),
        ("services/supervision/topology.py", "import ray\nfrom services.rpc.endpoint import Endpoint"),
    ],
)
def test_an_allowed_import_is_no_violation(tmp_path: Path, file: str, source: str) -> None:
    write(tmp_path, file, source)
    assert violations(tmp_path) == []


def test_import_squall_imports_nothing_heavy() -> None:
    heavy = ("torch", "ray", "pytorch_lightning", "gymnasium", "numpy", "grpc", "matplotlib")
    source = f"import squall, sys; print(*(name for name in {heavy} if name in sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == []


def test_every_public_name_is_there() -> None:
    import squall

    for name in squall.__all__:
        assert getattr(squall, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'PPO'; it has"):
        squall.PPO  # noqa: B018
