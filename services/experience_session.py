"""What one Experience session has sent, checked and cut into segments exactly as a rollout worker's single lane is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

from actors.environments import EnvironmentSpec
from actors.rollout import RolloutSpec
from actors.segments import SegmentBuilder
from replay.types import Array, ConfigurationError, EpisodeResult, Moments, Segment
from services import squall_pb2 as pb
from services.grpc_errors import OutOfOrder
from services.wire import decode_array, decode_space, spaces_of

LARGEST_REWARD = 1e30
"""Rewards are kept as float32, and n of them are summed."""
MOST_CHARACTERS = 100


@dataclass(frozen=True)
class Content:
    """What is ready to be pushed; see `Push`."""

    segments: tuple[Segment, ...]
    episodes: tuple[EpisodeResult, ...]
    returns: Moments


class Session:
    """One environment outside, as one lane. Every message is checked in full before it changes anything.

    Where the run stacks frames the client sends single ones: they are stacked here, zero frames before an episode's
    first, so that the policy sees what the replay rebuilds, bit for bit.
    """

    def __init__(self, rollout: RolloutSpec, opening: pb.Open) -> None:
        """Compare the client's spaces with the run's.

        Raises:
            ConfigurationError: they differ, or cannot be; the text names both.
        """
        if len(opening.client) > MOST_CHARACTERS:
            raise ConfigurationError(f"client has at most {MOST_CHARACTERS} characters, got {len(opening.client)}")
        self._environment = rollout.policy.environment
        self._layout = rollout.layout
        self._dtype = _check_spaces(self._environment, self._layout.frame_shape, opening)
        self._gamma, self._clip, self._measure = rollout.gamma, rollout.clip_rewards, rollout.measure_returns
        self._builder = SegmentBuilder(self._layout, 1, rollout.gamma)
        self._no_action = np.zeros((1, *self._layout.action_shape), self._layout.action_dtype)
        self._action = self._no_action
        self._stack = np.zeros((self._layout.stack, *self._layout.frame_shape), self._layout.frame_dtype)
        self._begun = self._in_episode = False
        self._return, self._discounted, self._length = 0.0, 0.0, 0
        self._segments: list[Segment] = []
        self._episodes: list[EpisodeResult] = []
        self._returns = Moments()
        self.steps = 0
        """Steps that came, which is the number of the last one too."""

    @property
    def in_episode(self) -> bool:
        """Whether an action is asked for."""
        return self._in_episode

    @property
    def observation(self) -> Array:
        """The newest observation, as the policy sees it."""
        return self._stack[0].copy() if self._layout.stack == 1 else self._stack.copy()

    def reset(self, reset: pb.Reset) -> None:
        """Begin an episode; one that was going on is cut: what it has is flushed, and it is no finished episode.

        Raises:
            ConfigurationError: an observation that does not fit.
        """
        frame = self._frame(reset.observation)
        if self._in_episode:
            self._segments += self._builder.flush()
            self._begun = False
        self._stack[:] = 0
        self._show(frame)
        if self._begun:
            # The row after an episode's end, as under NEXT_STEP autoreset: no step, its action ignored.
            self._add(self._no_action, 0.0, False, False)
        else:
            self._builder.begin(self.observation[None])
        self._begun = self._in_episode = True
        self._return, self._discounted, self._length = 0.0, 0.0, 0

    def act(self, action: Array) -> None:
        """Take note of the action `[*action_shape]` that the next step answers."""
        self._action = np.asarray(action, self._layout.action_dtype)[None]

    def step(self, step: pb.Step) -> EpisodeResult | None:
        """Take a step; return the episode's result if it ended one.

        Raises:
            OutOfOrder: a gap, or no episode is going on.
            ConfigurationError: an observation or a reward that cannot be.
        """
        if step.number != self.steps + 1:
            raise OutOfOrder(f"step {step.number} came where step {self.steps + 1} comes next; open a new session")
        if not self._in_episode:
            raise OutOfOrder(f"step {step.number} came outside an episode; a Reset begins one")
        frame, reward = self._frame(step.observation), step.reward
        if not (math.isfinite(reward) and abs(reward) <= LARGEST_REWARD):
            raise ConfigurationError(f"a reward must be a number within +-{LARGEST_REWARD:g}, got {reward}")
        self.steps += 1
        self._show(frame)
        learned = float(np.clip(reward, -1.0, 1.0)) if self._clip else reward
        self._add(self._action, learned, step.terminated, step.truncated)
        self._return += reward
        self._length += 1
        if self._measure:
            self._discounted = self._gamma * self._discounted + learned
            self._returns = self._returns.merged(Moments.of(np.array([self._discounted])))
        if not (step.terminated or step.truncated):
            return None
        self._in_episode = False
        result = EpisodeResult(self._return, self._length)
        self._episodes.append(result)
        return result

    def _add(self, action: Array, reward: float, terminated: bool, truncated: bool) -> None:
        ended = np.array([terminated]), np.array([truncated])
        self._segments += self._builder.add(action, np.array([reward]), *ended, self.observation[None])

    def flush(self) -> None:
        """Make what is left ready, because nothing more will come."""
        if self._begun:
            self._segments += self._builder.flush()
        self._begun = self._in_episode = False

    def is_ready(self, *, rest: bool = False) -> bool:
        """Whether there is a segment to push, or with `rest` anything."""
        return bool(self._segments or (rest and self._episodes))

    def take(self) -> Content:
        """Return what is ready and forget it."""
        content = Content(tuple(self._segments), tuple(self._episodes), self._returns)
        self._segments, self._episodes, self._returns = [], [], Moments()
        return content

    def _show(self, frame: Array) -> None:
        self._stack[:-1] = self._stack[1:]
        self._stack[-1] = frame

    def _frame(self, message: pb.Array) -> Array:
        raw = decode_array(message, "an observation", dtype=self._dtype, shape=self._layout.frame_shape)
        with np.errstate(over="ignore"):
            frame = np.asarray(raw, self._layout.frame_dtype)
        if frame.dtype.kind == "f" and not np.isfinite(frame).all():
            raise ConfigurationError("an observation must hold finite float32 numbers, got NaN, infinity or larger")
        count = self._environment.observation_count
        if count is not None and not 0 <= int(frame) < count:
            raise ConfigurationError(f"an observation must lie in 0 .. {count - 1}, got {int(frame)}")
        return frame


def _check_spaces(environment: EnvironmentSpec, frame_shape: tuple[int, ...], opening: pb.Open) -> str:
    """Return the dtype in which observations will come: the run's own, or float64 where that is float32."""
    own_observations, own_actions = (
        decode_space(space, f"the run's {kind} space")
        for space, kind in zip(spaces_of(environment), ("observation", "action"), strict=True)
    )
    observations = decode_space(opening.observation_space, "observation_space")
    actions = decode_space(opening.action_space, "action_space")
    dtype, stacks = np.dtype(environment.observation_dtype), environment.frame_stack > 1
    narrowed = dtype == np.float32 and observations.dtype == np.float64
    alike = type(observations) is type(own_observations) and observations.shape == frame_shape
    if isinstance(observations, spaces.Discrete):
        alike = alike and observations == own_observations
    if not alike or not (narrowed or observations.dtype == dtype):
        hint = f"; the run stacks {environment.frame_stack} of them itself" if stacks else ""
        raise ConfigurationError(
            f"observation_space must be {_shown(own_observations, frame_shape)}{hint}, "
            f"got {_shown(observations, observations.shape)}"
        )
    if not _same_actions(actions, own_actions):
        raise ConfigurationError(f"action_space must be {own_actions}, got {actions}")
    return str(observations.dtype)


def _same_actions(actions: spaces.Space[Any], own: spaces.Space[Any]) -> bool:
    if not isinstance(actions, spaces.Box) or not isinstance(own, spaces.Box):
        return bool(actions == own)
    # Bounds may have come by way of another precision.
    return actions.shape == own.shape and all(
        np.allclose(theirs, mine, rtol=1e-6, atol=0.0)
        for theirs, mine in ((actions.low, own.low), (actions.high, own.high))
    )


def _shown(space: spaces.Space[Any], shape: tuple[int, ...] | None) -> str:
    return str(space) if isinstance(space, spaces.Discrete) else f"a Box of {space.dtype} of shape {list(shape or ())}"
