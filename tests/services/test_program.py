"""The topology: two programs of one run name in one Ray cluster are strangers."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from services.config import resolve
from services.program import Program, plan


def program() -> Program:
    config, _ = resolve("dqn", "CartPole-v1", overrides={"replay_shards": 2})
    return plan(config, "mine", Path("checkpoints"))


def names(of: Program) -> list[str]:
    return [of._actor(role).name for role in ("weights", "replay", "replay-1")]


def test_every_driver_has_names_of_its_own() -> None:
    one, other = program(), program()
    assert not set(names(one)) & set(names(other)), "each may be a driver's, of the same run"
    assert names(one) == names(one) == names(replace(one, actors=7)), "for as long as the driver lives"
    assert all(name.startswith("mine-") for name in names(one)), "for people"
    clients = pickle.loads(pickle.dumps(one._replay_client()))
    assert [clients._actor.name, clients._shards[1].name] == names(one)[1:], "who is told a name finds that very actor"


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_two_runs_of_one_name_do_not_meet_in_a_cluster() -> None:
    one, other = program(), program()
    handles = [each.start_weight_store() for each in (one, other)]
    try:
        found = [each._actor("weights").call("report", seconds=120.0)["pid"] for each in (one, other)]
        assert found == [report["pid"] for report in ray.get([handle.report.remote() for handle in handles])]
        assert found[0] != found[1]
    finally:
        for handle in handles:
            ray.kill(handle)
