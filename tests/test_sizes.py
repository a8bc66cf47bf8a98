"""Packages, modules, and functions stay small enough to read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ("squall_pb2.py", "squall_pb2_grpc.py")
MAX_MODULES, MAX_LINES, MAX_FUNCTION_LINES = 18, 400, 60

MODULES = [
    path
    for package in ("replay", "actors", "learner", "services", "docs", "tests")
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.name not in GENERATED
]


def long_functions(source: str) -> list[str]:
    """Return `name: lines` of each function that is too long; `add_to` is a table of a command's arguments."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds) and node.name != "add_to"]
    lines = ((node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in functions)
    return [f"{name}: {count}" for name, count in lines if count > MAX_FUNCTION_LINES]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_and_its_functions_are_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= MAX_LINES
    assert long_functions(source) == []


def test_no_package_has_too_many_modules() -> None:
    counts: dict[str, int] = {}
    for path in MODULES:
        if not path.is_relative_to(ROOT / "tests"):
            folder = path.parent.relative_to(ROOT).as_posix()
            counts[folder] = counts.get(folder, 0) + 1
    assert {folder: count for folder, count in counts.items() if count > MAX_MODULES} == {}


def test_a_long_function_is_found() -> None:
    body = "\n".join("    pass" for _ in range(MAX_FUNCTION_LINES))
    assert long_functions(f"def long():\n{body}") == ["long: 61"]
