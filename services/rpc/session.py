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
from replay.errors import ConfigurationError
from replay.types import Array, EpisodeResult, Moments, Segment
from services.errors import OutOfOrder
from services.rpc import squall_pb2 as pb
from services.rpc.codec import decode_array, decode_space, describe_space, spaces_of

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
        self._gamma, self._clip, self._measure = rollout.gamma, rollout.clip_rewards, rollout.track_return_statistics
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
        self._segments += self._builder.add(action, np.array([reward]), *ended, self.observation[None]) or ()

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
    """Return the dtype in which observations will come: the run's own, or float64 where that is float32.

    Only spaces of the run's own size are decoded: a few bytes may stand for the bounds of millions of elements.
    """
    own_observations, own_actions = spaces_of(environment)
    if own_observations.HasField("box"):
        own_observations.box.shape[:] = frame_shape
    observations, actions = opening.observation_space, opening.action_space
    dtype, own_dtype = observations.box.dtype, own_observations.box.dtype
    narrowed = (dtype, own_dtype) == (pb.DTYPE_FLOAT64, pb.DTYPE_FLOAT32)
    if not _same_size(observations, own_observations) or not (narrowed or dtype == own_dtype):
        stacks = environment.frame_stack
        hint = f"; the run stacks {stacks} of them itself" if stacks > 1 else ""
        raise ConfigurationError(
            f"observation_space must be {describe_space(own_observations)}{hint}, got {describe_space(observations)}"
        )
    if not _same_size(actions, own_actions):
        raise ConfigurationError(f"action_space must be {describe_space(own_actions)}, got {describe_space(actions)}")
    theirs, mine = decode_space(actions, "action_space"), decode_space(own_actions, "the run's action space")
    if not _same_bounds(theirs, mine):
        raise ConfigurationError(f"action_space must be {mine}, got {theirs}")
    return str(decode_space(observations, "observation_space").dtype)


def _same_size(space: pb.Space, own: pb.Space) -> bool:
    same_kind = space.WhichOneof("kind") == own.WhichOneof("kind")
    return same_kind and space.discrete.n == own.discrete.n and space.box.shape == own.box.shape


def _same_bounds(space: spaces.Space[Any], own: spaces.Space[Any]) -> bool:
    if not isinstance(space, spaces.Box) or not isinstance(own, spaces.Box):
        return bool(space == own)
    # They may have come by way of another precision.
    return all(
        np.allclose(theirs, mine, rtol=1e-6, atol=0.0)
        for theirs, mine in ((space.low, own.low), (space.high, own.high))
    )
