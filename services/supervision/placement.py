"""Placement: on which node of a Ray cluster each process goes, and why one that wants a CPU has none yet.

Replay, weight store and learner sit together, on the head node unless the learner needs a GPU that is elsewhere.
Workers are spread over all nodes in proportion to their CPUs. On one machine there is nothing to decide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from replay.errors import ConfigurationError

_HEAD = "node:__internal_head__"
# CPUs that learner and replay are taken to keep busy.
_LOAD_OF_LEARNER_NODE = 2.0
WORKER_BYTES = 300 * 2**20
"""Memory of a rollout worker, roughly: Python, PyTorch and a few small environments."""

Node = Mapping[str, Any]


@dataclass(frozen=True)
class Placement:
    """Where processes go.

    Attributes:
        learner_node: id of the node of replay, weight store and learner; None leaves it to Ray.
        learner_gpus: GPUs of the learner, 0 or 1.
        cpus_per_actor: CPUs that Ray keeps for each worker; 0 for none.
    """

    learner_node: str | None = None
    learner_gpus: int = 0
    cpus_per_actor: float = 0.0

    def beside_the_learner(self) -> dict[str, Any]:
        """Return options of an actor that belongs beside the learner; elsewhere if that node is gone."""
        return {} if self.learner_node is None else _at(self.learner_node)

    def for_learner(self) -> dict[str, Any]:
        """Return options of the learner."""
        return {"num_gpus": self.learner_gpus, **self.beside_the_learner()}

    def for_worker(self, worker: int, nodes: Sequence[Node]) -> dict[str, Any]:
        """Return options of a worker, by its index, in a cluster of these nodes."""
        if self.cpus_per_actor:
            return {"num_cpus": self.cpus_per_actor, "scheduling_strategy": "SPREAD"}
        node = spread(worker, nodes, self.learner_node)
        return {} if node is None else _at(node)


UNPLACED = Placement()


def _at(node: str) -> dict[str, Any]:
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)}


def spread(worker: int, nodes: Sequence[Node], learner_node: str | None) -> str | None:
    """Return the node for a worker: each goes where most of a node's CPUs are free of others before it.

    Ray spreads what takes no CPU at random, so that two workers may share one of many idle nodes.
    """
    cpus: dict[str, float] = {node["NodeID"]: node["Resources"].get("CPU", 0.0) for node in _alive(nodes)}
    cpus = {node: count for node, count in cpus.items() if count > 0}
    if len(cpus) < 2:
        return next(iter(cpus), None) if len(_alive(nodes)) > 1 else None
    busy: dict[str, float] = {node: _LOAD_OF_LEARNER_NODE if node == learner_node else 0.0 for node in cpus}
    # At this level of load at most `worker` workers are placed, whoever comes first; the last few one by one.
    level, left = worker / sum(cpus.values()), worker + 1
    for node, count in cpus.items():
        placed = max(0, math.floor(level * count - busy[node] - 1e-6))
        busy[node] += placed
        left -= placed
    chosen = None
    for _ in range(left):
        chosen = min(sorted(cpus), key=lambda node: (busy[node] + 1.0) / cpus[node])
        busy[chosen] += 1.0
    return chosen


def place(
    nodes: Sequence[Node], *, learner_gpus: int | None, cpus_per_actor: float, may_grow: bool = False
) -> Placement:
    """Decide where a run's processes go.

    Args:
        nodes: of the cluster, as `ray.nodes` tells them.
        learner_gpus: 0 or 1; None takes a GPU where there is one.
        cpus_per_actor: CPUs to keep for each worker.
        may_grow: whether larger nodes than there are may yet join.

    Raises:
        ConfigurationError: the cluster lacks what is asked for.
    """
    alive = _alive(nodes)
    with_gpu = [node for node in alive if node["Resources"].get("GPU", 0.0) >= 1]
    if learner_gpus and not with_gpu:
        raise ConfigurationError(
            f"learner_gpus is {learner_gpus}, and none of the cluster's {len(alive)} nodes has a GPU; "
            f"add a node with one, or take --learner-gpus 0"
        )
    largest = max((node["Resources"].get("CPU", 0.0) for node in alive), default=0.0)
    if cpus_per_actor > largest and not may_grow:
        raise ConfigurationError(
            f"cpus_per_actor is {cpus_per_actor:g}, and the cluster's largest node has {largest:g} CPUs: "
            f"no worker would ever start"
        )
    gpus = int(bool(with_gpu)) if learner_gpus is None else learner_gpus
    homes = [node for node in (with_gpu if gpus else alive) if _HEAD in node["Resources"]] or with_gpu[:gpus]
    learner_node = homes[0]["NodeID"] if homes and len(alive) > 1 else None
    return Placement(learner_node, gpus, cpus_per_actor)


def cluster_cpus() -> int:
    """Return the CPUs of the whole cluster, at least 1."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]


def no_room(wanted: float, what: str = "CPU") -> str | None:
    """Return why a process that wants CPUs or GPUs cannot start now, or None if the cluster has room for it."""
    if not wanted:
        return None
    free = ray.available_resources().get(what, 0.0)  # type: ignore[no-untyped-call]
    if free >= wanted:
        return None
    there = ray.cluster_resources().get(what, 0.0)  # type: ignore[no-untyped-call]
    return f"waits for room: it wants {wanted:g} {what}, and {free:g} of the cluster's {there:g} are free"


def too_many(actors: int, cpus_per_actor: float) -> str | None:
    """Return why the cluster's memory cannot hold so many workers, or None if it can.

    Workers that want CPUs need no such check: what has no room waits.
    """
    memory = ray.cluster_resources().get("memory", math.inf)  # type: ignore[no-untyped-call]
    if cpus_per_actor or actors * WORKER_BYTES <= memory:
        return None
    return (
        f"{actors:,} actors need about {actors * WORKER_BYTES / 2**30:,.1f} GiB of memory, {WORKER_BYTES / 2**20:.0f} "
        f"MiB each, and the cluster has {memory / 2**30:,.1f} GiB: {memory // WORKER_BYTES:,.0f} actors"
    )


def _alive(nodes: Sequence[Node]) -> list[Node]:
    return [node for node in nodes if node["Alive"]]
