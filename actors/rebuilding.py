"""Rebuilding."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any, SupportsFloat

import gymnasium as gym

from replay.errors import EnvironmentFailed

FAILURE = "squall_failure"  # in a step's info: what a lane failed with; a user's own keys may be called anything


class RebuildingEnv(gym.Env[Any, Any]):
    """One lane that is made anew when it raises, so that one failure does not end its neighbours' episodes.

    The failing step comes back as a truncated one with `info[FAILURE]`; the caller drops the lane's unsent rows.
    A failing reset is tried again and comes back with `info[FAILURE]` too.
    """

    most_failures = 5
    within_steps = 1_000

    def __init__(self, factory: Callable[[], gym.Env[Any, Any]]) -> None:
        """Make the environment; a failure here is not caught."""
        self._factory = factory
        self._env = factory()
        self._steps = 0
        self._failures: deque[int] = deque(maxlen=self.most_failures)
        self.observation_space, self.action_space = self._env.observation_space, self._env.action_space
        self.metadata, self.render_mode, self.spec = self._env.metadata, self._env.render_mode, self._env.spec

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset, on a rebuilt environment if need be.

        Raises:
            EnvironmentFailed: more than `most_failures` failures within `within_steps` steps.
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
        """Step; a failure rebuilds the environment and reads as a truncation.

        Raises:
            EnvironmentFailed: more than `most_failures` failures within `within_steps` steps.
        """
        self._steps += 1
        try:
            return self._env.step(action)
        except Exception as error:
            observation, _ = self.reset(seed=self._rebuild(error))
            return observation, 0.0, False, True, {FAILURE: f"{type(error).__name__}: {error}"}

    def _rebuild(self, error: Exception) -> int:
        """Make the environment anew; return a seed for its first episode, drawn from this lane's own seed."""
        if len(self._failures) == self.most_failures and self._steps - self._failures[0] < self.within_steps:
            raise EnvironmentFailed(
                f"the environment failed {self.most_failures + 1} times within {self.within_steps} steps, "
                f"last with {type(error).__name__}: {error}"
            ) from error
        self._failures.append(self._steps)
        with contextlib.suppress(Exception):
            self._env.close()
        try:
            self._env = self._factory()
        except Exception as again:
            raise EnvironmentFailed(
                f"the environment failed with {type(error).__name__}: {error}, and cannot be made anew: "
                f"{type(again).__name__}: {again}"
            ) from again
        return int(self.np_random.integers(2**31))

    def render(self) -> Any:
        """Render the environment."""
        return self._env.render()

    def close(self) -> None:
        """Close the environment."""
        self._env.close()
