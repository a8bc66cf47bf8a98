"""Stochastic policies with known outputs, their environments, and observations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from actors.environments import ContinuousActions, DiscreteActions, EnvironmentSpec
from actors.policies import PolicySpec, StochasticPolicy
from replay.types import Array

ENVIRONMENT = EnvironmentSpec(None, (3,), "float32", 1, DiscreteActions(5))
LANES = 1000


def same(lanes: int = LANES) -> Array:
    """Return the same observation in every lane, so that there is one greedy action."""
    return np.ones((lanes, 3), np.float32)


def different(lanes: int = 64) -> Array:
    return np.random.default_rng(1).normal(size=(lanes, 3)).astype(np.float32)


def box(
    low: tuple[float, ...] = (-1.0,), high: tuple[float, ...] = (1.0,), shape: tuple[int, ...] | None = None
) -> EnvironmentSpec:
    return replace(ENVIRONMENT, actions=ContinuousActions((len(low),) if shape is None else shape, low, high))


WIDE = box((-1.0, -100.0, 0.0, 2.0, -3.0, 0.1), (3.0, 0.0, 0.5, 7.0, 3.0, 0.7), (2, 3))
CONTINUOUS = ["gaussian", "squashed_gaussian"]


def stochastic(
    kind: str, environment: EnvironmentSpec, output: list[float] | None = None, seed: int = 0, **options: Any
) -> StochasticPolicy:
    """Build a policy; with `output`, its head returns that output for every observation."""
    torch.manual_seed(0)
    built = PolicySpec(kind, environment, (8,), **options).build()
    assert isinstance(built, StochasticPolicy)
    built.begin(np.random.SeedSequence(seed))
    if output is not None:
        with torch.no_grad():
            built.head.weight.zero_()
            built.head.bias.copy_(torch.tensor(output))
    return built


def in_the_learner(acting: StochasticPolicy, observation: Array, action: Array) -> tuple[Array, Array]:
    """Return log-probabilities and entropies as the losses compute them."""
    log_probability, entropy = acting.log_probability(acting(torch.from_numpy(observation)), torch.from_numpy(action))
    return log_probability.detach().numpy(), entropy.detach().numpy()
