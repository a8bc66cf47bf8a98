"""Small environments and batches, and in-process substitutes for the servers that a learner uses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import gymnasium as gym
import numpy as np
import pytorch_lightning as pl
import torch
from gymnasium import spaces
from torch import Tensor, nn

from actors.environments import ContinuousActions, DiscreteActions, EnvironmentSpec, specify
from learner import DQN, SAC
from learner.algorithms import ALGORITHMS, Algorithm
from learner.algorithms.off_policy import OffPolicyAlgorithm
from learner.batches import TransitionBatch
from learner.experience import LocalTransitions
from replay.messages import Push, SampleReply, TakeReply
from replay.server import ReplayServer
from replay.trajectory_server import TrajectoryServer
from replay.types import Layout, Segment, Trajectory

CARTPOLE = EnvironmentSpec("CartPole-v1", (4,), "float32", 1, DiscreteActions(2))
PENDULUM = EnvironmentSpec("Pendulum-v1", (3,), "float32", 1, ContinuousActions((1,), (-2.0,), (2.0,)))
EVERY_ALGORITHM = list(ALGORITHMS.values())


class Chain(gym.Env[Any, Any]):
    """Four states in a chain, and actions 0, left, and 1, right.

    A step to the right from the last state pays 1, leads to state 0, and ends the episode: by a termination, or by a
    truncation, which bootstraps from state 0.
    """

    observation_space = spaces.Discrete(4)
    action_space = spaces.Discrete(2)
    actions: ClassVar[list[int]] = []

    def __init__(self, truncates: bool = False) -> None:
        self._truncates = truncates

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self._state = int(self.np_random.integers(4))
        return self._state, {}

    def step(self, action: Any) -> tuple[int, float, bool, bool, dict[str, Any]]:
        Chain.actions.append(int(action))
        if action and self._state == 3:
            return 0, 1.0, not self._truncates, self._truncates, {}
        self._state = self._state + 1 if action else max(self._state - 1, 0)
        return self._state, 0.0, False, False, {}


class Tally(gym.Env[Any, Any]):
    """Episodes of 3 steps that pay 5 each. Counts the steps of all instances."""

    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float64)
    action_space = spaces.Discrete(2)
    steps: ClassVar[int] = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._step = 0
        return self.np_random.uniform(-1.0, 1.0, 2), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        Tally.steps += 1
        self._step += 1
        return self.np_random.uniform(-1.0, 1.0, 2), 5.0, self._step == 3, False, {}


class Toy(gym.Env[Any, Any]):
    """Observations are a random image, a random integer, or `(step of the episode, its length, noise, noise)`."""

    def __init__(
        self, observes: str = "vector", box: int = 0, lengths: Sequence[int] = (3,), pays: float | None = None
    ) -> None:
        """Set the possible lengths of episodes, the dimensions of the action box, and the reward, None for random."""
        self.observation_space = {
            "image": spaces.Box(0, 255, (36, 36, 3), np.uint8),
            "vector": spaces.Box(-np.inf, np.inf, (4,), np.float32),
            "discrete": spaces.Discrete(5),
        }[observes]
        self.action_space = spaces.Box(-2.0, 2.0, (box,), np.float32) if box else spaces.Discrete(3)
        self._observes, self._lengths, self._pays = observes, lengths, pays

    def _observe(self) -> Any:
        if self._observes == "image":
            return self.np_random.integers(0, 256, (36, 36, 3)).astype(np.uint8)
        if self._observes == "discrete":
            return int(self.np_random.integers(5))
        return np.array([self._step, self._length, *self.np_random.normal(size=2)], np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._step, self._length = 0, int(self.np_random.choice(self._lengths))
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self._step += 1
        reward = float(self.np_random.normal()) if self._pays is None else self._pays
        return self._observe(), reward, self._step == self._length, False, {}


def toy(**arguments: Any) -> EnvironmentSpec:
    """Return the specification of a `Toy` with the given arguments."""
    return specify("SquallToy-v0", arguments)


for name, entry, arguments in (
    ("SquallToy-v0", Toy, {}),
    ("SquallChain-v0", Chain, {}),
    ("SquallTruncatedChain-v0", Chain, {"truncates": True}),
    ("SquallTally-v0", Tally, {}),
):
    if name not in gym.registry:
        gym.register(name, entry_point=entry, kwargs=arguments)


def small_dqn(env: Any = CARTPOLE, **options: Any) -> DQN:
    """Return a DQN that starts to learn after a few steps."""
    small = {"batch_size": 8, "replay_size": 1_000, "warm_start_size": 16, "hidden_sizes": [8], "segment_length": 4}
    return DQN(env, **{**small, **options})


def small_sac(env: Any = PENDULUM, **options: Any) -> SAC:
    """Return a SAC that starts to learn after a few steps."""
    return small(SAC, env, **options)


Kind = TypeVar("Kind", bound=Algorithm)


def small(cls: type[Kind], env: Any, **options: Any) -> Kind:
    """Return an algorithm that starts to learn after a few steps."""
    off_policy = {"batch_size": 8, "replay_size": 1_000, "warm_start_size": 16, "segment_length": 4}
    return cls(env, **{"hidden_sizes": [8], **(off_policy if issubclass(cls, OffPolicyAlgorithm) else {}), **options})


def local_transitions(env: str = "SquallTally-v0", **options: Any) -> LocalTransitions:
    """Return the experience that a small DQN generates in this process."""
    experience = small_dqn(env, **options).train_dataloader()
    assert isinstance(experience, LocalTransitions)
    return experience


def quiet_trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Return a Trainer that writes nothing."""
    silence = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings = {**silence, "enable_model_summary": False, "accelerator": "cpu", "max_epochs": -1, **options}
    return pl.Trainer(callbacks=list(callbacks), **settings)


class UpdateWatcher(pl.Callback):
    """Calls `look(trainer, module)` after every update, and records `global_step`."""

    def __init__(self, look: Callable[[pl.Trainer, Any], None] = lambda trainer, module: None) -> None:
        self.look = look
        self.steps: list[int] = []

    def on_update_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps.append(trainer.global_step)
        self.look(trainer, pl_module)


class Batches:
    """An epoch of given batches, with the length that Lightning needs."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def random_batch(*shape: int, seed: int = 0) -> TransitionBatch:
    """Return CartPole-shaped transitions, `[*shape, ...]`, with TD errors below and above 1."""
    rng = torch.Generator().manual_seed(seed)
    return TransitionBatch(
        observation=torch.randn(*shape, 4, generator=rng),
        action=torch.randint(2, shape, generator=rng),
        reward=torch.randn(*shape, generator=rng) * 2,
        discount=0.9 * (torch.rand(*shape, generator=rng) < 0.7),
        next_observation=torch.randn(*shape, 4, generator=rng),
        ids=torch.zeros(shape, dtype=torch.int64),
        probability=torch.full(shape, 0.01),
        size=100,
    )


def box_batch(*shape: int, seed: int = 0) -> TransitionBatch:
    """Return Pendulum-shaped transitions, `[*shape, ...]`."""
    rng = torch.Generator().manual_seed(seed)
    return random_batch(*shape, seed=seed)._replace(
        observation=torch.randn(*shape, 3, generator=rng),
        action=torch.rand(*shape, 1, generator=rng) * 4 - 2,
        next_observation=torch.randn(*shape, 3, generator=rng),
    )


def make_trajectory(
    steps: int,
    *,
    seed: int = 0,
    ends: str = "terminated",
    gamma: float = 0.9,
    box: int = 0,
    version: int = 0,
) -> Trajectory:
    """Return one whole random episode: four numbers to observe, two actions or a box of `box` dimensions."""
    rng = np.random.default_rng(seed)
    discount = np.full(steps, gamma, np.float32)
    discount[-1] = gamma * (ends == "truncated")
    return Trajectory(
        observation=rng.normal(size=(steps + 1, 4)).astype(np.float32),
        action=rng.normal(size=(steps, box)).astype(np.float32) if box else rng.integers(2, size=steps),
        reward=rng.normal(size=steps).astype(np.float32),
        discount=discount,
        valid=np.ones(steps, np.bool_),
        log_probability=np.zeros(steps, np.float32),
        version=version,
        episodic=True,
    )


def clone_parameters(module: nn.Module) -> list[Tensor]:
    """Return clones of a module's parameters."""
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether two lists of parameters are equal, bit for bit."""
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def make_push(layout: Layout, sequence: int, steps: int | None = None) -> Push:
    """Return a push of one random segment, whose actions are `sequence` modulo 2."""
    steps, rng = steps or layout.segment_length, np.random.default_rng(sequence)
    row = np.arange(steps, dtype=np.int32)
    segment = Segment(
        frames=rng.normal(size=(steps + 1, *layout.frame_shape)).astype(np.float32),
        row=row,
        age=np.zeros(steps, np.uint8),
        bootstrap_row=row + np.int32(1),
        bootstrap_age=np.zeros(steps, np.uint8),
        action=np.full(steps, sequence % 2),
        reward=np.full(steps, sequence, np.float32),
        discount=np.full(steps, 0.9, np.float32),
    )
    return Push(0, 0, sequence, (segment,))


class InProcessReplay:
    """A `ReplayServer` with the interface of a `ReplayClient`. A sample that must wait inserts the next of `pushes`."""

    def __init__(self, server: ReplayServer, pushes: Iterator[Push] | None = None) -> None:
        self.server, self.pushes = server, pushes
        self.waiting_for: str | None = None
        self.samples = 0
        self.failure: BaseException | None = None
        self.updated: list[tuple[Any, Any]] = []

    def sample(self, k: int, batch_size: int, *, stop: threading.Event, ahead: bool = False) -> SampleReply | None:
        while not stop.is_set():
            if self.failure is not None:
                raise self.failure
            reply = self.server.sample(k, batch_size)
            self.waiting_for = reply.wait
            if reply.wait is None:
                self.samples += reply.batch is not None
                return reply
            push = None if self.pushes is None else next(self.pushes, None)
            if push is None:
                stop.wait(0.002)
            else:
                self.server.insert(push)
        return None

    def update_priorities(self, ids: Any, priorities: Any) -> None:
        self.updated.append((ids, priorities))


class InProcessQueue:
    """A `TrajectoryServer` with the interface of a `TrajectoryClient`. A take that must wait calls `fill`."""

    def __init__(self, server: TrajectoryServer, fill: Callable[[], None] | None = None) -> None:
        self.server, self.fill = server, fill
        self.waiting_for: str | None = None
        self.takes = 0
        self.published: list[int] = []

    def take(self, *, stop: threading.Event) -> TakeReply | None:
        while not stop.is_set():
            reply = self.server.take()
            self.waiting_for = reply.wait
            if reply.wait is None:
                self.takes += reply.trajectories is not None
                return reply
            if self.fill is None:
                stop.wait(0.002)
            else:
                self.fill()
        return None

    def publish(self, version: int) -> None:
        self.published.append(version)
        self.server.publish(version)
