"""A local Ray, started once, for the tests that are marked `ray`; and an interrupt that interrupts."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from replay.remote import NAMESPACE

ROOT = Path(__file__).resolve().parents[1]

# What a shell starts in the background ignores this signal, and so would the runs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Start a Ray whose workers find this checkout, unless one is up already."""
    if ray.is_initialized():
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_max_direct_call_object_size", str(2**20))
        patch.setenv("PYTHONPATH", str(ROOT))
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):  # of a command line that was tried in this process before
            patch.delenv(name, raising=False)
        ray.init(
            address="local",
            namespace=NAMESPACE,
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            logging_level="ERROR",
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def _ray_before_grpc(request: pytest.FixtureRequest) -> None:
    """Start Ray before the first test if any test needs it: beside the threads that gRPC leaves it does not start."""
    if any("local_ray" in item.fixturenames for item in request.session.items if isinstance(item, pytest.Function)):
        request.getfixturevalue("local_ray")
