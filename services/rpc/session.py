"""One session of the Experience service: it checks the client's messages and cuts its steps into segments.

The segments are exactly those of a rollout worker with a single lane.
"""

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

MAX_REWARD = 1e30
"""Maximum absolute value of a reward: rewards are stored as float32, and n of them are summed."""
MAX_CLIENT_NAME_LENGTH = 100


@dataclass(frozen=True)
class PushContent:
    """The content of one push of a session; see `Push`."""

    segments: tuple[Segment, ...]
    episodes: tuple[EpisodeResult, ...]
    returns: Moments


class Session:
    """One external environment, as a single lane. Every message is checked completely before it changes anything.

    If the run stacks frames, the client sends single frames and the session stacks them, with zero frames before the
    first frame of an episode. The policy then sees exactly the stacks that the replay rebuilds.

    Attributes:
        steps: number of received steps, which is also the number of the last step.
    """

    def __init__(self, rollout: RolloutSpec, opening: pb.Open) -> None:
        """Compare the client's spaces with the spaces of the run.

        Raises:
            ConfigurationError: different or invalid spaces; the error names both.
        """
        if len(opening.client) > MAX_CLIENT_NAME_LENGTH:
            raise ConfigurationError(
                f"client has at most {MAX_CLIENT_NAME_LENGTH} characters, got {len(opening.client)}"
            )
        self._environment = rollout.policy.environment
        self._layout = rollout.layout
        self._dtype = _check_spaces(self._environment, self._layout.frame_shape, opening)
        self._gamma, self._clip_rewards = rollout.gamma, rollout.clip_rewards
        self._track_return_statistics = rollout.track_return_statistics
        self._builder = SegmentBuilder(self._layout, 1, rollout.gamma)
        self._no_action = np.zeros((1, *self._layout.action_shape), self._layout.action_dtype)
        self._action = self._no_action
        self._stack = np.zeros((self._layout.stack, *self._layout.frame_shape), self._layout.frame_dtype)
        self._builder_has_rows = self._in_episode = False
        self._episode_return, self._discounted_return, self._length = 0.0, 0.0, 0
        self._segments: list[Segment] = []
        self._episodes: list[EpisodeResult] = []
        self._returns = Moments()
        self.steps = 0

    @property
    def observation(self) -> Array:
        """The newest observation, as the policy sees it."""
        return self._stack[0].copy() if self._layout.stack == 1 else self._stack.copy()

    def reset(self, reset: pb.Reset) -> None:
        """Begin an episode. A running episode is cut: its steps are kept, but it does not count as a finished episode.

        Raises:
            ConfigurationError: an invalid observation.
        """
        frame = self._decode_frame(reset.observation)
        if self._in_episode:
            self._segments += self._builder.flush()
            self._builder_has_rows = False
        self._stack[:] = 0
        self._add_frame(frame)
        if self._builder_has_rows:
            # The row after an episode's end, as under NEXT_STEP autoreset: it is no step, and its action is ignored.
            self._add_row(self._no_action, 0.0, False, False)
        else:
            self._builder.begin(self.observation[None])
        self._builder_has_rows = self._in_episode = True
        self._episode_return, self._discounted_return, self._length = 0.0, 0.0, 0

    def act(self, action: Array) -> None:
        """Store the action `[*action_shape]` that leads to the next step."""
        self._action = np.asarray(action, self._layout.action_dtype)[None]

    def step(self, step: pb.Step) -> EpisodeResult | None:
        """Add a step; return the episode's result if the step ended the episode.

        Raises:
            OutOfOrder: a missing step, or a step outside an episode.
            ConfigurationError: an invalid observation or reward.
        """
        if step.number != self.steps + 1:
            raise OutOfOrder(f"expected step {self.steps + 1}, got step {step.number}; open a new session")
        if not self._in_episode:
            raise OutOfOrder(f"step {step.number} came outside an episode; send a Reset first")
        frame, reward = self._decode_frame(step.observation), step.reward
        if not (math.isfinite(reward) and abs(reward) <= MAX_REWARD):
            raise ConfigurationError(f"a reward must be a number within +-{MAX_REWARD:g}, got {reward}")
        self.steps += 1
        self._add_frame(frame)
        learner_reward = float(np.clip(reward, -1.0, 1.0)) if self._clip_rewards else reward
        self._add_row(self._action, learner_reward, step.terminated, step.truncated)
        self._episode_return += reward
        self._length += 1
        if self._track_return_statistics:
            self._discounted_return = self._gamma * self._discounted_return + learner_reward
            self._returns = self._returns.merged(Moments.of(np.array([self._discounted_return])))
        if not (step.terminated or step.truncated):
            return None
        self._in_episode = False
        result = EpisodeResult(self._episode_return, self._length)
        self._episodes.append(result)
        return result

    def _add_row(self, action: Array, reward: float, terminated: bool, truncated: bool) -> None:
        ended = np.array([terminated]), np.array([truncated])
        self._segments += self._builder.add(action, np.array([reward]), *ended, self.observation[None]) or ()

    def flush(self) -> None:
        """Cut the remaining steps into segments at the end of the session."""
        if self._builder_has_rows:
            self._segments += self._builder.flush()
        self._builder_has_rows = self._in_episode = False

    def is_ready(self, *, rest: bool = False) -> bool:
        """Return whether there is a segment to push, or, with `rest`, a segment or an episode result."""
        return bool(self._segments or (rest and self._episodes))

    def take(self) -> PushContent:
        """Return all content that is ready to be pushed, and remove it from the session."""
        content = PushContent(tuple(self._segments), tuple(self._episodes), self._returns)
        self._segments, self._episodes, self._returns = [], [], Moments()
        return content

    def _add_frame(self, frame: Array) -> None:
        self._stack[:-1] = self._stack[1:]
        self._stack[-1] = frame

    def _decode_frame(self, message: pb.Array) -> Array:
        raw = decode_array(message, "an observation", dtype=self._dtype, shape=self._layout.frame_shape)
        with np.errstate(over="ignore"):
            frame = np.asarray(raw, self._layout.frame_dtype)
        if frame.dtype.kind == "f" and not np.isfinite(frame).all():
            raise ConfigurationError("an observation must contain finite float32 numbers, got NaN, infinity, or larger")
        count = self._environment.observation_count
        if count is not None and not 0 <= int(frame) < count:
            raise ConfigurationError(f"an observation must lie in 0 .. {count - 1}, got {int(frame)}")
        return frame


def _check_spaces(environment: EnvironmentSpec, frame_shape: tuple[int, ...], opening: pb.Open) -> str:
    """Return the dtype of the client's observations: that of the run, or float64 if the run's is float32.

    A space is decoded only if its size equals that of the run's space: a message of a few bytes may describe the bounds
    of millions of elements.
    """
    own_observations, own_actions = spaces_of(environment)
    if own_observations.HasField("box"):
        own_observations.box.shape[:] = frame_shape
    observations, actions = opening.observation_space, opening.action_space
    dtype, own_dtype = observations.box.dtype, own_observations.box.dtype
    narrowed = (dtype, own_dtype) == (pb.DTYPE_FLOAT64, pb.DTYPE_FLOAT32)
    if not _same_size(observations, own_observations) or not (narrowed or dtype == own_dtype):
        stack = environment.frame_stack
        hint = f" (single frames, of which the run stacks {stack})" if stack > 1 else ""
        raise ConfigurationError(
            f"observation_space must be {describe_space(own_observations)}{hint}, got {describe_space(observations)}"
        )
    if not _same_size(actions, own_actions):
        raise ConfigurationError(f"action_space must be {describe_space(own_actions)}, got {describe_space(actions)}")
    space, own_space = decode_space(actions, "action_space"), decode_space(own_actions, "the run's action space")
    if not _same_bounds(space, own_space):
        raise ConfigurationError(f"action_space must be {own_space}, got {space}")
    return str(decode_space(observations, "observation_space").dtype)


def _same_size(space: pb.Space, own: pb.Space) -> bool:
    same_kind = space.WhichOneof("kind") == own.WhichOneof("kind")
    return same_kind and space.discrete.n == own.discrete.n and space.box.shape == own.box.shape


def _same_bounds(space: spaces.Space[Any], own: spaces.Space[Any]) -> bool:
    if not isinstance(space, spaces.Box) or not isinstance(own, spaces.Box):
        return bool(space == own)
    # Approximately, because the client may have computed its bounds in another precision.
    return all(
        np.allclose(bound, own_bound, rtol=1e-6, atol=0.0)
        for bound, own_bound in ((space.low, own.low), (space.high, own.high))
    )
