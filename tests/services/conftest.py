"""Fixtures that start real runs and leave none of their processes behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.services.running import Run, Start


@contextmanager
def _starting(folder: Path) -> Iterator[Start]:
    runs: list[Run] = []

    def start_run(name: str, *arguments: str) -> Run:
        named = arguments if "--resume" in arguments else (*arguments, "--name", name)
        runs.append(Run(folder / "runs", name, *named))
        return runs[-1]

    yield start_run
    for run in runs:
        run.kill_everything()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a run; kill all processes of these runs at the end of the test."""
    with _starting(tmp_path) as started:
        yield started


@pytest.fixture(scope="module")
def start_for_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """As `start`, for runs that several tests of a module look at: a start takes longer than most looks."""
    with _starting(tmp_path_factory.mktemp("module")) as started:
        yield started
