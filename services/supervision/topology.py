"""Topology of a run: the processes that it consists of, and how each of them is started.

The driver owns every actor and none is detached, so the run ends with the driver. An actor's name consists of the run's
name, for people, and a nonce of this driver. The nonce is needed because two runs of the same name may share a cluster:
their stores may differ, and the actors of a driver that has died exist for a moment longer.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.environments import specify
from actors.evaluation import EvaluatorActor
from actors.on_policy import OnPolicyActor
from actors.policies import PolicySpec
from actors.rollout import RolloutActor, RolloutSpec
from actors.weights import WeightClient, WeightStoreActor
from learner.checkpoints import make_algorithm
from learner.compilation import NOT_SCALED, find_compiler
from learner.learner import LearnerActor, LearnerSpec
from replay.client import ReplayClient, TrajectoryClient
from replay.errors import ConfigurationError
from replay.remote import NAMESPACE, RemoteActor, lower_priority
from replay.server import Counters, ReplayActor, ReplaySpec
from replay.sharding.client import ShardedReplayClient
from replay.sharding.reporter import ShardReporter
from replay.sharding.router import ReplayRouterActor
from replay.sharding.shard import ReplayShardActor
from replay.trajectory_server import QueueSpec, TrajectoryActor
from services.config import RunConfig
from services.rpc.auth import LOOPBACK, ServerConfig, check_free, read_token, split_address
from services.rpc.endpoint import EndpointActor, ExperienceServiceSpec, PolicyServiceSpec, ServiceSpec
from services.supervision.placement import UNPLACED, Placement, memory_shortage, place
from services.supervision.ray_cluster import MIN_OBJECT_STORE_BYTES

_MAX_LEARNER_THREADS = 4
_LONG_EPISODE = 1_000  # steps assumed for a trajectory of unlimited length
FIRST_SESSION_WORKER = 1_000_000
"""Worker index of an endpoint's first experience session; rollout workers have smaller indices."""
SESSIONS_PER_INCARNATION = 10**12
_THIS_NODE = "node"  # a host name that stands for the node's own address in the cluster


@dataclass(frozen=True)
class Topology:
    """Description of a run's processes, none of which is started yet.

    Attributes:
        run: the run's name.
        seed: the run's seed.
        actors: number of rollout workers; with 0, all experience comes from external simulators.
        steps: environment steps after which the run is finished.
        policy: the acting module.
        rollout: description of the rollout workers.
        replay: description of the replay server, or on-policy of the trajectory server.
        learner: description of the learner.
        replay_deadline: seconds that a process waits for the replay.
        replay_shards: number of tables that share the replay.
        auto: whether to scale the workers automatically; `actors` is the initial number then.
        learner_gpus: GPUs of the learner; None takes one if the cluster has one.
        cpus_per_actor: CPUs that Ray reserves for each worker.
        learner_threads: CPU threads of the learner; None takes the CPUs that the workers do not use.
        placement: nodes of the processes, once the cluster is known.
        server_config: configuration of the run's gRPC endpoint; None for no endpoint.
        nonce: part of the actors' names, unique to this topology.
    """

    run: str
    seed: int
    actors: int
    steps: int
    policy: PolicySpec
    rollout: RolloutSpec
    replay: ReplaySpec | QueueSpec
    learner: LearnerSpec
    replay_deadline: float
    replay_shards: int = 1
    auto: bool = False
    learner_gpus: int | None = None
    cpus_per_actor: float = 0.0
    learner_threads: int | None = None
    placement: Placement = UNPLACED
    server_config: ServerConfig | None = None
    nonce: str = field(default_factory=lambda: token_hex(4))

    def placed(self) -> Topology:
        """Return this topology with its processes placed on the nodes of the connected cluster.

        Raises:
            ConfigurationError: the cluster lacks the requested resources.
        """
        placement = place(
            ray.nodes(),  # type: ignore[no-untyped-call]
            learner_gpus=self.learner_gpus,
            cpus_per_actor=self.cpus_per_actor,
            may_grow="RAY_ADDRESS" in os.environ,
        )
        shortage = memory_shortage(self.actors, self.cpus_per_actor)
        if shortage is not None:
            raise ConfigurationError(shortage)
        learner = replace(self.learner, on_gpu=placement.learner_gpus > 0)
        return replace(self, placement=placement, learner=learner)

    def start_weight_store(self) -> Any:
        """Start the weight store and return its handle."""
        return lower_priority(WeightStoreActor.options(**self._options_beside_learner("weights")).remote(put=ray.put))

    def start_replay(self, incarnation: int, carried: Counters, highest_priority: float, version: int) -> Any:
        """Start a replay or trajectory server that continues from the run's totals, and return its handle.

        Args:
            incarnation: number of this restart.
            carried: totals of the run so far.
            highest_priority: highest priority so far; used by a replay server.
            version: newest known version of the weights; used by a trajectory server.
        """
        common: dict[str, Any] = {"carried": carried, "max_env_steps": self.steps}
        if isinstance(self.replay, QueueSpec):
            handle = TrajectoryActor.options(**self._options_beside_learner("replay")).remote(
                self.replay, version=max(version, 0), **common
            )
        else:
            handle = ReplayActor.options(**self._options_beside_learner("replay")).remote(
                self.replay, run_seed=self.seed, incarnation=incarnation, highest_priority=highest_priority, **common
            )
        return lower_priority(handle)

    def start_router(
        self, incarnation: int, carried: Counters, highest_priority: float, counted: tuple[tuple[int, int, int], ...]
    ) -> Any:
        """Start the router of a sharded replay and return its handle; see `start_replay` and `ReplayRouter`."""
        handle = ReplayRouterActor.options(**self._options_beside_learner("replay")).remote(
            self.replay,
            shards=self.replay_shards,
            run_seed=self.seed,
            incarnation=incarnation,
            carried=carried,
            highest_priority=highest_priority,
            max_env_steps=self.steps,
            counted=counted,
        )
        return lower_priority(handle)

    def start_shard(self, shard: int, incarnation: int, *, with_others: bool) -> Any:
        """Start a shard of the replay and return its handle; `with_others` means that all shards start together."""
        handle = ReplayShardActor.options(**self._options_beside_learner(f"replay-{shard}")).remote(
            self.replay,
            shard=shard,
            shards=self.replay_shards,
            router=ShardReporter(self._actor("replay")),
            run_seed=self.seed,
            incarnation=incarnation,
            with_others=with_others,
        )
        return lower_priority(handle)

    def start_learner(self) -> Any:
        """Start the learner and return its handle."""
        return LearnerActor.options(**self.placement.for_learner()).remote(
            self.learner,
            replay=self._replay_client(),
            weights=self._actor("weights"),
            threads=self._learner_thread_count,
        )

    def start_worker(self, worker: int, incarnation: int, workers: int) -> Any:
        """Start the rollout worker of index `worker`, one of `workers`, and return its handle."""
        options = self.placement.for_worker(worker, ray.nodes())  # type: ignore[no-untyped-call]
        process: dict[str, Any] = {
            "worker": worker,
            "workers": workers,
            "incarnation": incarnation,
            "weights": WeightClient(self._actor("weights")),
            "threads": 1,
        }
        if isinstance(self.replay, QueueSpec):
            # A worker needs no more lanes than its share of a batch; the steps of other lanes would not be used.
            share = math.ceil(self.replay.units_per_batch / workers)
            rollout = replace(self.rollout, num_envs=min(self.rollout.num_envs, share))
            return lower_priority(
                OnPolicyActor.options(**options).remote(rollout, queue=self._replay_client(), **process)
            )
        return lower_priority(
            RolloutActor.options(**options).remote(self.rollout, replay=self._replay_client(), **process)
        )

    def start_evaluator(self) -> Any:
        """Start the evaluator and return its handle."""
        return lower_priority(EvaluatorActor.remote(self.policy, run_seed=self.seed, threads=1))

    def start_endpoint(self, incarnation: int, port_before: int | None = None) -> Any:
        """Start the endpoint on the driver's node and return its handle.

        Args:
            incarnation: number of this restart.
            port_before: see `Endpoint.listen`.
        """
        assert self.server_config is not None
        host, port = split_address(self.server_config.address)
        server_config, own_host = self.server_config, ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        if host == _THIS_NODE:
            server_config = replace(server_config, address=f"{own_host}:{port}")
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        handle = EndpointActor.options(scheduling_strategy=here).remote(
            self._service_specs(), incarnation=incarnation, threads=1
        )
        # Not an argument of the constructor: Ray stores those in the cluster's state, where the token must not appear.
        handle.listen.remote(server_config, advertised_host=own_host, previous_port=port_before)
        return handle

    def _service_specs(self) -> list[ServiceSpec]:
        """Return the services of the endpoint."""
        algorithm, replay = self.learner.algorithm, self._replay_client()
        # Each service has its own client of the weight store, because a client returns each version only once.
        policy_weights, experience_weights = WeightClient(self._actor("weights")), WeightClient(self._actor("weights"))
        experience_replay = replay if isinstance(replay, ReplayClient) else None
        return [
            PolicyServiceSpec(self.run, self.seed, algorithm, self.policy, policy_weights),
            ExperienceServiceSpec(
                self.run,
                algorithm,
                self.rollout,
                experience_weights,
                experience_replay,
                FIRST_SESSION_WORKER,
                SESSIONS_PER_INCARNATION,
            ),
        ]

    def _actor(self, role: str) -> RemoteActor:
        return RemoteActor(f"{self.run}-{self.nonce}/{role}")

    def _options_beside_learner(self, role: str) -> dict[str, Any]:
        return {"name": self._actor(role).name, "namespace": NAMESPACE, **self.placement.beside_the_learner()}

    def _replay_client(self) -> ReplayClient | TrajectoryClient:
        if self.replay_shards > 1:
            shards = [self._actor(f"replay-{shard}") for shard in range(self.replay_shards)]
            return ShardedReplayClient(self._actor("replay"), shards, deadline_seconds=self.replay_deadline)
        client = TrajectoryClient if isinstance(self.replay, QueueSpec) else ReplayClient
        return client(self._actor("replay"), deadline_seconds=self.replay_deadline)

    @property
    def samples_per_insert(self) -> float:
        """Number of items that the learner samples per item inserted; 1 on-policy."""
        return 1.0 if isinstance(self.replay, QueueSpec) else self.replay.samples_per_insert

    @property
    def _learner_thread_count(self) -> int:
        if self.learner_threads is not None:
            return self.learner_threads
        spare = (os.cpu_count() or 1) - self.actors
        return max(1, min(_MAX_LEARNER_THREADS, spare))

    @property
    def object_store_bytes(self) -> int:
        """Shared memory for pushes, batches, and weights in transit, in bytes, with a factor of 2 to spare."""
        layout = self.rollout.layout
        observation = math.prod(layout.observation_shape) * np.dtype(layout.frame_dtype).itemsize
        if isinstance(self.replay, QueueSpec):
            push = observation * self.rollout.num_envs * (self.rollout.trajectory_rows or _LONG_EPISODE)
            batch = observation * self.replay.units_per_batch * (self.rollout.trajectory_rows or _LONG_EPISODE)
        else:
            push = layout.frame_bytes * layout.max_segment_frames * self.rollout.num_envs
            batch = 2 * observation * self.replay.batch_size * self.replay.batches_per_sample
        actors = max(self.actors, os.cpu_count() or 1) if self.auto else max(self.actors, 1)
        return max(MIN_OBJECT_STORE_BYTES, 2 * (4 * actors * push + 6 * batch))


def last_session(incarnation: int) -> int:
    """Return the highest push incarnation that the sessions of this incarnation of the endpoint can have."""
    return (incarnation + 1) * SESSIONS_PER_INCARNATION - 1


def plan(config: RunConfig, run: str, checkpoints: Path) -> Topology:
    """Return the topology of a run after checking its configuration.

    Args:
        config: the run's configuration.
        run: name of the run.
        checkpoints: folder of the run's checkpoints.

    Raises:
        ConfigurationError: an unknown environment, or a value that cannot work.
        NotEnoughMemory: the replay does not fit into this machine's memory.
    """
    environment = specify(config.environment, config.environment_arguments)
    hyperparameters = {**config.hyperparameters, "env": environment.plain(), "seed": config.seed}
    if hyperparameters["learning_rate_schedule"] != "constant" and hyperparameters["learning_rate_last_frame"] is None:
        # Not part of the saved configuration, so that the schedule is extended when a resumed run gets more steps.
        hyperparameters["learning_rate_last_frame"] = config.steps
    try:
        module = make_algorithm(config.algorithm, hyperparameters)
    except TypeError as error:
        raise ConfigurationError(str(error)) from error
    if config.hyperparameters.get("compile_updates"):
        if config.precision == "16-mixed":
            raise ConfigurationError(NOT_SCALED)
        if "RAY_ADDRESS" not in os.environ:  # in a cluster, the learner checks this on its node
            find_compiler()
    rollout, replay = module.rollout_spec(), module.experience_spec()
    if config.actors == 0:
        _check_external(config, on_policy=isinstance(replay, QueueSpec))
    if isinstance(replay, QueueSpec):
        _check_on_policy(config)
    else:
        _check_replay(config, replay)
    return Topology(
        run=run,
        seed=config.seed,
        actors=config.first_actors,
        steps=config.steps,
        policy=module.policy_spec,
        rollout=rollout,
        replay=replay,
        learner=LearnerSpec(
            algorithm=config.algorithm,
            hyperparameters=hyperparameters,
            checkpoints=str(checkpoints),
            checkpoint_every=config.checkpoint_every,
            keep_checkpoints=config.keep_checkpoints,
            publish_every=config.publish_every,
            precision=config.precision,
        ),
        replay_deadline=config.replay_deadline,
        replay_shards=config.replay_shards,
        auto=config.actors == "auto",
        learner_gpus=None if config.learner_gpus == "auto" else config.learner_gpus,
        cpus_per_actor=config.cpus_per_actor,
        learner_threads=None if config.learner_threads == "auto" else config.learner_threads,
        server_config=_server_config(config.serve),
    )


def _check_external(config: RunConfig, *, on_policy: bool) -> None:
    """Raise unless a run without rollout workers can get its experience from external simulators."""
    if on_policy:
        raise ConfigurationError(
            f"{config.algorithm} is on-policy and accepts no external experience: actors must be positive, got 0"
        )
    if config.serve is None:
        raise ConfigurationError(
            "actors must be positive, got 0: without rollout workers, all experience comes over gRPC; "
            "add --serve [HOST:PORT]"
        )


def _check_on_policy(config: RunConfig) -> None:
    if config.publish_every != 1:
        raise ConfigurationError(
            f"{config.algorithm} needs publish_every 1, got {config.publish_every}: the newest weights must generate "
            f"every batch"
        )
    if config.replay_shards != 1:
        raise ConfigurationError(
            f"{config.algorithm} has no replay to shard: replay_shards must be 1, got {config.replay_shards}"
        )


def _check_replay(config: RunConfig, replay: ReplaySpec) -> None:
    if config.steps <= replay.minimum_size:
        raise ConfigurationError(
            f"a run of {config.steps} steps ends before the first update: warm_start_size is "
            f"{replay.minimum_size}; raise --steps, or lower --set warm_start_size=..."
        )
    replay.check_shards(config.replay_shards)
    # All shards run on the learner's node. Each shard repeats the check on that node.
    replay.table.check_memory()


def _server_config(serve: str | None) -> ServerConfig | None:
    if serve is None:
        return None
    if serve == "auto":
        # A gateway on another node cannot reach a loopback address.
        return ServerConfig(f"{_THIS_NODE if 'RAY_ADDRESS' in os.environ else LOOPBACK}:0", read_token())
    server_config = ServerConfig(serve, read_token())
    check_free(serve)  # the endpoint will run on this node, the driver's
    return server_config
