"""Small environments and policies for tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

from actors.environments import DiscreteActions, EnvironmentSpec
from actors.policies import Action, Policy, PolicySpec
from replay.types import Array


class ShortEpisodes(gym.Env[Any, Any]):
    """Episodes of 1 to 7 steps that end by termination, truncation, or both; rewards and observations are noise."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = spaces.Discrete(3, start=1)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        self._left = int(self.np_random.integers(1, 8))
        return self.np_random.normal(size=3), {}

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self._left -= 1
        ends = [(True, False), (False, True), (True, True)][self.np_random.integers(3)]
        terminated, truncated = ends if self._left == 0 else (False, False)
        return self.np_random.normal(size=3), float(self.np_random.normal()), terminated, truncated, {}


class SlowSteps(ShortEpisodes):
    """`ShortEpisodes` with 20 ms per step."""

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        time.sleep(0.02)
        return super().step(action)


class ShortStacks(gym.Env[Any, Any]):
    """Short episodes with stacks of four frames, zero frames before the first frame, and actions in a box."""

    observation_space = spaces.Box(0, 255, (4, 2, 3), np.uint8)
    action_space = spaces.Box(-2.0, 2.0, (2,), np.float32)

    def _observe(self) -> Array:
        return np.stack(([np.zeros((2, 3), np.uint8)] * 3 + self._frames)[-4:])

    def _frame(self) -> Array:
        return self.np_random.integers(1, 256, (2, 3)).astype(np.uint8)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        self._left = int(self.np_random.integers(1, 8))
        self._frames = [self._frame()]
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self._left -= 1
        self._frames.append(self._frame())
        terminated = self._left == 0 and bool(self.np_random.random() < 0.5)
        return self._observe(), float(self.np_random.normal()), terminated, self._left == 0, {}


@dataclass(frozen=True)
class Script:
    """The behavior of one instance of `Scripted`.

    Attributes:
        length: steps of each episode.
        reward: reward of each step.
        raises_at: numbers of the instance's steps, from 1, that raise.
        resets_that_raise: numbers of the instance's resets, from 1, that raise.
        truncates: whether episodes end by truncation instead of termination.
    """

    length: int = 5
    reward: float = 1.0
    raises_at: frozenset[int] = frozenset()
    resets_that_raise: frozenset[int] = frozenset()
    truncates: bool = False


@dataclass
class Scenario:
    """The scripts of the instances of `Scripted`, numbered in the order of their creation, and a record of events.

    Attributes:
        scripts: instance -> script.
        default: script of all other instances.
        made: number of instances made.
        closed: instances that were closed, in order.
        seeds: seeds of all resets, in order.
    """

    scripts: Mapping[int, Script] = field(default_factory=dict)
    default: Script = Script()
    made: int = 0
    closed: list[int] = field(default_factory=list)
    seeds: list[int | None] = field(default_factory=list)


class Scripted(gym.Env[Any, Any]):
    """Observations are `(instance, episode, step of the episode)`, all from 0; a script determines the failures."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Discrete(2)
    scenario = Scenario()

    def __init__(self) -> None:
        scenario = Scripted.scenario
        self.instance = scenario.made
        scenario.made += 1
        self._script = scenario.scripts.get(self.instance, scenario.default)
        self._resets = self._steps = self._step = 0

    def _observe(self) -> Array:
        return np.array([self.instance, self._resets - 1, self._step], np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        Scripted.scenario.seeds.append(seed)
        self._resets += 1
        self._step = 0
        if self._resets in self._script.resets_that_raise:
            raise RuntimeError(f"instance {self.instance} cannot reset")
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        if self._steps in self._script.raises_at:
            raise RuntimeError(f"instance {self.instance} broke at step {self._steps}")
        self._step += 1
        ended = self._step == self._script.length
        truncated = self._script.truncates and ended
        # A user may choose the key "failure"; it does not mark a failure.
        return self._observe(), self._script.reward, ended and not truncated, truncated, {"failure": False}

    def close(self) -> None:
        Scripted.scenario.closed.append(self.instance)


@contextmanager
def scripted(scripts: Mapping[int, Script] | None = None, default: Script = Script()) -> Iterator[Scenario]:
    """Apply `scripts` to the instances of `SquallScripted-v0` that are made inside the block."""
    Scripted.scenario = Scenario(scripts or {}, default)
    try:
        yield Scripted.scenario
    finally:
        Scripted.scenario = Scenario()


for name, entry in (
    ("SquallShort-v0", ShortEpisodes),
    ("SquallSlow-v0", SlowSteps),
    ("SquallStacks-v0", ShortStacks),
    ("SquallScripted-v0", Scripted),
):
    if name not in gym.registry:
        gym.register(name, entry_point=entry)


class RandomPolicy(Policy):
    """Random actions of any kind, with invented log-probabilities; records the observations in `shown`."""

    def begin(self, seed: np.random.SeedSequence, worker: int = 0, workers: int = 1) -> None:
        super().begin(seed, worker, workers)
        self.shown: list[Array] = []

    def act(self, observation: Array, *, step: int, greedy: bool = False) -> Action:
        self.shown.append(observation)
        action = random_actions(self.spec.environment, len(observation), self.rng)
        return Action(action, self.rng.normal(size=len(observation)).astype(np.float32))


def random_actions(environment: EnvironmentSpec, lanes: int, rng: np.random.Generator) -> Array:
    actions = environment.actions
    if isinstance(actions, DiscreteActions):
        return rng.integers(actions.count, size=lanes)
    return rng.uniform(actions.low, actions.high, (lanes, *actions.shape)).astype(np.float32)


class ConstantPolicy(Policy):
    """The same action in every lane, which the weights contain; `after` has functions to call at a number of calls."""

    def __init__(self, spec: PolicySpec) -> None:
        super().__init__(spec)
        self.register_buffer("action", torch.tensor(0))
        self.after: dict[int, Callable[[], None]] = {}
        self.steps: list[int] = []
        self.taken: list[int] = []

    def act(self, observation: Array, *, step: int, greedy: bool = False) -> Action:
        self.steps.append(step)
        self.taken.append(int(self.action))  # type: ignore[arg-type]
        self.after.get(len(self.steps), lambda: None)()
        return Action(np.full(len(observation), self.taken[-1]))


TEST_POLICIES: dict[str, type[Policy]] = {"random": RandomPolicy, "constant": ConstantPolicy}
