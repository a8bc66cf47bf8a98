"""Builders that turn vector steps into segments (off-policy, n-step) and trajectories (on-policy).

Both builders receive one vector step at a time. A row is one position in a lane's history: an observation and the
action taken in it. Under NEXT_STEP autoreset an episode's last row holds its final observation. The environment ignores
the action in that row, so the row is no environment step, and the next row is the first of the new episode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.environments import LONGEST_EPISODE
from replay.errors import EnvironmentFailed
from replay.messages import Permit
from replay.types import Array, Layout, Segment, Segments, Trajectory


class SegmentBuilder:
    """Cuts the rows of B lanes into segments of `layout.segment_length` rows, all lanes at the same time."""

    def __init__(self, layout: Layout, lanes: int, gamma: float) -> None:
        """Allocate the arrays for one segment of each lane; call `begin` next.

        Args:
            layout: shapes and dtypes of the experience, the segment length, and n.
            lanes: number of lanes.
            gamma: discount of one step.
        """
        self.layout, self.lanes, self.gamma = layout, lanes, gamma
        rows = layout.max_segment_frames
        self._lead = layout.stack - 1  # frames before a segment's first row, for the stacks of its first rows
        self._frames = np.zeros((rows, lanes, *layout.frame_shape), layout.frame_dtype)
        self._age = np.zeros((rows, lanes), np.uint8)
        self._action = np.zeros((rows, lanes, *layout.action_shape), layout.action_dtype)
        self._reward = np.zeros((rows, lanes), np.float64)
        self._terminated = np.zeros((rows, lanes), np.bool_)
        self._ended = np.zeros((rows, lanes), np.bool_)
        self._is_step = np.zeros((rows, lanes), np.bool_)
        self._after_end = np.zeros(lanes, np.bool_)
        self._rows = 0

    def begin(self, observation: Array) -> None:
        """Start from the observations of a reset, `[B, *observation_shape]`; drop all rows that are not cut yet."""
        self._rows = self._lead
        self._after_end = np.zeros(self.lanes, np.bool_)
        self._append(observation, np.zeros(self.lanes, np.uint8))

    def _append(self, observation: Array, age: Array) -> None:
        self._frames[self._rows] = observation[:, -1] if self._lead else observation
        self._age[self._rows] = age
        self._rows += 1

    def add(
        self,
        action: Array,
        reward: Array,
        terminated: Array,
        truncated: Array,
        observation: Array,
        failed: Array | None = None,
    ) -> Segments | None:
        """Add one vector step; return the completed segments, at most one per lane, or None.

        Args:
            action: `[B, *action_shape]`, taken in the newest row.
            reward: `[B]`, as the learner should see it.
            terminated: `[B]` bool.
            truncated: `[B]` bool.
            observation: `[B, *observation_shape]`, of the next row.
            failed: `[B]` bool, lanes whose environment failed in this step; `truncated` must be True for these lanes.
                Their unsent steps, including this step, are dropped.
        """
        row, after_end = self._rows - 1, self._after_end
        self._action[row] = action
        self._reward[row] = reward
        self._terminated[row] = terminated
        self._after_end = self._ended[row] = (terminated | truncated) & ~after_end
        self._is_step[row] = ~after_end
        age = self._age[row]
        if self._lead:
            # A frame's age counts the frames since the reset, up to `stack - 1`.
            age = np.where(after_end, 0, np.minimum(age, self._lead - 1) + 1)
        self._append(observation, age)
        if failed is not None and failed.any():
            # Do this before the cut: the failing step would bootstrap from the recreated environment's episode.
            self._is_step[:, failed] = False
        if self._rows < self.layout.max_segment_frames:
            return None
        segments = self._cut(self._lead, self._lead + self.layout.segment_length)
        self._keep_tail()
        return segments

    def _keep_tail(self) -> None:
        tail = self._lead + self.layout.n_steps
        for array in (
            self._frames,
            self._age,
            self._action,
            self._reward,
            self._terminated,
            self._ended,
            self._is_step,
        ):
            array[:tail] = array[self._rows - tail : self._rows]
        self._rows = tail

    def flush(self) -> Sequence[Segment]:
        """Cut the remaining rows; call `begin` before the next `add`.

        The last n - 1 steps have shorter returns: k < n rewards, and a discount of gamma**k.
        """
        stop, length = self._rows - 1, self.layout.segment_length
        # With the tail of n - 1 steps, the remaining rows may exceed one segment.
        cuts = [self._cut(first, min(first + length, stop)) for first in range(self._lead, stop, length)]
        self._rows = 0
        return cuts[0] if len(cuts) == 1 else [segment for cut in cuts for segment in cut]

    def _cut(self, first: int, stop: int) -> Segments:
        """Make segments that start at the steps in rows `first` to `stop - 1`."""
        last = self._rows - 1
        rows = np.arange(first, stop)
        continues = self._is_step[first:stop].copy()
        reward, discount = np.zeros(continues.shape), np.ones(continues.shape)
        bootstrap = np.repeat(rows[:, None], self.lanes, axis=1)
        for k in range(self.layout.n_steps):
            later = np.minimum(rows + k, last - 1)
            continues &= (rows + k < last)[:, None]
            reward += np.where(continues, discount * self._reward[later], 0.0)
            discount = np.where(continues, discount * self.gamma * ~self._terminated[later], discount)
            bootstrap += continues
            continues &= ~self._ended[later]
        # From here on the order is lane by lane: each lane's steps, then the frames that these steps need.
        base = first - self._lead
        lane, start = np.nonzero(self._is_step[first:stop].T)
        row, bootstrap_row = rows[start], bootstrap[start, lane]
        steps = np.bincount(lane, minlength=self.lanes)
        frames = np.zeros(self.lanes, np.int64)
        frames[steps > 0] = bootstrap_row[np.cumsum(steps)[steps > 0] - 1] + 1 - base
        needed = np.arange(self._rows - base) < frames[:, None]
        return Segments(
            frames=self._frames[base : self._rows].swapaxes(0, 1)[needed],
            row=(row - base).astype(np.int32),
            age=self._age[row, lane],
            bootstrap_row=(bootstrap_row - base).astype(np.int32),
            bootstrap_age=self._age[bootstrap_row, lane],
            action=self._action[row, lane],
            reward=reward[start, lane].astype(np.float32),
            discount=discount[start, lane].astype(np.float32),
            frame_counts=frames[steps > 0],
            step_counts=steps[steps > 0],
        )


class TrajectoryBuilder:
    """Builds one trajectory for each lane that has a permit: T rows, or one whole episode."""

    def __init__(self, lanes: int, gamma: float, *, rows: int | None) -> None:
        """Prepare an empty trajectory for each lane; call `begin` next.

        Args:
            lanes: number of lanes.
            gamma: discount of one step.
            rows: rows in a trajectory; None means that a trajectory is a whole episode.
        """
        self.lanes, self.gamma, self.rows = lanes, gamma, rows
        self._permits: list[Permit | None] = [None] * lanes
        self._unfinished: list[list[Any]] = [[] for _ in range(lanes)]
        self._after_end = np.zeros(lanes, np.bool_)
        self._observation: Array | None = None

    def begin(self, observation: Array) -> None:
        """Start from the observations of a reset, `[B, *observation_shape]`; drop all permits."""
        self._observation = observation
        self._permits = [None] * self.lanes
        self._unfinished = [[] for _ in range(self.lanes)]
        self._after_end[:] = False

    @property
    def permitted(self) -> set[int]:
        """Lanes that have a permit."""
        return {lane for lane in range(self.lanes) if self._permits[lane] is not None}

    @property
    def idle(self) -> list[int]:
        """Lanes without a permit that can begin a trajectory with the next row.

        A whole episode begins at a reset, so a lane inside an episode is not idle in that mode.
        """
        return [lane for lane in range(self.lanes) if self._permits[lane] is None and self._may_begin(lane)]

    def _may_begin(self, lane: int) -> bool:
        return self.rows is not None or not self._unfinished[lane]

    @property
    def busy(self) -> bool:
        """Whether any lane has a permit."""
        return bool(self.permitted)

    def assign(self, lane: int, permit: Permit) -> None:
        """Begin a trajectory with the lane's next row, under `permit`; a whole episode must follow a reset."""
        self._permits[lane] = permit
        self._unfinished[lane] = []

    def add(
        self,
        action: Array,
        log_probability: Array,
        reward: Array,
        terminated: Array,
        truncated: Array,
        observation: Array,
        failed: Array | None = None,
    ) -> list[tuple[Permit, Trajectory]]:
        """Add one vector step; return the completed trajectories with their permits.

        A lane that failed restarts its trajectory under the same permit.

        Args:
            action: `[B, *action_shape]`, taken in the newest row.
            log_probability: `[B]`, of the actions.
            reward: `[B]`, as the learner should see it.
            terminated: `[B]` bool.
            truncated: `[B]` bool.
            observation: `[B, *observation_shape]`, of the next row.
            failed: `[B]` bool, lanes whose environment failed in this step.

        Raises:
            EnvironmentFailed: an episode is longer than `LONGEST_EPISODE`.
        """
        assert self._observation is not None, "call begin before add"
        complete = []
        for lane in range(self.lanes):
            if failed is not None and failed[lane]:
                self._unfinished[lane] = []
                self._after_end[lane] = True
                continue
            valid = not self._after_end[lane]
            ended = valid and bool(terminated[lane] or truncated[lane])
            discount = self.gamma * (not terminated[lane]) if valid else 0.0
            permit = self._permits[lane]
            if len(self._unfinished[lane]) >= LONGEST_EPISODE:
                raise EnvironmentFailed(f"an episode did not end within {LONGEST_EPISODE:,} steps; set a time limit")
            if self.rows is not None or valid:
                row = (self._observation[lane], action[lane], reward[lane], discount, valid, log_probability[lane])
                self._unfinished[lane].append(row if permit else None)  # without a permit only the row count matters
            finished = ended if self.rows is None else len(self._unfinished[lane]) == self.rows
            if finished and permit is not None:
                complete.append((permit, self._trajectory(self._unfinished[lane], observation[lane], permit.version)))
                self._permits[lane] = None
            if finished or (self.rows is not None and permit is None):
                self._unfinished[lane] = []
            self._after_end[lane] = ended
        self._observation = observation
        return complete

    def _trajectory(self, rows: list[Any], last: Array, version: int) -> Trajectory:
        observations, actions, rewards, discounts, valid, log_probabilities = zip(*rows, strict=True)
        return Trajectory(
            observation=np.stack([*observations, last]),
            action=np.stack(actions),
            reward=np.array(rewards, np.float32),
            discount=np.array(discounts, np.float32),
            valid=np.array(valid, np.bool_),
            log_probability=np.array(log_probabilities, np.float32),
            version=version,
            episodic=self.rows is None,
        )
