"""VectorRunner of steps -> segments (off-policy, n-step) and trajectories (on-policy).

Both builders are fed one row of all lanes at a time, under NEXT_STEP autoreset: the row that ends an episode
shows its final observation, the step taken from it is ignored by the environment and is no step, and the next
row is the new episode's first.
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
        """Allocate one block of rows for `lanes` lanes; call `begin` next."""
        self.layout, self.lanes, self.gamma = layout, lanes, gamma
        rows = layout.max_segment_frames
        self._lead = layout.stack - 1
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
        """Start afresh from the observations of a reset, `[B, *observation_shape]`; unsent rows are dropped."""
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
        """Add what every lane's step brought; return the segments that became complete, at most one a lane, or None.

        Args:
            action: `[B, *action_shape]`, taken in the row added last.
            reward: `[B]`, as the learner shall see it.
            terminated: `[B]` bool.
            truncated: `[B]` bool.
            observation: `[B, *observation_shape]`, of the row that followed.
            failed: `[B]` bool, lanes whose environment failed in this step, which must read as truncated. Their
                unsent steps are dropped, this one too.
        """
        row, after_end = self._rows - 1, self._after_end
        self._action[row] = action
        self._reward[row] = reward
        self._terminated[row] = terminated
        self._after_end = self._ended[row] = (terminated | truncated) & ~after_end
        self._is_step[row] = ~after_end
        age = self._age[row]
        if self._lead:
            # A frame's age is that of the one before and one more, up to all that a stack needs.
            age = np.where(after_end, 0, np.minimum(age, self._lead - 1) + 1)
        self._append(observation, age)
        if failed is not None and failed.any():
            # Before anything is cut: the failing step bootstraps from an episode that is not its own.
            self._is_step[:, failed] = False
        if self._rows < self.layout.max_segment_frames:
            return None
        segments = self._cut(self._lead, self._lead + self.layout.segment_length)
        self._keep_tail()
        return segments

    def _keep_tail(self) -> None:
        kept = self._lead + self.layout.n_steps
        for block in (
            self._frames,
            self._age,
            self._action,
            self._reward,
            self._terminated,
            self._ended,
            self._is_step,
        ):
            block[:kept] = block[self._rows - kept : self._rows]
        self._rows = kept

    def flush(self) -> Sequence[Segment]:
        """Cut what is left, with fewer than n steps and gamma**k at the very end; call `begin` before adding more."""
        stop, length = self._rows - 1, self.layout.segment_length
        # The tail behind a segment is n - 1 steps, so what is left may be more than one segment holds.
        cuts = [self._cut(first, min(first + length, stop)) for first in range(self._lead, stop, length)]
        self._rows = 0
        return cuts[0] if len(cuts) == 1 else [segment for cut in cuts for segment in cut]

    def _cut(self, first: int, stop: int) -> Segments:
        """Make segments whose starts are the steps in rows `first` to `stop`."""
        last = self._rows - 1
        rows = np.arange(first, stop)
        goes_on = self._is_step[first:stop].copy()
        reward, discount = np.zeros(goes_on.shape), np.ones(goes_on.shape)
        bootstrap = np.repeat(rows[:, None], self.lanes, axis=1)
        for ahead in range(self.layout.n_steps):
            at = np.minimum(rows + ahead, last - 1)
            goes_on &= (rows + ahead < last)[:, None]
            reward += np.where(goes_on, discount * self._reward[at], 0.0)
            discount = np.where(goes_on, discount * self.gamma * ~self._terminated[at], discount)
            bootstrap += goes_on
            goes_on &= ~self._ended[at]
        # From here on lane after lane: each lane's steps, then the frames they need.
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
    """Collects one trajectory for each lane that holds a permit: T rows, or one whole episode."""

    def __init__(self, lanes: int, gamma: float, *, rows: int | None) -> None:
        """Make a builder of trajectories of `rows` rows, or, if None, of whole episodes."""
        self.lanes, self.gamma, self.rows = lanes, gamma, rows
        self._permits: list[Permit | None] = [None] * lanes
        self._begun: list[list[Any]] = [[] for _ in range(lanes)]
        self._after_end = np.zeros(lanes, np.bool_)
        self._observation: Array | None = None

    def begin(self, observation: Array) -> None:
        """Start afresh from the observations of a reset; permits held are dropped."""
        self._observation = observation
        self._permits = [None] * self.lanes
        self._begun = [[] for _ in range(self.lanes)]
        self._after_end[:] = False

    @property
    def holding(self) -> set[int]:
        """VectorRunner that hold a permit."""
        return {lane for lane in range(self.lanes) if self._permits[lane] is not None}

    @property
    def idle(self) -> list[int]:
        """VectorRunner that hold no permit and could begin a trajectory with the next row.

        A whole episode begins at a reset, so while a lane is inside an episode it is not idle for one.
        """
        return [lane for lane in range(self.lanes) if self._permits[lane] is None and self._may_begin(lane)]

    def _may_begin(self, lane: int) -> bool:
        return self.rows is not None or not self._begun[lane]

    @property
    def busy(self) -> bool:
        """Whether any lane holds a permit."""
        return bool(self.holding)

    def assign(self, lane: int, permit: Permit) -> None:
        """Begin a trajectory under `permit` with the lane's next row, which for a whole episode follows a reset."""
        self._permits[lane] = permit
        self._begun[lane] = []

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
        """Add what every lane's step brought; return the trajectories that became complete.

        Args are as in `SegmentBuilder.add`, with `log_probability` `[B]` of each action. A lane that failed begins
        its trajectory again, under the same permit.

        Raises:
            EnvironmentFailed: an episode that does not end.
        """
        assert self._observation is not None, "begin comes first"
        complete = []
        for lane in range(self.lanes):
            if failed is not None and failed[lane]:
                self._begun[lane] = []
                self._after_end[lane] = True
                continue
            valid = not self._after_end[lane]
            ended = valid and bool(terminated[lane] or truncated[lane])
            discount = self.gamma * (not terminated[lane]) if valid else 0.0
            permit = self._permits[lane]
            if len(self._begun[lane]) >= LONGEST_EPISODE:
                raise EnvironmentFailed(f"an episode did not end within {LONGEST_EPISODE:,} steps; set a time limit")
            if self.rows is not None or valid:
                row = (self._observation[lane], action[lane], reward[lane], discount, valid, log_probability[lane])
                self._begun[lane].append(row if permit else None)
            whole = ended if self.rows is None else len(self._begun[lane]) == self.rows
            if whole and permit is not None:
                complete.append((permit, self._trajectory(self._begun[lane], observation[lane], permit.version)))
                self._permits[lane] = None
            if whole or (self.rows is not None and permit is None):
                self._begun[lane] = []
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
