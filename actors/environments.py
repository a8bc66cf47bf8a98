"""Environment specifications, and the vector environments that are made from them.

A Gymnasium id determines the vector environment:

- Atari ids use ale-py's native vector environment with the standard DQN preprocessing.
- Ids with a registered vector implementation use that implementation.
- All other ids use a `SyncVectorEnv` whose lanes are recreated when they fail.

All follow Gymnasium's NEXT_STEP autoreset: the vector step after an episode's end resets the lane and ignores its
action.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
from ale_py.vector_env import AtariVectorEnv
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from actors.atari import RENDER_MODE, RenderedAtari, make_atari
from actors.rebuilding import RebuildingEnv
from replay.errors import ConfigurationError
from replay.types import Array, Layout

gym.register_envs(ale_py)

LONGEST_EPISODE = 200_000  # steps; a longer episode raises EnvironmentFailed where whole episodes are needed


@dataclass(frozen=True)
class DiscreteActions:
    """A discrete action space: actions 0 .. count - 1; the environment receives `start + action`."""

    count: int
    start: int = 0


@dataclass(frozen=True)
class ContinuousActions:
    """A box of continuous actions.

    Attributes:
        shape: shape of one action.
        low: lower bounds, in the order of the flattened action.
        high: upper bounds, in the same order.
        dtype: NumPy name of the dtype that the environment expects.
    """

    shape: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class EnvironmentSpec:
    """The description of an environment that rollout workers, learner, evaluation, and serving share.

    Attributes:
        id: Gymnasium id, or None for an external simulator, which Squall cannot make.
        observation_shape: shape of one observation, `()` for a Discrete observation space.
        observation_dtype: NumPy name of the dtype that observations are stored in; float64 is narrowed to float32.
        frame_stack: frames stacked in an observation, 1 without stacking.
        actions: the action space.
        observation_count: n of a Discrete observation space, else None.
        arguments: keyword arguments for the environment's constructor.
        search_path: folders appended to `sys.path` before the id's module is imported.
        description: the observation space and the action space as text.
    """

    id: str | None
    observation_shape: tuple[int, ...]
    observation_dtype: str
    frame_stack: int
    actions: DiscreteActions | ContinuousActions
    observation_count: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    search_path: tuple[str, ...] = ()
    description: str = ""

    def __post_init__(self) -> None:
        if 0 in self.observation_shape:
            raise ConfigurationError(f"observations must not be empty, got shape {self.observation_shape}")

    @property
    def is_image(self) -> bool:
        """Whether observations are images: three uint8 axes."""
        return len(self.observation_shape) == 3 and self.observation_dtype == "uint8"

    def plain(self) -> dict[str, Any]:
        """Return this specification as plain values; `specify` converts them back."""
        return {**asdict(self), "arguments": dict(self.arguments)}

    def layout(self, *, segment_length: int, n_steps: int) -> Layout:
        """Return the layout of this environment's experience."""
        discrete = isinstance(self.actions, DiscreteActions)
        return Layout(
            frame_shape=self.observation_shape if self.frame_stack == 1 else self.observation_shape[1:],
            frame_dtype=self.observation_dtype,
            stack=self.frame_stack,
            action_shape=() if isinstance(self.actions, DiscreteActions) else self.actions.shape,
            action_dtype="int64" if discrete else "float32",
            segment_length=segment_length,
            n_steps=n_steps,
        )

    def make(self, num_envs: int, *, rendered: bool = False) -> VectorEnv[Any, Any, Any]:
        """Make a vector environment of `num_envs` lanes.

        Args:
            num_envs: number of lanes.
            rendered: whether `render()` returns a frame of each lane, `[height, width, 3]` uint8. Rendering does not
                change the episodes of a seed.

        Raises:
            ConfigurationError: num_envs is not positive, the spec has no id, or the environment cannot be rendered.
        """
        if num_envs < 1:
            raise ConfigurationError(f"the number of environments must be positive, got {num_envs}")
        if self.id is None:
            raise ConfigurationError(
                "this specification describes an external simulator: it has no id to make an environment from"
            )
        return _make_vector(self.id, num_envs, self.arguments, self.search_path, rendered=rendered)

    def observe(self, observation: Array) -> Array:
        """Return a batch of raw observations in `observation_dtype`."""
        return np.asarray(observation, self.observation_dtype)

    def to_environment(self, action: Array) -> Array:
        """Return a batch of actions in the environment's numbering, range, and dtype."""
        if isinstance(self.actions, DiscreteActions):
            return action + self.actions.start if self.actions.start else action
        low = np.reshape(self.actions.low, self.actions.shape)
        # Clip in the environment's precision: a bound that is rounded to float32 may lie outside the box.
        exact = action.astype(self.actions.dtype)
        clipped: Array = np.clip(exact, low, np.reshape(self.actions.high, self.actions.shape))
        return clipped.astype(self.actions.dtype)


def specify(
    environment: str | EnvironmentSpec | Mapping[str, Any], arguments: Mapping[str, Any] | None = None
) -> EnvironmentSpec:
    """Return the specification of an environment.

    For an id, the environment is made once, to read its spaces.

    Args:
        environment: a Gymnasium id, also in the form `module:EnvId-v0`; or a specification, which is returned
            unchanged; or the plain values of a specification.
        arguments: keyword arguments for the environment's constructor.

    Raises:
        ConfigurationError: an unknown id (the error lists similar ids), a module that cannot be imported, arguments
            that the environment does not accept, or a space that Squall does not support.
    """
    if isinstance(environment, EnvironmentSpec):
        return environment
    if isinstance(environment, Mapping):
        kind = DiscreteActions if "count" in environment["actions"] else ContinuousActions
        return EnvironmentSpec(**{**environment, "actions": kind(**environment["actions"])})
    search_path = (os.getcwd(),) if ":" in environment else ()
    arguments = dict(arguments or {})
    env = _make_vector(environment, 1, arguments, search_path)
    try:
        return _describe(environment, env, arguments, search_path)
    finally:
        env.close()


def _describe(
    name: str, env: VectorEnv[Any, Any, Any], arguments: Mapping[str, Any], search_path: tuple[str, ...]
) -> EnvironmentSpec:
    observations, actions = env.single_observation_space, env.single_action_space
    count: int | None = None
    shape: tuple[int, ...] = ()
    if isinstance(observations, spaces.Discrete):
        if observations.start != 0:
            raise ConfigurationError(
                f"Discrete observations must start at 0; those of {name} start at {observations.start}"
            )
        count, dtype = int(observations.n), "int64"
    elif isinstance(observations, spaces.Box):
        shape, dtype = observations.shape, "float32" if observations.dtype.kind == "f" else str(observations.dtype)
    else:
        raise ConfigurationError(
            f"Squall needs Box or Discrete observations; {name} has {observations}. "
            f"Wrap the environment in gymnasium.wrappers.FlattenObservation and register the result as an environment"
        )
    action_space: DiscreteActions | ContinuousActions
    if isinstance(actions, spaces.Discrete):
        action_space = DiscreteActions(int(actions.n), int(actions.start))
    elif isinstance(actions, spaces.Box) and np.dtype(actions.dtype).kind == "f":
        low, high = (tuple(float(x) for x in np.ravel(bound)) for bound in (actions.low, actions.high))
        action_space = ContinuousActions(actions.shape, low, high, str(actions.dtype))
    else:
        raise ConfigurationError(f"Squall needs Discrete or floating-point Box actions; {name} has {actions}")
    return EnvironmentSpec(
        id=name,
        observation_shape=tuple(shape),
        observation_dtype=dtype,
        frame_stack=shape[0] if isinstance(env, AtariVectorEnv) and len(shape) == 3 and shape[0] > 1 else 1,
        actions=action_space,
        observation_count=count,
        arguments=arguments,
        search_path=search_path,
        description=f"observations {observations}, actions {actions}",
    )


def _find_gym_spec(name: str, search_path: tuple[str, ...]) -> Any:
    module, _, env_id = name.rpartition(":")
    if module:
        # Append, never prepend: a module in a user's folder must not replace one of Squall's packages.
        sys.path.extend(path for path in search_path if path not in sys.path)
        try:
            importlib.import_module(module)
        except Exception as error:
            raise ConfigurationError(
                f"cannot import the module of environment {name}: {type(error).__name__}: {error}"
            ) from error
    if env_id in gym.registry:
        return gym.spec(env_id)
    try:
        return gym.spec(env_id)
    except gym.error.Error as error:
        similar = difflib.get_close_matches(env_id, gym.registry, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(similar)}?" if similar else ""
        raise ConfigurationError(f"unknown environment {name}{hint}") from error


def family(name: str) -> str | None:
    """Return the family of an id: "atari", "mujoco", or None for all others."""
    spec = gym.registry.get(name)
    entry_point = str(spec.entry_point) if spec is not None else ""
    if entry_point == "ale_py.env:AtariEnv":
        return "atari"
    return "mujoco" if entry_point.startswith("gymnasium.envs.mujoco") else None


def _make_vector(
    name: str, num_envs: int, arguments: Mapping[str, Any], search_path: tuple[str, ...], *, rendered: bool = False
) -> VectorEnv[Any, Any, Any]:
    spec = _find_gym_spec(name, search_path)
    atari = spec.entry_point == "ale_py.env:AtariEnv"
    native = atari and "obs_type" not in arguments
    if rendered and not native:
        _check_render_modes(name, _make_vector(name, 1, arguments, search_path))
        arguments = {**arguments, "render_mode": RENDER_MODE}
    try:
        if native:
            kind = RenderedAtari if rendered else AtariVectorEnv
            return make_atari(kind, name, num_envs, {**spec.kwargs, **arguments})
        env: VectorEnv[Any, Any, Any]
        if spec.vector_entry_point is not None and not atari:
            env = gym.make_vec(spec, num_envs=num_envs, **arguments)
        else:
            make_lane = lambda: RebuildingEnv(lambda: gym.make(spec, disable_env_checker=True, **arguments))  # noqa: E731
            env = SyncVectorEnv([make_lane] * num_envs)
    except (TypeError, gym.error.Error, ImportError) as error:
        raise ConfigurationError(f"cannot make environment {name}: {error}") from error
    if env.metadata.get("autoreset_mode") is not AutoresetMode.NEXT_STEP:
        env.close()
        raise ConfigurationError(f"the vector environment of {name} must follow Gymnasium's NEXT_STEP autoreset")
    return env


def _check_render_modes(name: str, env: VectorEnv[Any, Any, Any]) -> None:
    modes = env.metadata.get("render_modes") or ()
    env.close()
    if RENDER_MODE not in modes:
        supported = f"its render modes are {', '.join(modes)}" if modes else "it has no render mode"
        raise ConfigurationError(f"{name} cannot be recorded: a video needs render mode {RENDER_MODE}, {supported}")


class SingleEnvironment(gym.Env[Any, Any]):
    """A single environment, preprocessed like one lane of a rollout worker's vector environment."""

    def __init__(self, spec: EnvironmentSpec, seed: int | None = None) -> None:
        """Make the environment; `seed` is used by the first reset if that reset gets no seed."""
        self._spec, self._seed = spec, seed
        self._env = spec.make(1)
        self.observation_space, self.action_space = self._env.single_observation_space, self._env.single_action_space
        self.metadata = self._env.metadata

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode and return its first observation and info."""
        seed, self._seed = self._seed if seed is None else seed, None  # 0 is a valid seed
        observation, info = self._env.reset(seed=seed, options=options)
        return self._spec.observe(observation)[0], info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take one step.

        Args:
            action: number of a discrete action, from 0, or a continuous action, which is clipped to the box.
        """
        batch = self._spec.to_environment(np.asarray(action)[None])
        observation, reward, terminated, truncated, info = self._env.step(batch)
        return self._spec.observe(observation)[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def close(self) -> None:
        """Close the environment."""
        self._env.close()


def seeds_for(env: VectorEnv[Any, Any, Any], sequence: np.random.SeedSequence) -> Any:
    """Return the argument of `env.reset(seed=...)` that gives each lane a different seed.

    An implementation that is neither `AtariVectorEnv` nor `SyncVectorEnv` gets one seed for all its lanes.
    """
    seeds = [int(word & 0x7FFFFFFF) for word in sequence.generate_state(env.num_envs)]
    if isinstance(env, AtariVectorEnv):
        return np.array(seeds)
    return seeds if isinstance(env, SyncVectorEnv) else seeds[0]
