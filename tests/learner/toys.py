"""Small environments, batches, and stand-ins for the processes around a learner."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytorch_lightning as pl
import torch
from gymnasium import spaces
from torch import Tensor, nn

from actors.environments import DiscreteActions, EnvironmentSpec
from learner import DQN
from learner.experience import TransitionBatch
from replay.server import ReplayServer
from replay.types import Layout, Push, SampleReply, Segment

CARTPOLE = EnvironmentSpec("CartPole-v1", (4,), "float32", 1, DiscreteActions(2))


class Chain(gym.Env[Any, Any]):
    """Four states in a row, left and right. To step right from the last one pays 1, leads to state 0 and ends.

    The end is a termination, or a truncation, after which the values go on from state 0.
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
    """Episodes of 3 steps that pay 5 each; counts the steps taken in all of its instances."""

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


for name, entry, arguments in (
    ("SquallChain-v0", Chain, {}),
    ("SquallTruncatedChain-v0", Chain, {"truncates": True}),
    ("SquallTally-v0", Tally, {}),
):
    if name not in gym.registry:
        gym.register(name, entry_point=entry, kwargs=arguments)


def small_dqn(env: Any = CARTPOLE, **options: Any) -> DQN:
    """Make a DQN that begins to learn after a few steps."""
    small = {"batch_size": 8, "replay_size": 1_000, "warm_start_size": 16, "hidden_sizes": [8], "segment_length": 4}
    return DQN(env, **{**small, **options})


def quiet_trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Make a Trainer that writes nothing."""
    silence = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings = {**silence, "enable_model_summary": False, "accelerator": "cpu", "max_epochs": -1, **options}
    return pl.Trainer(callbacks=list(callbacks), **settings)


class UpdateWatcher(pl.Callback):
    """Calls `look(trainer, module)` after every update, and remembers `global_step` there."""

    def __init__(self, look: Callable[[pl.Trainer, Any], None] = lambda trainer, module: None) -> None:
        self.look = look
        self.steps: list[int] = []

    def on_update_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps.append(trainer.global_step)
        self.look(trainer, pl_module)


class Batches:
    """An epoch of given batches, sized as Lightning wants it."""

    def __init__(self, batches: Sequence[TransitionBatch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[TransitionBatch]:
        return iter(self.batches)


def random_batch(*shape: int, seed: int = 0) -> TransitionBatch:
    """Make CartPole-shaped transitions, `[*shape, ...]`, with errors on both sides of Huber's corner."""
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


def copies(module: nn.Module) -> list[Tensor]:
    """Return copies of a module's parameters."""
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether two lists of parameters are equal, bit for bit."""
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def make_push(layout: Layout, sequence: int, steps: int | None = None) -> Push:
    """Make a push of one segment of noise whose actions are the push's number modulo 2."""
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
    """A `ReplayServer` behind the face of a `ReplayClient`; a sample that has to wait pushes what `pushes` holds."""

    def __init__(self, server: ReplayServer, pushes: Iterator[Push] | None = None) -> None:
        self.server, self.pushes = server, pushes
        self.waiting_for: str | None = None
        self.samples = 0
        self.failure: BaseException | None = None
        self.updated: list[tuple[Any, Any]] = []

    def sample(self, k: int, batch_size: int, *, stop: threading.Event) -> SampleReply | None:
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
