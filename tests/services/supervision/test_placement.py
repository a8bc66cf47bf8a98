"""Placement of processes on example clusters, and errors for resources that a cluster lacks."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ray

from replay.errors import ConfigurationError
from services.config import resolve
from services.supervision.placement import (
    UNPLACED,
    Placement,
    cluster_cpus,
    memory_shortage,
    place,
    resource_shortage,
    spread,
)
from services.supervision.topology import plan


def node(name: str, cpus: float = 4.0, *, gpus: float = 0.0, head: bool = False, alive: bool = True) -> dict[str, Any]:
    resources = {"CPU": cpus} if cpus else {}
    resources |= {"GPU": gpus} if gpus else {}
    resources |= {"node:__internal_head__": 1.0} if head else {}
    return {"NodeID": name, "Alive": alive, "Resources": resources}


HEAD, ONE, TWO = node("a", head=True), node("b"), node("c")
WITH_GPU = node("d", gpus=1.0)


def test_on_one_machine_there_is_nothing_to_decide() -> None:
    placement = place([HEAD], learner_gpus=None, cpus_per_actor=0.0)
    assert placement == UNPLACED
    assert placement.beside_the_learner() == {}
    assert placement.for_learner() == {"num_gpus": 0}
    assert placement.for_worker(3, [HEAD]) == {}
    assert place([node("a", gpus=2.0, head=True)], learner_gpus=None, cpus_per_actor=0.0) == Placement(None, 1)
    assert place([node("a", gpus=2.0, head=True)], learner_gpus=0, cpus_per_actor=0.0) == Placement(None, 0)


def test_replay_and_learner_sit_together_on_the_head_or_where_the_gpu_is() -> None:
    assert place([ONE, HEAD, TWO], learner_gpus=None, cpus_per_actor=0.0) == Placement("a", 0)
    assert place([ONE, HEAD, WITH_GPU], learner_gpus=None, cpus_per_actor=0.0) == Placement("d", 1)
    assert place([ONE, HEAD, WITH_GPU], learner_gpus=0, cpus_per_actor=0.0) == Placement("a", 0)
    both = [WITH_GPU, node("a", gpus=1.0, head=True)]
    assert place(both, learner_gpus=1, cpus_per_actor=0.0) == Placement("a", 1)
    node_id = "ab" * 28  # as Ray writes a node's id
    strategy = Placement(node_id, 0).beside_the_learner()["scheduling_strategy"]
    assert (strategy.node_id, strategy.soft) == (node_id, True)


def test_workers_are_spread_in_proportion_to_cpus() -> None:
    def where(nodes: list[dict[str, Any]], workers: int) -> Counter[str | None]:
        return Counter(spread(worker, nodes, "a") for worker in range(workers))

    assert where([HEAD, ONE, TWO], 2) == {"b": 1, "c": 1}
    assert where([HEAD, ONE, TWO], 10) == {"a": 2, "b": 4, "c": 4}
    assert where([HEAD, ONE, node("c", 12.0)], 8) == {"b": 2, "c": 6}
    assert where([HEAD, ONE, node("c", alive=False)], 4) == {"a": 1, "b": 3}
    assert where([node("a", 0.0, head=True), ONE], 3) == {"b": 3}
    assert where([HEAD], 2) == {None: 2}
    options = Placement("a", 0, cpus_per_actor=1.0).for_worker(0, [HEAD, ONE])
    assert options == {"num_cpus": 1.0, "scheduling_strategy": "SPREAD"}


def test_a_worker_is_placed_where_one_after_the_other_would_put_it() -> None:
    cluster = [node("a", 8.0, head=True), node("b", 3.0), node("c", 64.0), node("d", 3.0), node("e", 1.0)]
    cpus = {node["NodeID"]: node["Resources"]["CPU"] for node in cluster}
    for learner_node in ("a", "e", None):
        busy = {name: 2.0 if name == learner_node else 0.0 for name in cpus}
        for worker in range(500):
            chosen = min(sorted(cpus), key=lambda name: (busy[name] + 1.0) / cpus[name])
            busy[chosen] += 1.0
            assert spread(worker, cluster, learner_node) == chosen, worker


def test_a_far_worker_is_placed_as_fast_as_a_near_one() -> None:
    # A loop over all workers of lower index would take hours.
    assert spread(10**9, [HEAD, ONE, TWO], "a") in ("a", "b", "c")


def test_what_the_cluster_lacks_is_refused() -> None:
    gpu = (
        "learner_gpus is 1, but none of the cluster's 2 nodes has a GPU; add a node with a GPU, or use --learner-gpus 0"
    )
    with pytest.raises(ConfigurationError, match=re.escape(gpu)):
        place([HEAD, ONE], learner_gpus=1, cpus_per_actor=0.0)
    with pytest.raises(ConfigurationError, match="cpus_per_actor is 5, but the cluster's largest node has 4 CPUs"):
        place([HEAD, ONE], learner_gpus=0, cpus_per_actor=5.0)
    # Where nodes may join, the run waits for them.
    empty = [node("a", 0.0, head=True)]
    assert place(empty, learner_gpus=None, cpus_per_actor=1.0, may_grow=True) == Placement(None, 0, 1.0)


def test_memory_bounds_workers_that_take_no_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    resources = {"CPU": 8.0, "memory": 4.0 * 2**30}
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    assert memory_shortage(13, 0.0) is None
    text = "14 actors need about 4.1 GiB of memory, 300 MiB each, and the cluster has 4.0 GiB: 13 actors"
    assert memory_shortage(14, 0.0) == text
    assert memory_shortage(10_000, 1.0) is None, "workers that reserve CPUs wait for them"
    del resources["memory"]
    assert memory_shortage(10_000, 0.0) is None, "the memory is unknown"


def test_a_gpu_shortage_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"GPU": 0.5})
    assert resource_shortage(1, "GPU") == "waiting for resources: needs 1 GPU, but 0.5 of the cluster's 2 are free"
    assert resource_shortage(0, "GPU") is None


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_the_resources_of_a_real_cluster() -> None:
    nodes = ray.nodes()
    assert place(nodes, learner_gpus=0, cpus_per_actor=2.0) == Placement(None, 0, 2.0)
    assert any("node:__internal_head__" in node["Resources"] for node in nodes)
    assert cluster_cpus() == 2
    assert resource_shortage(0.0) is None
    assert resource_shortage(3.0) == "waiting for resources: needs 3 CPU, but 2 of the cluster's 2 are free"


def test_the_learner_has_the_threads_it_is_given_or_those_that_workers_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    for threads, actors, expected in (("auto", 6, 2), ("auto", 8, 1), ("auto", 1, 4), (7, 8, 7)):
        config, _ = resolve("dqn", "CartPole-v1", overrides={"learner_threads": threads, "actors": actors})
        assert plan(config, "mine", Path())._learner_thread_count == expected
