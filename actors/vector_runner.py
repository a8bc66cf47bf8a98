"""The vector runner: steps a vector environment with a policy and measures the episodes' returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actors.environments import EnvironmentSpec, seeds_for
from actors.policies import Policy
from actors.rebuilding import FAILURE
from replay.types import Array, EpisodeResult, Moments


@dataclass(frozen=True)
class VectorStep:
    """One step of all B lanes.

    Attributes:
        action: `[B, *action_shape]`, as the learner sees it, not clipped.
        log_probability: `[B]` float32, of the actions; 0 if the policy has no log-probabilities.
        reward: `[B]` float64, as the learner sees it, clipped if the runner clips rewards.
        terminated: `[B]` bool.
        truncated: `[B]` bool.
        observation: `[B, *observation_shape]`, after the step.
        failed: `[B]` bool, lanes whose step failed, so that their environment was recreated.
        failures: texts of the failures, in steps and in resets.
        steps: number of environment steps: B minus the lanes that failed, or that were only reset after an episode.
        episodes: `(lane, result)` of each episode that ended.
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
    """A vector environment that is stepped with a policy.

    Attributes:
        environment: specification of the environment.
        lanes: number of lanes.
        env: the vector environment.
        returns: moments of the discounted returns `G_t = gamma G_{t-1} + r_t` over all steps, if they are tracked. The
            learner may divide rewards by the standard deviation of these returns, as OpenAI Baselines' `VecNormalize`
            does. The caller reads the moments and resets this attribute.
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
        """Make the environment; call `reset` before the first step.

        Args:
            environment: specification of the environment.
            lanes: number of lanes.
            seed: seed of the environments.
            gamma: discount of one step.
            clip_rewards: whether the learner sees rewards clipped to [-1, 1]; the episodes' returns are never clipped.
            track_return_statistics: whether to update `returns`.
            rendered: whether the environment can be rendered.
        """
        self.environment, self.lanes = environment, lanes
        self._gamma, self._clip_rewards, self._track_returns = gamma, clip_rewards, track_return_statistics
        self._discounted_returns = np.zeros(lanes)
        self.returns = Moments()
        self.env = environment.make(lanes, rendered=rendered)
        self._seed = seed
        self._observation: Array = np.empty(0)
        self._episode_returns = np.zeros(lanes)
        self._episode_lengths = np.zeros(lanes, np.int64)
        self._after_end = np.zeros(lanes, np.bool_)  # lanes whose next vector step is a reset
        self._none_failed = np.zeros(lanes, np.bool_)
        self._none_failed.flags.writeable = False

    def reset(self) -> Array:
        """Reset every lane, with new seeds each time, and return the observations."""
        observation, _ = self.env.reset(seed=seeds_for(self.env, self._seed.spawn(1)[0]))
        self._observation = self.environment.observe(observation)
        self._episode_returns[:] = 0.0
        self._episode_lengths[:] = 0
        self._discounted_returns[:] = 0.0
        self._after_end[:] = False
        return self._observation

    def step(self, policy: Policy, *, step: int, greedy: bool = False) -> VectorStep:
        """Take one step in every lane.

        Args:
            policy: selects the actions.
            step: global count of environment steps, which the exploration schedule depends on.
            greedy: whether to take the best actions instead of exploring.
        """
        selected = policy.act(self._observation, step=step, greedy=greedy)
        observation, reward, terminated, truncated, info = self.env.step(
            self.environment.to_environment(selected.action)
        )
        reward, log_probability = np.asarray(reward, np.float64), selected.log_probability
        is_step, failed = ~self._after_end, self._none_failed
        failures: tuple[str, ...] = ()
        if FAILURE in info:
            rebuilt = np.asarray(info[f"_{FAILURE}"], np.bool_)
            failures = tuple(str(info[FAILURE][lane]) for lane in np.flatnonzero(rebuilt))
            failed = rebuilt & is_step
        np.add(self._episode_returns, reward, out=self._episode_returns, where=is_step)
        self._episode_lengths += is_step
        ended = (terminated | truncated) & is_step
        if failures:
            is_step = is_step & ~failed
        learner_reward = np.clip(reward, -1.0, 1.0) if self._clip_rewards else reward
        if self._track_returns:
            self._update_discounted_returns(learner_reward, is_step, ended)
        episodes = self._results(np.flatnonzero(ended & is_step))
        self._episode_returns[ended] = 0.0
        self._episode_lengths[ended] = 0
        self._after_end = ended
        self._observation = self.environment.observe(observation)
        return VectorStep(
            action=selected.action,
            log_probability=np.zeros(self.lanes, np.float32)
            if log_probability is None
            else log_probability.astype(np.float32),
            reward=learner_reward,
            terminated=terminated,
            truncated=truncated,
            observation=self._observation,
            failed=failed,
            failures=failures,
            steps=int(np.count_nonzero(is_step)),
            episodes=episodes,
        )

    def _update_discounted_returns(self, reward: Array, is_step: Array, ended: Array) -> None:
        self._discounted_returns = self._gamma * self._discounted_returns + reward
        self.returns = self.returns.merged(Moments.of(self._discounted_returns[is_step]))
        # A vector step that resets a lane is no environment step, and its reward does not count.
        self._discounted_returns[ended | self._after_end] = 0.0

    def _results(self, lanes: Array) -> tuple[tuple[int, EpisodeResult], ...]:
        """Return `(lane, result)` of the episodes that ended in `lanes`."""
        if not len(lanes):
            return ()
        results = map(EpisodeResult, self._episode_returns[lanes].tolist(), self._episode_lengths[lanes].tolist())
        return tuple(zip(lanes.tolist(), results, strict=True))

    def close(self) -> None:
        """Close the environment."""
        self.env.close()
