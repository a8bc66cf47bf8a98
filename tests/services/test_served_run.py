"""A real run served over gRPC through a real gateway: its policy, commands, and a killed endpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from services.client.run_client import SquallClient
from services.errors import CommandRefused, NotReady, RunIsNotLive
from tests.services.running import SQUALL, Run, environment

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

OBSERVATION = np.zeros((2, 4), np.float32)
SMALL = (
    "dqn", "CartPole-v1", "--steps", "1000000", "--actors", "1", "--set", "warm_start_size=500",
    "--set", "eval_every=0", "--set", "publish_every=50",
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path / "runs", "served", *SMALL, "--serve", "--name", "served")
    yield run
    run.kill_everything()


@pytest.fixture
def client(run: Run) -> Iterator[SquallClient]:
    gateway = subprocess.Popen(
        [*SQUALL, "gateway", "--address", "127.0.0.1:0", "--json"],
        env=environment(run.home), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert gateway.stdout is not None
        address = json.loads(gateway.stdout.readline())["address"]
        with SquallClient(address) as client:
            yield client
        gateway.send_signal(signal.SIGTERM)
        assert gateway.wait(30) == 0
    finally:
        gateway.kill()
        gateway.communicate()


def weights_of(client: SquallClient, beyond: int, seconds: float = 240) -> int:
    """Act until the weights are newer than version `beyond`; return the version."""
    end = time.monotonic() + seconds
    while True:
        try:
            version = client.act(OBSERVATION, "served").weights_version
            if version > beyond:
                return version
            reason = f"version {version}"
        except NotReady as error:
            reason = str(error)
        assert time.monotonic() < end, reason
        time.sleep(0.1)


def test_a_live_run_is_asked_and_commanded_over_grpc(run: Run, client: SquallClient) -> None:
    status = run.wait_for(lambda s: s["state"] == "running" and s["updates"] > 0, seconds=240)
    endpoint = next(process for process in status["processes"] if process["role"] == "endpoint")
    assert endpoint["last_word"].startswith("serves Policy, Experience on 127.0.0.1:")
    description = client.describe("served")
    assert (description.algorithm, description.environment) == ("dqn", "CartPole-v1")
    first = weights_of(client, -1)
    assert weights_of(client, first + 1) > first

    scaled = client.scale("served", 2)
    assert (scaled.before, scaled.actors) == (1, 2)
    with pytest.raises(CommandRefused, match="actors must be auto or a whole number"):
        client.scale("served", -3)
    assert Path(client.checkpoint("served").checkpoint).exists()
    seen = next(client.watch("served"))
    assert (seen.run.name, seen.run.state, seen.actors) == ("served", "running", 2)

    os.kill(endpoint["pid"], signal.SIGKILL)
    status = run.wait_for(
        lambda s: any(p["role"] == "endpoint" and p["restarts"] == 1 and p["pid"] for p in s["processes"]), seconds=240
    )
    again = next(process for process in status["processes"] if process["role"] == "endpoint")
    assert again["last_word"] == endpoint["last_word"], "the endpoint has the same address again"
    # The new process starts with the newest weights, not with those of the old one.
    assert weights_of(client, first + 1) > first

    client.stop("served")
    assert [update.run.state for update in client.watch("served")][-1] == "finished"
    assert run.finish(60)["stopped_because"] == "stopped"
    with pytest.raises(RunIsNotLive, match="squall serve served"):
        client.act(OBSERVATION, "served")
    assert run.leftovers() == []
