"""Fixtures: one PyTorch thread, which is fastest for small networks, a quiet Lightning, and a learner that waits."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from learner.learner import LearnerReport
from tests.learner.runs import LearnerRun, Pool, eventually


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _quiet_lightning() -> Iterator[None]:
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.fixture
def background() -> Iterator[Pool]:
    """Yield a function that runs another in a thread; at the end of the test, wait for all threads."""
    with ThreadPoolExecutor(8) as pool:
        yield lambda function: pool.submit(function)


@pytest.fixture
def waiting(tmp_path: Path, background: Pool) -> Iterator[tuple[LearnerRun, Future[LearnerReport]]]:
    """A learner during its fit, whose replay is empty."""
    run = LearnerRun(tmp_path, updates=None)
    fit = background(run.fit)
    try:
        assert eventually(lambda: run.learner.report().state == "waiting" or fit.done())
        yield run, fit
    finally:
        run.learner.stop()
