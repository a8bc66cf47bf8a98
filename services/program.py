"""The topology: what a run consists of, and how each process of it is started.

The driver owns every actor and none is detached, so its end ends the run. Names carry the run's, because several
runs may share a cluster.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.environments import specify
from actors.evaluation import EvaluatorActor
from actors.on_policy import OnPolicyActor
from actors.policies import PolicySpec
from actors.rollout import RolloutActor, RolloutSpec
from actors.weights import WeightClient, WeightStoreActor
from learner.training import LearnerActor, LearnerSpec, make_algorithm
from replay.remote import NAMESPACE, RemoteActor
from replay.server import Counters, ReplayActor, ReplayClient, ReplaySpec
from replay.trajectory_server import QueueSpec, TrajectoryActor, TrajectoryClient
from replay.types import ConfigurationError, SquallError
from services.config import RunConfig
from services.endpoint import EndpointActor, Offer, PolicyOffer
from services.grpc_server import LOOPBACK, Listening, read_token, split_address

LEAST_OBJECT_STORE = 128 * 2**20
_MOST_LEARNER_THREADS = 4
_LONGEST_TEMPORARY_PATH = 30
_LONG_EPISODE = 1_000
_THIS_NODE = "node"  # as a host: this node's own address in the cluster


class RayUnavailable(SquallError):
    """Ray could not be started or reached; the text says which, and where."""


@dataclass(frozen=True)
class Program:
    """A run's processes, described but not started.

    Attributes:
        run: the run's name.
        seed: the run's seed.
        actors: rollout workers.
        steps: environment steps after which the run is finished.
        policy: the acting module.
        rollout: what each worker does.
        replay: what the replay server holds, at which rate; or the trajectory server in its place.
        learner: what the learner does.
        replay_deadline: seconds a process waits for replay.
        listening: where the run serves its policy over gRPC; None for not at all.
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
    listening: Listening | None = None

    def start_weight_store(self) -> Any:
        """Start the weight store and return its handle."""
        return WeightStoreActor.options(**self._named("weights")).remote(put=ray.put)

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
            return TrajectoryActor.options(**self._named("replay")).remote(
                self.replay, version=max(version, 0), **common
            )
        return ReplayActor.options(**self._named("replay")).remote(
            self.replay, run_seed=self.seed, incarnation=incarnation, highest_priority=highest_priority, **common
        )

    def start_learner(self) -> Any:
        """Start the learner, on a GPU where the cluster has one, and return its handle."""
        gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0  # type: ignore[no-untyped-call]
        return LearnerActor.options(num_gpus=gpus).remote(
            self.learner, replay=self._replay_client(), weights=self._actor("weights"), threads=self._learner_threads
        )

    def start_worker(self, worker: int, incarnation: int, workers: int) -> Any:
        """Start one of `workers` rollout workers and return its handle."""
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
            return OnPolicyActor.remote(rollout, queue=self._replay_client(), **process)
        return RolloutActor.remote(self.rollout, replay=self._replay_client(), **process)

    def start_evaluator(self) -> Any:
        """Start the evaluator and return its handle."""
        return EvaluatorActor.remote(self.policy, run_seed=self.seed, threads=1)

    def start_endpoint(self, incarnation: int) -> Any:
        """Start the endpoint, on the driver's node, and return its handle."""
        assert self.listening is not None
        host, port = split_address(self.listening.address)
        listening, own_host = self.listening, ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        if host == _THIS_NODE:
            listening = replace(listening, address=f"{own_host}:{port}")
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return EndpointActor.options(scheduling_strategy=here).remote(
            self._offers(), listening, known_as=own_host, incarnation=incarnation, threads=1
        )

    def _offers(self) -> list[Offer]:
        """What the endpoint offers."""
        weights = WeightClient(self._actor("weights"))
        return [PolicyOffer(self.run, self.seed, self.learner.algorithm, self.policy, weights)]

    def _actor(self, role: str) -> RemoteActor:
        return RemoteActor(f"{self.run}/{role}")

    def _named(self, role: str) -> dict[str, str]:
        return {"name": self._actor(role).name, "namespace": NAMESPACE}

    def _replay_client(self) -> ReplayClient | TrajectoryClient:
        client = TrajectoryClient if isinstance(self.replay, QueueSpec) else ReplayClient
        return client(self._actor("replay"), deadline_seconds=self.replay_deadline)

    @property
    def samples_per_insert(self) -> float:
        """Items that the learner draws for each item inserted; on-policy each is drawn once."""
        return 1.0 if isinstance(self.replay, QueueSpec) else self.replay.samples_per_insert

    @property
    def _learner_threads(self) -> int:
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
        return max(LEAST_OBJECT_STORE, 2 * (4 * self.actors * push + 6 * batch))


def plan(config: RunConfig, run: str, checkpoints: Path) -> Program:
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
    rollout, replay = module.rollout_spec(), module.experience_spec()
    if isinstance(replay, QueueSpec):
        if config.publish_every != 1:
            raise ConfigurationError(
                f"{config.algorithm} needs publish_every 1, got {config.publish_every}: every batch is made under "
                f"the newest weights"
            )
    else:
        if config.steps <= replay.minimum_size:
            raise ConfigurationError(
                f"a run of {config.steps} steps ends before the first update: warm_start_size is "
                f"{replay.minimum_size}; give more --steps, or --set warm_start_size=..."
            )
        replay.table.check_memory()
    return Program(
        run=run,
        seed=config.seed,
        actors=config.actors,
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
        listening=_listening(config.serve),
    )


def _listening(serve: str | None) -> Listening | None:
    if serve is None:
        return None
    if serve == "auto":
        # Loopback is of no use to a gateway elsewhere.
        serve = f"{_THIS_NODE if 'RAY_ADDRESS' in os.environ else LOOPBACK}:0"
    return Listening(serve, read_token())


class RaySession:
    """A Ray cluster for as long as a `with` block lasts: one of this machine's own, or the one in RAY_ADDRESS."""

    def __init__(self, object_store_bytes: int) -> None:
        """Say how much shared memory a cluster of our own needs."""
        self._bytes = object_store_bytes
        self._folder: str | None = None

    def __enter__(self) -> RaySession:
        """Start or join the cluster.

        Raises:
            RayUnavailable: it could not be started or reached, or shared memory is short.
        """
        try:
            try:
                self._start()
            except RayUnavailable:
                raise
            except Exception:  # Ray raises a bare Exception when its start takes too long, as on a loaded machine
                self.__exit__()
                self._start()
        except Exception as error:
            self.__exit__()
            if isinstance(error, RayUnavailable):
                raise
            address = os.environ.get("RAY_ADDRESS")
            where = f"the Ray cluster at {address}" if address else "a local Ray"
            reason = str(error).splitlines()[0] if str(error) else repr(error)
            raise RayUnavailable(f"cannot use {where}: {reason}") from error
        return self

    def _start(self) -> None:
        common: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "configure_logging": False}
        if address := os.environ.get("RAY_ADDRESS"):
            ray.init(address=address, **common)
            return
        self._folder = _session_folder()
        ray.init(
            address="local",
            num_cpus=os.cpu_count(),
            include_dashboard=False,
            object_store_memory=self._shared_memory(),
            _temp_dir=self._folder,
            **common,
        )

    def _shared_memory(self) -> int:
        try:
            free = psutil.disk_usage("/dev/shm").free
        except OSError:
            return self._bytes
        if free < LEAST_OBJECT_STORE:
            raise RayUnavailable(
                f"/dev/shm has {free / 2**20:.0f} MiB free and Ray needs {LEAST_OBJECT_STORE / 2**20:.0f} MiB; "
                f"in a container raise its shm_size"
            )
        return min(self._bytes, int(free * 0.8))

    def __exit__(self, *_: object) -> None:
        """Leave the cluster; one of our own ends, and its files go."""
        ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _session_folder() -> str:
    """Make a folder for Ray's session, named after this process, and remove those whose process is gone.

    Ray's sockets lie in it, and a socket's path is short by nature, so a long TMPDIR gives way to /tmp.
    """
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) > _LONGEST_TEMPORARY_PATH:
        parent = Path("/tmp")
    for old in parent.glob("squall-*-*"):
        pid = old.name.split("-")[1]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(old, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"squall-{os.getpid()}-", dir=parent)
