"""The topology: what a run consists of, and how each process of it is started.

The driver owns every actor and none is detached, so its end ends the run. Names carry the run's, for people, and a
nonce of this driver, because runs of one name may share a cluster: other stores know nothing of each other, and the
actors of a driver that died live a while longer.
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
from services.supervision.placement import UNPLACED, Placement, place, too_many
from services.supervision.ray_cluster import LEAST_OBJECT_STORE

_MOST_LEARNER_THREADS = 4
_LONG_EPISODE = 1_000
FIRST_SESSION_WORKER = 1_000_000
"""Worker index of an endpoint's first session; rollout workers have smaller indices."""
SESSIONS_PER_INCARNATION = 10**12
_THIS_NODE = "node"  # as a host: this node's own address in the cluster


@dataclass(frozen=True)
class Topology:
    """A run's processes, described but not started.

    Attributes:
        run: the run's name.
        seed: the run's seed.
        actors: rollout workers; with 0 all experience comes from outside.
        steps: environment steps after which the run is finished.
        policy: the acting module.
        rollout: what each worker does.
        replay: what the replay server holds, at which rate; or the trajectory server in its place.
        learner: what the learner does.
        replay_deadline: seconds a process waits for replay.
        replay_shards: tables that the replay is divided among.
        auto: whether the number of workers follows from who waits for whom; `actors` is the first then.
        learner_gpus: GPUs for the learner; None takes one where there is one.
        cpus_per_actor: CPUs that Ray keeps for each worker.
        learner_threads: CPU threads of the learner; None takes those that the workers leave.
        placement: where processes go, once the cluster is known.
        server_config: where the run serves its policy over gRPC; None for not at all.
        nonce: in the names of this program's actors and of no other's.
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
        """Return this program with its places in the cluster that is joined.

        Raises:
            ConfigurationError: the cluster lacks what the run asks for.
        """
        placement = place(
            ray.nodes(),  # type: ignore[no-untyped-call]
            learner_gpus=self.learner_gpus,
            cpus_per_actor=self.cpus_per_actor,
            may_grow="RAY_ADDRESS" in os.environ,
        )
        refused = too_many(self.actors, self.cpus_per_actor)
        if refused is not None:
            raise ConfigurationError(refused)
        learner = replace(self.learner, on_gpu=placement.learner_gpus > 0)
        return replace(self, placement=placement, learner=learner)

    def start_weight_store(self) -> Any:
        """Start the weight store and return its handle."""
        return lower_priority(WeightStoreActor.options(**self._central("weights")).remote(put=ray.put))

    def start_replay(self, incarnation: int, carried: Counters, highest_priority: float, version: int) -> Any:
        """Start a replay or trajectory server that goes on from the run's totals, and return its handle.

        Args:
            incarnation: how often it was recreated.
            carried: totals of the run so far.
            highest_priority: the highest priority seen so far, for a replay.
            version: the newest version of the weights that anybody heard of, for trajectories.
        """
        common: dict[str, Any] = {"carried": carried, "max_env_steps": self.steps}
        if isinstance(self.replay, QueueSpec):
            made = TrajectoryActor.options(**self._central("replay")).remote(
                self.replay, version=max(version, 0), **common
            )
        else:
            made = ReplayActor.options(**self._central("replay")).remote(
                self.replay, run_seed=self.seed, incarnation=incarnation, highest_priority=highest_priority, **common
            )
        return lower_priority(made)

    def start_router(
        self, incarnation: int, carried: Counters, highest_priority: float, counted: tuple[tuple[int, int, int], ...]
    ) -> Any:
        """Start the desk of a replay in shards and return its handle; see `start_replay` and `ReplayRouter`."""
        made = ReplayRouterActor.options(**self._central("replay")).remote(
            self.replay,
            shards=self.replay_shards,
            run_seed=self.seed,
            incarnation=incarnation,
            carried=carried,
            highest_priority=highest_priority,
            max_env_steps=self.steps,
            counted=counted,
        )
        return lower_priority(made)

    def start_shard(self, shard: int, incarnation: int, *, with_others: bool) -> Any:
        """Start one of the replay's shards, perhaps together with all others, and return its handle."""
        made = ReplayShardActor.options(**self._central(f"replay-{shard}")).remote(
            self.replay,
            shard=shard,
            shards=self.replay_shards,
            router=ShardReporter(self._actor("replay")),
            run_seed=self.seed,
            incarnation=incarnation,
            with_others=with_others,
        )
        return lower_priority(made)

    def start_learner(self) -> Any:
        """Start the learner and return its handle."""
        return LearnerActor.options(**self.placement.for_learner()).remote(
            self.learner,
            replay=self._replay_client(),
            weights=self._actor("weights"),
            threads=self._threads_of_the_learner,
        )

    def start_worker(self, worker: int, incarnation: int, workers: int) -> Any:
        """Start one of `workers` rollout workers and return its handle."""
        options = self.placement.for_worker(worker, ray.nodes())  # type: ignore[no-untyped-call]
        process: dict[str, Any] = {
            "worker": worker,
            "workers": workers,
            "incarnation": incarnation,
            "weights": WeightClient(self._actor("weights")),
            "threads": 1,
        }
        if isinstance(self.replay, QueueSpec):
            # A lane without a share in the batch would step for nothing.
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
        """Start the endpoint, on the driver's node, and return its handle; `port_before` see `Endpoint.listen`."""
        assert self.server_config is not None
        host, port = split_address(self.server_config.address)
        server_config, own_host = self.server_config, ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        if host == _THIS_NODE:
            server_config = replace(server_config, address=f"{own_host}:{port}")
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        handle = EndpointActor.options(scheduling_strategy=here).remote(
            self._service_specs(), incarnation=incarnation, threads=1
        )
        # Not an argument above: those Ray keeps in the state of the cluster, and so would the token.
        handle.listen.remote(server_config, known_as=own_host, port_before=port_before)
        return handle

    def _service_specs(self) -> list[ServiceSpec]:
        """What the endpoint offers."""
        algorithm, replay = self.learner.algorithm, self._replay_client()
        # A client of the weights each: it gives a version once.
        policy_weights, experience_weights = WeightClient(self._actor("weights")), WeightClient(self._actor("weights"))
        takes = replay if isinstance(replay, ReplayClient) else None
        return [
            PolicyServiceSpec(self.run, self.seed, algorithm, self.policy, policy_weights),
            ExperienceServiceSpec(
                self.run,
                algorithm,
                self.rollout,
                experience_weights,
                takes,
                FIRST_SESSION_WORKER,
                SESSIONS_PER_INCARNATION,
            ),
        ]

    def _actor(self, role: str) -> RemoteActor:
        return RemoteActor(f"{self.run}-{self.nonce}/{role}")

    def _central(self, role: str) -> dict[str, Any]:
        return {"name": self._actor(role).name, "namespace": NAMESPACE, **self.placement.beside_the_learner()}

    def _replay_client(self) -> ReplayClient | TrajectoryClient:
        if self.replay_shards > 1:
            shards = [self._actor(f"replay-{shard}") for shard in range(self.replay_shards)]
            return ShardedReplayClient(self._actor("replay"), shards, deadline_seconds=self.replay_deadline)
        client = TrajectoryClient if isinstance(self.replay, QueueSpec) else ReplayClient
        return client(self._actor("replay"), deadline_seconds=self.replay_deadline)

    @property
    def samples_per_insert(self) -> float:
        """Items that the learner draws for each item inserted; on-policy each is drawn once."""
        return 1.0 if isinstance(self.replay, QueueSpec) else self.replay.samples_per_insert

    @property
    def _threads_of_the_learner(self) -> int:
        if self.learner_threads is not None:
            return self.learner_threads
        spare = (os.cpu_count() or 1) - self.actors
        return max(1, min(_MOST_LEARNER_THREADS, spare))

    @property
    def object_store_bytes(self) -> int:
        """Shared memory for what is on its way: pushes, batches and weights, twice over."""
        layout = self.rollout.layout
        observation = math.prod(layout.observation_shape) * np.dtype(layout.frame_dtype).itemsize
        if isinstance(self.replay, QueueSpec):
            push = observation * self.rollout.num_envs * (self.rollout.trajectory_rows or _LONG_EPISODE)
            batch = observation * self.replay.units_per_batch * (self.rollout.trajectory_rows or _LONG_EPISODE)
        else:
            push = layout.frame_bytes * layout.max_segment_frames * self.rollout.num_envs
            batch = 2 * observation * self.replay.batch_size * self.replay.batches_per_sample
        actors = max(self.actors, os.cpu_count() or 1) if self.auto else max(self.actors, 1)
        return max(LEAST_OBJECT_STORE, 2 * (4 * actors * push + 6 * batch))


def last_session(incarnation: int) -> int:
    """Return the highest push incarnation that sessions of this incarnation of the endpoint can have."""
    return (incarnation + 1) * SESSIONS_PER_INCARNATION - 1


def plan(config: RunConfig, run: str, checkpoints: Path) -> Topology:
    """Check a configuration against everything it names, and describe the processes it asks for.

    Raises:
        ConfigurationError: an environment or value that cannot work.
        NotEnoughMemory: the replay does not fit into this machine.
    """
    environment = specify(config.environment, config.environment_arguments)
    hyperparameters = {**config.hyperparameters, "env": environment.plain(), "seed": config.seed}
    if hyperparameters["learning_rate_schedule"] != "constant" and hyperparameters["learning_rate_last_frame"] is None:
        # Not part of the saved configuration: a run that is given more steps takes its schedule along.
        hyperparameters["learning_rate_last_frame"] = config.steps
    try:
        module = make_algorithm(config.algorithm, hyperparameters)
    except TypeError as error:
        raise ConfigurationError(str(error)) from error
    if config.hyperparameters.get("compile_updates"):
        if config.precision == "16-mixed":
            raise ConfigurationError(NOT_SCALED)
        if "RAY_ADDRESS" not in os.environ:  # elsewhere the learner finds out
            find_compiler()
    rollout, replay = module.rollout_spec(), module.experience_spec()
    if config.actors == 0:
        _check_outside(config, on_policy=isinstance(replay, QueueSpec))
    if isinstance(replay, QueueSpec):
        if config.publish_every != 1:
            raise ConfigurationError(
                f"{config.algorithm} needs publish_every 1, got {config.publish_every}: every batch is made under "
                f"the newest weights"
            )
        if config.replay_shards != 1:
            raise ConfigurationError(
                f"{config.algorithm} keeps no replay that could be divided: replay_shards must be 1, "
                f"got {config.replay_shards}"
            )
    else:
        if config.steps <= replay.minimum_size:
            raise ConfigurationError(
                f"a run of {config.steps} steps ends before the first update: warm_start_size is "
                f"{replay.minimum_size}; give more --steps, or --set warm_start_size=..."
            )
        replay.check_shards(config.replay_shards)
        # All shards lie on one node, beside the learner; each asks once more, where it is.
        replay.table.check_memory()
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


def _check_outside(config: RunConfig, *, on_policy: bool) -> None:
    if on_policy:
        raise ConfigurationError(
            f"{config.algorithm} is on-policy and takes no experience from outside: actors must be positive, got 0"
        )
    if config.serve is None:
        raise ConfigurationError(
            "actors must be positive, got 0: without rollout workers all experience comes from outside, over gRPC; "
            "add --serve [HOST:PORT]"
        )


def _server_config(serve: str | None) -> ServerConfig | None:
    if serve is None:
        return None
    if serve == "auto":
        # Loopback is of no use to a gateway elsewhere.
        return ServerConfig(f"{_THIS_NODE if 'RAY_ADDRESS' in os.environ else LOOPBACK}:0", read_token())
    server_config = ServerConfig(serve, read_token())
    check_free(serve)  # the endpoint is to be on this node, the driver's
    return server_config
