"""A single environment that recreates itself after a failure, as one lane of a vector environment."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any, SupportsFloat

import gymnasium as gym

from replay.errors import EnvironmentFailed

FAILURE = "squall_failure"  # key of the failure's text in a step's info; the prefix keeps it apart from users' keys


class RebuildingEnv(gym.Env[Any, Any]):
    """One lane that recreates its environment when the environment raises, so that other lanes' episodes continue.

    A failing step is returned as a truncation, with the failure's text in `info[FAILURE]`; the caller must drop the
    lane's unsent steps. A failing reset is retried; it also sets `info[FAILURE]`.

    Attributes:
        max_failures: failures that are tolerated within `failure_window` steps.
        failure_window: length of the window, in steps of this lane.
    """

    max_failures = 5
    failure_window = 1_000

    def __init__(self, factory: Callable[[], gym.Env[Any, Any]]) -> None:
        """Make the environment; a failure at this point is not caught."""
        self._factory = factory
        self._env = factory()
        self._steps = 0
        self._failures: deque[int] = deque(maxlen=self.max_failures)  # the step count at each failure
        self.observation_space, self.action_space = self._env.observation_space, self._env.action_space
        self.metadata, self.render_mode, self.spec = self._env.metadata, self._env.render_mode, self._env.spec

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment; recreate it if the reset fails.

        Raises:
            EnvironmentFailed: more than `max_failures` failures within `failure_window` steps.
        """
        if seed is not None:
            super().reset(seed=seed)
        failure: dict[str, Any] = {}
        while True:
            try:
                observation, info = self._env.reset(seed=seed, options=options)
                return observation, {**info, **failure}
            except Exception as error:
                failure = {FAILURE: f"{type(error).__name__}: {error}"}
                seed = self._rebuild(error)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Step the environment; after a failure, recreate it and return a truncation.

        Raises:
            EnvironmentFailed: more than `max_failures` failures within `failure_window` steps.
        """
        self._steps += 1
        try:
            return self._env.step(action)
        except Exception as error:
            observation, _ = self.reset(seed=self._rebuild(error))
            return observation, 0.0, False, True, {FAILURE: f"{type(error).__name__}: {error}"}

    def _rebuild(self, error: Exception) -> int:
        """Recreate the environment; return a seed for its first episode, derived from this lane's seed."""
        if len(self._failures) == self.max_failures and self._steps - self._failures[0] < self.failure_window:
            raise EnvironmentFailed(
                f"the environment failed {self.max_failures + 1} times within {self.failure_window} steps, "
                f"last with {type(error).__name__}: {error}"
            ) from error
        self._failures.append(self._steps)
        with contextlib.suppress(Exception):
            self._env.close()
        try:
            self._env = self._factory()
        except Exception as rebuild_error:
            raise EnvironmentFailed(
                f"the environment failed with {type(error).__name__}: {error}, and cannot be recreated: "
                f"{type(rebuild_error).__name__}: {rebuild_error}"
            ) from rebuild_error
        return int(self.np_random.integers(2**31))

    def render(self) -> Any:
        """Render the environment."""
        return self._env.render()

    def close(self) -> None:
        """Close the environment."""
        self._env.close()
