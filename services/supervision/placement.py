"""Placement: which node of a Ray cluster each process runs on, and which resources a waiting process lacks.

Replay, weight store, and learner share a node: the head node, unless the learner needs a GPU that only another node
has. Workers are spread over all nodes in proportion to their CPUs. On one machine all processes run together.
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
# CPUs that learner and replay are assumed to keep busy.
_LEARNER_NODE_LOAD = 2.0
WORKER_BYTES = 300 * 2**20
"""Approximate memory of a rollout worker: Python, PyTorch, and a few small environments."""

Node = Mapping[str, Any]


@dataclass(frozen=True)
class Placement:
    """The nodes and resources of a run's processes.

    Attributes:
        learner_node: id of the node of replay, weight store, and learner; None lets Ray choose.
        learner_gpus: GPUs of the learner, 0 or 1.
        cpus_per_actor: CPUs that Ray reserves for each worker; 0 for none.
    """

    learner_node: str | None = None
    learner_gpus: int = 0
    cpus_per_actor: float = 0.0

    def beside_the_learner(self) -> dict[str, Any]:
        """Return the options of an actor that runs on the learner's node, or on another node if that one has died."""
        return {} if self.learner_node is None else _on_node(self.learner_node)

    def for_learner(self) -> dict[str, Any]:
        """Return the options of the learner."""
        return {"num_gpus": self.learner_gpus, **self.beside_the_learner()}

    def for_worker(self, worker: int, nodes: Sequence[Node]) -> dict[str, Any]:
        """Return the options of the worker with this index, in a cluster of these nodes."""
        if self.cpus_per_actor:
            return {"num_cpus": self.cpus_per_actor, "scheduling_strategy": "SPREAD"}
        node = spread(worker, nodes, self.learner_node)
        return {} if node is None else _on_node(node)


UNPLACED = Placement()


def _on_node(node: str) -> dict[str, Any]:
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)}


def spread(worker: int, nodes: Sequence[Node], learner_node: str | None) -> str | None:
    """Return the node for a worker: the node with the largest share of free CPUs after all workers of lower index.

    Ray would place processes that reserve no CPU at random, so two workers could share a node while others are idle.
    """
    cpus: dict[str, float] = {node["NodeID"]: node["Resources"].get("CPU", 0.0) for node in _alive(nodes)}
    cpus = {node: count for node, count in cpus.items() if count > 0}
    if len(cpus) < 2:
        return next(iter(cpus), None) if len(_alive(nodes)) > 1 else None
    busy: dict[str, float] = {node: _LEARNER_NODE_LOAD if node == learner_node else 0.0 for node in cpus}
    # Up to this level of load, at most `worker` workers are placed, in any order. The loop below places the others.
    level, remaining = worker / sum(cpus.values()), worker + 1
    for node, count in cpus.items():
        placed = max(0, math.floor(level * count - busy[node] - 1e-6))
        busy[node] += placed
        remaining -= placed
    chosen = None
    for _ in range(remaining):
        chosen = min(sorted(cpus), key=lambda node: (busy[node] + 1.0) / cpus[node])
        busy[chosen] += 1.0
    return chosen


def place(
    nodes: Sequence[Node], *, learner_gpus: int | None, cpus_per_actor: float, may_grow: bool = False
) -> Placement:
    """Return the placement of a run's processes.

    Args:
        nodes: the cluster's nodes, as `ray.nodes` returns them.
        learner_gpus: 0 or 1; None takes a GPU if the cluster has one.
        cpus_per_actor: CPUs to reserve for each worker.
        may_grow: whether larger nodes may join the cluster later.

    Raises:
        ConfigurationError: the cluster lacks the requested resources.
    """
    alive = _alive(nodes)
    with_gpu = [node for node in alive if node["Resources"].get("GPU", 0.0) >= 1]
    if learner_gpus and not with_gpu:
        raise ConfigurationError(
            f"learner_gpus is {learner_gpus}, but none of the cluster's {len(alive)} nodes has a GPU; "
            f"add a node with a GPU, or use --learner-gpus 0"
        )
    largest = max((node["Resources"].get("CPU", 0.0) for node in alive), default=0.0)
    if cpus_per_actor > largest and not may_grow:
        raise ConfigurationError(
            f"cpus_per_actor is {cpus_per_actor:g}, but the cluster's largest node has {largest:g} CPUs: "
            f"no worker would ever start"
        )
    gpus = int(bool(with_gpu)) if learner_gpus is None else learner_gpus
    candidates = [node for node in (with_gpu if gpus else alive) if _HEAD in node["Resources"]] or with_gpu[:gpus]
    learner_node = candidates[0]["NodeID"] if candidates and len(alive) > 1 else None
    return Placement(learner_node, gpus, cpus_per_actor)


def cluster_cpus() -> int:
    """Return the number of CPUs of the whole cluster, at least 1."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]


def resource_shortage(needed: float, resource: str = "CPU") -> str | None:
    """Return why a process that needs CPUs or GPUs cannot start now, or None if the cluster has enough of them."""
    if not needed:
        return None
    free = ray.available_resources().get(resource, 0.0)  # type: ignore[no-untyped-call]
    if free >= needed:
        return None
    total = ray.cluster_resources().get(resource, 0.0)  # type: ignore[no-untyped-call]
    return f"waiting for resources: needs {needed:g} {resource}, but {free:g} of the cluster's {total:g} are free"


def memory_shortage(actors: int, cpus_per_actor: float) -> str | None:
    """Return why the cluster's memory cannot hold this many workers, or None if it can.

    Workers that reserve CPUs need no such check: a worker without a free CPU waits.
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
