"""A real run whose store is a Redis server that is killed and restarted, observed from another machine."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from services.store.redis import RedisRunStore
from tests.services.redis_server import RedisServer
from tests.services.running import Run, squall

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

SMALL = ("--set", "warm_start_size=500", "--set", "eval_episodes=2", "--set", "eval_every=1000", "--actors", "1")


def test_a_run_outlives_its_store_and_reports_everything_later(tmp_path: Path) -> None:
    elsewhere = tmp_path / "another-machine"
    with RedisServer(tmp_path, "--requirepass", "hunter2") as server:
        url = server.url.replace("//", "//:hunter2@")
        arguments = ("dqn", "CartPole-v1", *SMALL, "--steps", "1000000", "--name", "far")
        run = Run(tmp_path / "runs", "far", *arguments, store=url)
        try:
            run.wait_for(lambda s: s["state"] == "running" and s["updates"] > 0)
            listed = json.loads(squall(elsewhere, "runs", "--store", url, "--json").stdout)
            assert [(row["name"], row["state"]) for row in listed] == [("far", "running")]

            server.stop(signal.SIGKILL)
            done = squall(elsewhere, "status", "far", "--store", url)
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
            assert "hunter2" not in done.stderr
            time.sleep(3)
            assert run.process.poll() is None
            server.start()

            with RedisRunStore(url) as store:
                before = max((row.step for row in store.metrics("far")), default=0)
                run.wait_for(lambda s: s["state"] == "running" and s["env_steps"] > before + 3000)
                done = squall(elsewhere, "stop", "far", "--store", url)
                assert done.returncode == 0, done.stderr
                summary = run.finish(120)
                assert summary["stopped_because"] == "stopped"
                record = store.get("far")
                assert (record.state, record.stopped_because) == ("finished", "stopped")
                assert [event.id for event in store.events("far")] == list(range(1, len(store.events("far")) + 1))
                kinds = [event.kind for event in store.events("far")]
                assert (kinds[0], kinds[-1], kinds.count("end")) == ("start", "end", 1)
                rows = store.metrics("far")
            steps = [row.step for row in rows if "eval/mean_reward" in row.values]
            assert len(steps) == len(set(steps))
            assert _tensorboard_values(tmp_path / "runs" / "far" / "tensorboard") == sum(
                len(row.values) for row in rows
            )
            assert run.leftovers() == []
            written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
            assert not [path for path in written if b"hunter2" in path.read_bytes()]
            assert "hunter2" not in json.dumps(record.config)
            assert not elsewhere.exists()
        finally:
            run.kill_everything()


def _tensorboard_values(folder: Path) -> int:
    """Return the number of values that the run wrote for TensorBoard, which needs no store."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    board.Reload()
    return sum(len(board.Scalars(tag)) for tag in board.Tags()["scalars"])
