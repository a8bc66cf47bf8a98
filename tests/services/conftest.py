"""Fixture that starts real runs and leaves none of their processes behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.running import Run, Start


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a run; kill all processes of these runs at the end of the test."""
    runs: list[Run] = []

    def start_run(name: str, *arguments: str) -> Run:
        named = arguments if "--resume" in arguments else (*arguments, "--name", name)
        runs.append(Run(tmp_path / "runs", name, *named))
        return runs[-1]

    yield start_run
    for run in runs:
        run.kill_everything()
