"""Imports go one way, replay <- actors <- learner <- services, and heavy libraries stay behind their fences.

Every import counts, at module level, in a function, under TYPE_CHECKING or through importlib.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("replay", "actors", "learner", "services")

# Who may import a library: files, or folders with their slash. Libraries not named here are free.
FENCES = {
    "ray": (
        "replay/remote.py",
        "replay/server.py",
        "replay/sharded_client.py",
        "actors/weights.py",
        "actors/rollout.py",
        "actors/evaluation.py",
        "learner/training.py",
        "services/program.py",
        "services/ray_session.py",
        "services/replay_group.py",
        "services/processes.py",
        "services/scoring.py",
        "services/coordinator.py",
        "services/placement.py",
        "services/metrics.py",
        "services/doctor.py",
        "services/submission.py",
        "services/cli.py",
    ),
    "matplotlib": ("services/plotting.py",),
    "torch": ("actors/", "learner/", "services/"),
    "pytorch_lightning": ("learner/", "services/"),
    "lightning": (),  # the same library under its other name
}


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and absolute module name; a relative import cannot leave its room."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield node.lineno, module
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield node.lineno, module


def violations(root: Path) -> list[str]:
    """Return `file:line: what is wrong` for every import that crosses an arrow or a fence."""
    found = []
    for position, room in enumerate(ROOMS):
        for path in sorted((root / room).rglob("*.py")):
            file = path.relative_to(root).as_posix()
            for line, module in imports(path.read_text(encoding="utf-8")):
                package = module.partition(".")[0]
                if package in ROOMS[position + 1 :]:
                    found.append(f"{file}:{line}: {room} must not import {package}")
                elif package in FENCES and not file.startswith(FENCES[package]):
                    found.append(f"{file}:{line}: {package} is fenced off here")
    return found


def write(root: Path, file: str, source: str) -> None:
    path = root / file
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")


@pytest.mark.parametrize("room", ROOMS)
def test_room_is_the_real_package(room: str) -> None:
    spec = importlib.util.find_spec(room)
    assert spec is not None
    assert spec.origin == str(ROOT / room / "__init__.py")


def test_imports_go_one_way() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("replay/table.py", "import actors", "1: replay must not import actors"),
        ("replay/table.py", "import numpy, services.cli", "1: replay must not import services"),
        ("actors/rollout.py", "\nfrom learner.training import fit", "2: actors must not import learner"),
        ("actors/rollout.py", "importlib.import_module('learner.x')", "1: actors must not import learner"),
        ("actors/rollout.py", "__import__('learner')", "1: actors must not import learner"),
        ("learner/algorithms/dqn.py", "def f():\n import services", "2: learner must not import services"),
        ("learner/algorithms/dqn.py", "def f():\n from ray.util import queue", "2: ray is fenced off here"),
        ("learner/training.py", "import lightning.pytorch", "1: lightning is fenced off here"),
        ("actors/policies.py", "import pytorch_lightning as pl", "1: pytorch_lightning is fenced off here"),
        ("replay/table.py", "import torch.nn", "1: torch is fenced off here"),
    ],
)
def test_a_violation_is_found(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    write(tmp_path, file, source)
    assert violations(tmp_path) == [f"{file}:{complaint}"]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("replay/server.py", "import ray\nfrom replay.table import TransitionTable"),
        ("actors/rollout.py", "import replay, torch, ray.util\nfrom .segments import Lane"),
        ("learner/algorithms/dqn.py", "import pytorch_lightning\nimport actors\nfrom ..presets import x"),
        ("services/cli.py", "import ray, replay, actors, learner, services.config"),
    ],
)
def test_an_allowed_import_is_no_violation(tmp_path: Path, file: str, source: str) -> None:
    write(tmp_path, file, source)
    assert violations(tmp_path) == []
