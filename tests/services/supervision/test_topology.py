"""The topology: actor names of runs that share a cluster, early checks, and priorities of processes."""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from replay.errors import ConfigurationError
from replay.server import Counters
from services.config import resolve
from services.supervision.topology import Topology, plan


def topology(algorithm: str = "dqn", replay_shards: int = 2) -> Topology:
    config, _ = resolve(algorithm, "CartPole-v1", overrides={"replay_shards": replay_shards})
    return plan(config, "mine", Path("checkpoints"))


def names(of: Topology) -> list[str]:
    return [of._actor(role).name for role in ("weights", "replay", "replay-1")]


def test_every_driver_has_names_of_its_own() -> None:
    one, other = topology(), topology()
    assert not set(names(one)) & set(names(other)), "two drivers of the same run have different names"
    assert names(one) == names(one) == names(replace(one, actors=7)), "the names do not change while the driver lives"
    assert all(name.startswith("mine-") for name in names(one)), "for people"
    clients = pickle.loads(pickle.dumps(one._replay_client()))
    assert [clients._actor.name, clients._shards[1].name] == names(one)[1:], "a pickled client reaches the same actors"


@pytest.mark.parametrize(
    ("precision", "environment", "text"),
    [
        ("16-mixed", {}, "not in 16-mixed"),
        ("auto", {"CXX": "no-such-compiler"}, "there is no no-such-compiler on this machine"),
        ("auto", {"CXX": "no-such-compiler", "RAY_ADDRESS": "elsewhere:6379"}, None),
    ],
)
def test_updates_that_cannot_be_compiled_are_refused_before_anything_starts(
    precision: str, environment: dict[str, str], text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config, _ = resolve("dqn", "CartPole-v1", overrides={"precision": precision, "compile_updates": True})
    if text is None:
        plan(config, "mine", Path("checkpoints"))
    else:
        with pytest.raises(ConfigurationError, match=text):
            plan(config, "mine", Path("checkpoints"))


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_two_runs_of_one_name_do_not_meet_in_a_cluster() -> None:
    one, other = topology(), topology()
    handles = [each.start_weight_store() for each in (one, other)]
    try:
        found = [each._actor("weights").call("report", seconds=120.0)["pid"] for each in (one, other)]
        assert found == [report["pid"] for report in ray.get([handle.report.remote() for handle in handles])]
        assert found[0] != found[1]
    finally:
        for handle in handles:
            ray.kill(handle)


def niceness(handle: Any) -> dict[int, int]:
    """Return the niceness of each live thread of an actor's process, which includes Ray's threads."""
    pid, found = ray.get(handle.__ray_call__.remote(lambda _: os.getpid()), timeout=120.0), {}
    for thread in map(int, os.listdir(f"/proc/{pid}/task")):
        try:
            found[thread] = os.getpriority(os.PRIO_PROCESS, thread)
        except ProcessLookupError:
            continue
    return found


BESIDE: dict[str, Callable[[], Any]] = {
    "weights": lambda: topology().start_weight_store(),
    "replay": lambda: topology(replay_shards=1).start_replay(0, Counters(), 1.0, 0),
    "queue": lambda: topology("a2c", replay_shards=1).start_replay(0, Counters(), 1.0, 0),
    "router": lambda: topology().start_router(0, Counters(), 1.0, ()),
    "shard": lambda: topology().start_shard(0, 0, with_others=False),
    "worker": lambda: topology().start_worker(0, 0, 1),
    "on-policy worker": lambda: topology("a2c", replay_shards=1).start_worker(0, 0, 1),
    "evaluator": lambda: topology().start_evaluator(),
}


@pytest.mark.ray
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("start", BESIDE.values(), ids=BESIDE.keys())
def test_what_runs_beside_the_learner_gives_way(start: Callable[[], Any]) -> None:
    handle = start()
    try:
        wanted = max(15, os.getpriority(os.PRIO_PROCESS, 0))
        end = time.monotonic() + 20.0  # this call and the one that lowers the priority may run at the same time
        while set(niceness(handle).values()) != {wanted}:
            assert time.monotonic() < end, niceness(handle)
            time.sleep(0.05)
        # A thread that starts later, such as a worker's push thread.
        ray.get(handle.__ray_call__.remote(lambda _: threading.Thread(target=time.sleep, args=(5.0,)).start()))
        assert set(niceness(handle).values()) == {wanted}
    finally:
        ray.kill(handle)


@pytest.mark.ray
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.usefixtures("local_ray")
def test_the_learner_does_not_give_way() -> None:
    handle = topology().start_learner()
    try:
        niceness(handle)
        time.sleep(0.5)  # a call that lowers the priority would have ended by now
        assert set(niceness(handle).values()) == {os.getpriority(os.PRIO_PROCESS, 0)}
    finally:
        ray.kill(handle)
