"""Evaluation: greedy actions, whole episodes, true returns, with an episode quota for every lane."""

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

_MOST_LANES = 8


@dataclass(frozen=True)
class Evaluation:
    """Greedy episodes of one version of the weights."""

    version: int
    episodes: tuple[EpisodeResult, ...]

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean([episode.episode_return for episode in self.episodes]))

    @property
    def std(self) -> float:
        """Standard deviation of the returns over episodes."""
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

    Each lane has its quota of episodes from the start. Taking the first N to finish, from any lane, would favour
    short episodes.

    Args:
        policy: acts; its environment is made anew.
        episodes: how many, positive.
        seed: of the environments; another seed gives other episodes.
        lanes: lanes to play them in; None chooses.
        greedy: take the best actions instead of exploring ones.
        video: records the episodes; they are the same with it and without.

    Raises:
        ConfigurationError: episodes is not positive, or there is nothing to record.
        EnvironmentFailed: an episode that does not end; give such an environment a time limit.
    """
    if episodes < 1:
        raise ConfigurationError(f"the number of evaluation episodes must be positive, got {episodes}")
    width = min(lanes or _MOST_LANES, episodes)
    quota = np.full(width, episodes // width)
    quota[: episodes % width] += 1
    results: list[list[EpisodeResult]] = [[] for _ in range(width)]
    environment_seed, policy_seed = seed.spawn(2)
    policy.begin(policy_seed)
    driver = VectorRunner(policy.spec.environment, width, environment_seed, rendered=video is not None)
    try:
        driver.reset()
        if video is not None:
            video.begin(driver.env, policy.spec.environment.id)
        rows = 0
        while any(len(done) < most for done, most in zip(results, quota, strict=True)):
            row = driver.step(policy, step=0, greedy=greedy)
            if video is not None:
                playing = [lane for lane in range(width) if len(results[lane]) < quota[lane]]
                ended = {lane for lane, _ in row.episodes}
                video.take(driver.env, playing, ended=ended, failed=set(np.flatnonzero(row.failed)))
            for lane, result in row.episodes:
                if len(results[lane]) < quota[lane]:
                    results[lane].append(result)
            rows += 1
            if rows > (LONGEST_EPISODE + 1) * quota[0]:
                raise EnvironmentFailed(f"an episode did not end within {LONGEST_EPISODE:,} steps; set a time limit")
    finally:
        driver.close()
    return tuple(result for lane in results for result in lane)


class Evaluator:
    """Evaluates versions of the weights in a process of its own."""

    def __init__(self, spec: PolicySpec, *, run_seed: int, threads: int | None = None) -> None:
        """Build the policy; `threads` sets this process's PyTorch threads."""
        if threads is not None:
            torch.set_num_threads(threads)
        self._policy = spec.build()
        self._run_seed = run_seed

    def evaluate(self, weights: Weights, episodes: int, role: str, index: int) -> Evaluation:
        """Play `episodes` greedy episodes with `weights`, seeded by `role` and `index`.

        Raises:
            LayoutMismatch: the weights are of another network.
        """
        unpack(weights, self._policy)
        seed = spawn_seed(self._run_seed, role, index)
        return Evaluation(weights.version, run_episodes(self._policy, episodes, seed))

    def report(self) -> dict[str, Any]:
        """Return this process's pid."""
        return {"pid": os.getpid()}


EvaluatorActor = actor_class(Evaluator, max_concurrency=2)
