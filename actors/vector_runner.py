"""Vector runner."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actors.environments import EnvironmentSpec, seeds_for
from actors.policies import Policy
from actors.rebuilding import FAILURE
from replay.types import Array, EpisodeResult, Moments


@dataclass(frozen=True)
class VectorStep:
    """What one step of all B lanes brought.

    Attributes:
        action: `[B, *action_shape]`, as the learner sees it.
        log_probability: `[B]` float32, of the actions; 0 where the policy is no distribution.
        reward: `[B]` float64, as the learner sees it.
        terminated: `[B]` bool.
        truncated: `[B]` bool.
        observation: `[B, *observation_shape]`, of the following row.
        failed: `[B]` bool, lanes whose step failed, so that their environment was rebuilt.
        failures: what failed, as text, in steps and in resets.
        steps: how many of the B were steps: all but those that failed or followed an episode's end.
        episodes: `(lane, result)` of the episodes that ended.
    """

    action: Array
    log_probability: Array
    reward: Array
    terminated: Array
    truncated: Array
    observation: Array
    failed: Array
    failures: tuple[str, ...]
    steps: int
    episodes: tuple[tuple[int, EpisodeResult], ...]


class VectorRunner:
    """A vector environment driven by a policy, with the episodes' true returns.

    If asked to, it keeps `returns` beside them, the moments of `G_t = gamma G_{t-1} + r_t` over all steps, by whose
    deviation rewards may be scaled (as in OpenAI Baselines' `VecNormalize`); whoever sends them on sets them back.
    """

    def __init__(
        self,
        environment: EnvironmentSpec,
        lanes: int,
        seed: np.random.SeedSequence,
        *,
        gamma: float = 1.0,
        clip_rewards: bool = False,
        track_return_statistics: bool = False,
        rendered: bool = False,
    ) -> None:
        """Make the environment; `reset` it before the first step.

        Args:
            environment: what to make.
            lanes: how many.
            seed: of the environments.
            gamma: discount of one step.
            clip_rewards: whether the learner sees rewards clipped to [-1, 1]; the episodes' returns are never clipped.
            track_return_statistics: whether to keep `returns`.
            rendered: whether the environment can draw itself.
        """
        self.environment, self.lanes = environment, lanes
        self._gamma, self._clip, self._measure = gamma, clip_rewards, track_return_statistics
        self._discounted = np.zeros(lanes)
        self.returns = Moments()
        self.env = environment.make(lanes, rendered=rendered)
        self._seed = seed
        self._observation: Array = np.empty(0)
        self._returns = np.zeros(lanes)
        self._lengths = np.zeros(lanes, np.int64)
        self._after_end = np.zeros(lanes, np.bool_)
        self._no_lane = np.zeros(lanes, np.bool_)
        self._no_lane.flags.writeable = False

    def reset(self) -> Array:
        """Reset every lane, each time with other seeds, and return the observations."""
        observation, _ = self.env.reset(seed=seeds_for(self.env, self._seed.spawn(1)[0]))
        self._observation = self.environment.observe(observation)
        self._returns[:] = 0.0
        self._lengths[:] = 0
        self._discounted[:] = 0.0
        self._after_end[:] = False
        return self._observation

    def step(self, policy: Policy, *, step: int, greedy: bool = False) -> VectorStep:
        """Take one step in every lane.

        Args:
            policy: chooses the actions.
            step: the global step count, which exploration follows.
            greedy: take the best actions.
        """
        chosen = policy.act(self._observation, step=step, greedy=greedy)
        observation, reward, terminated, truncated, info = self.env.step(self.environment.to_environment(chosen.action))
        reward, density = np.asarray(reward, np.float64), chosen.log_probability
        is_step, failed = ~self._after_end, self._no_lane
        failures: tuple[str, ...] = ()
        if FAILURE in info:
            rebuilt = np.asarray(info[f"_{FAILURE}"], np.bool_)
            failures = tuple(str(info[FAILURE][lane]) for lane in np.flatnonzero(rebuilt))
            failed = rebuilt & is_step
        np.add(self._returns, reward, out=self._returns, where=is_step)
        self._lengths += is_step
        ended = (terminated | truncated) & is_step
        if failures:
            is_step = is_step & ~failed
        learned = np.clip(reward, -1.0, 1.0) if self._clip else reward
        if self._measure:
            self._discounted = self._gamma * self._discounted + learned
            self.returns = self.returns.merged(Moments.of(self._discounted[is_step]))
            # The row after an end is no step, and its reward none.
            self._discounted[ended | self._after_end] = 0.0
        episodes: tuple[tuple[int, EpisodeResult], ...] = ()
        whole = np.flatnonzero(ended & is_step)
        if len(whole):
            results = map(EpisodeResult, self._returns[whole].tolist(), self._lengths[whole].tolist())
            episodes = tuple(zip(whole.tolist(), results, strict=True))
        self._returns[ended] = 0.0
        self._lengths[ended] = 0
        self._after_end = ended
        self._observation = self.environment.observe(observation)
        return VectorStep(
            action=chosen.action,
            log_probability=np.zeros(self.lanes, np.float32) if density is None else density.astype(np.float32),
            reward=learned,
            terminated=terminated,
            truncated=truncated,
            observation=self._observation,
            failed=failed,
            failures=failures,
            steps=int(np.count_nonzero(is_step)),
            episodes=episodes,
        )

    def close(self) -> None:
        """Close the environment."""
        self.env.close()
