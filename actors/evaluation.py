"""Evaluation: whole greedy episodes with unclipped returns, and a fixed number of episodes for each lane."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from actors.environments import LONGEST_EPISODE
from actors.policies import Policy, PolicySpec
from actors.vector_runner import VectorRunner
from actors.video import Video
from actors.weights import Weights, unpack
from replay.errors import ConfigurationError, EnvironmentFailed
from replay.remote import actor_class
from replay.seeds import spawn_seed
from replay.types import EpisodeResult

_MAX_LANES = 8


@dataclass(frozen=True)
class Evaluation:
    """The results of greedy episodes with one version of the weights."""

    version: int
    episodes: tuple[EpisodeResult, ...]

    @property
    def mean(self) -> float:
        """Mean return of the episodes."""
        return float(np.mean([episode.episode_return for episode in self.episodes]))

    @property
    def std(self) -> float:
        """Standard deviation of the episodes' returns."""
        return float(np.std([episode.episode_return for episode in self.episodes]))


def run_episodes(
    policy: Policy,
    episodes: int,
    seed: np.random.SeedSequence,
    *,
    lanes: int | None = None,
    greedy: bool = True,
    video: Video | None = None,
) -> tuple[EpisodeResult, ...]:
    """Play whole episodes and return their results.

    The number of episodes of each lane is fixed in advance. The first N episodes to finish in any lane would be a
    biased sample, because short episodes finish first.

    Args:
        policy: selects the actions, in a new environment made from the policy's specification.
        episodes: number of episodes, positive.
        seed: seed of the environments and of the policy.
        lanes: number of lanes; None selects one for each episode, at most 8.
        greedy: whether to take the best actions instead of exploring.
        video: recorder of the episodes; recording does not change them.

    Raises:
        ConfigurationError: episodes is not positive, or the environment cannot be recorded.
        EnvironmentFailed: an episode does not end; such an environment needs a time limit.
    """
    if episodes < 1:
        raise ConfigurationError(f"the number of evaluation episodes must be positive, got {episodes}")
    lanes = min(lanes or _MAX_LANES, episodes)
    quota = np.full(lanes, episodes // lanes)
    quota[: episodes % lanes] += 1
    results: list[list[EpisodeResult]] = [[] for _ in range(lanes)]
    environment_seed, policy_seed = seed.spawn(2)
    policy.begin(policy_seed)
    runner = VectorRunner(policy.spec.environment, lanes, environment_seed, rendered=video is not None)
    try:
        runner.reset()
        if video is not None:
            video.begin(runner.env, policy.spec.environment.id)
        vector_steps = 0
        while any(len(finished) < wanted for finished, wanted in zip(results, quota, strict=True)):
            step = runner.step(policy, step=0, greedy=greedy)
            if video is not None:
                unfinished = [lane for lane in range(lanes) if len(results[lane]) < quota[lane]]
                ended = {lane for lane, _ in step.episodes}
                video.record(runner.env, unfinished, ended=ended, failed=set(np.flatnonzero(step.failed)))
            for lane, result in step.episodes:
                if len(results[lane]) < quota[lane]:
                    results[lane].append(result)
            vector_steps += 1
            # An episode of n steps takes n + 1 vector steps, because the reset is a vector step too.
            if vector_steps > (LONGEST_EPISODE + 1) * quota[0]:
                raise EnvironmentFailed(f"an episode did not end within {LONGEST_EPISODE:,} steps; set a time limit")
    finally:
        runner.close()
    return tuple(result for lane_results in results for result in lane_results)


class Evaluator:
    """The evaluator process: plays greedy episodes with a version of the weights."""

    def __init__(self, spec: PolicySpec, *, run_seed: int, threads: int | None = None) -> None:
        """Build the policy.

        Args:
            spec: specification of the policy.
            run_seed: the run's seed.
            threads: PyTorch threads of this process; None keeps the current number.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        self._policy = spec.build()
        self._run_seed = run_seed

    def evaluate(self, weights: Weights, episodes: int, role: str, index: int) -> Evaluation:
        """Play greedy episodes and return their results.

        Args:
            weights: weights of the policy.
            episodes: number of episodes.
            role: role of the random stream; with `index` it determines the seed.
            index: index of the random stream.

        Raises:
            LayoutMismatch: the weights belong to a different network.
        """
        unpack(weights, self._policy)
        seed = spawn_seed(self._run_seed, role, index)
        return Evaluation(weights.version, run_episodes(self._policy, episodes, seed))

    def report(self) -> dict[str, Any]:
        """Return this process's id as `pid`."""
        return {"pid": os.getpid()}


EvaluatorActor = actor_class(Evaluator, max_concurrency=2)
