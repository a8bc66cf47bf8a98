"""Epsilon-greedy exploration: its schedule, the ladder of Ape-X, and random streams."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.environments import ContinuousActions, specify
from actors.policies import EpsilonGreedyPolicy, EpsilonSchedule, Policy, PolicySpec
from replay.errors import ConfigurationError
from tests.actors.stochastic_policies import ENVIRONMENT, LANES, same
from tests.replay.statistics import FALSE_ALARM, chi_square_p


def policy(seed: int = 0, **exploration: float) -> Policy:
    built = PolicySpec("epsilon_greedy", ENVIRONMENT, (8,), EpsilonSchedule(**exploration)).build()  # type: ignore[arg-type]
    built.begin(np.random.SeedSequence(seed))
    return built


@pytest.mark.parametrize(
    ("step", "epsilon"), [(0, 1.0), (250, 0.775), (500, 0.55), (1000, 0.1), (1001, 0.1), (10**9, 0.1)]
)
def test_epsilon_falls_in_a_line_and_stays(step: int, epsilon: float) -> None:
    schedule = EpsilonSchedule(1.0, 0.1, 1000)
    assert schedule.at(step) == pytest.approx(epsilon)
    assert schedule.at(step, worker=3, workers=4) == pytest.approx(epsilon)


def test_the_defaults_are_the_reference_page_s() -> None:
    assert EpsilonSchedule() == EpsilonSchedule(start=1.0, end=0.02, last_frame=150_000, ladder=False)


def test_the_ladder_of_ape_x() -> None:
    schedule = EpsilonSchedule(ladder=True)
    rungs = [schedule.at(0, worker, 8) for worker in range(8)]
    assert rungs == pytest.approx([0.4 ** (1 + worker) for worker in range(8)])
    assert [schedule.at(10**6, worker, 8) for worker in range(8)] == rungs
    # A single worker follows the linear schedule.
    assert schedule.at(0, 0, 1) == 1.0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"start": 1.1}, r"eps_start must lie in \[0, 1\], got 1.1"),
        ({"end": -0.1}, r"eps_end must lie in \[0, 1\], got -0.1"),
        ({"start": float("nan")}, r"eps_start must lie in \[0, 1\], got nan"),
        ({"last_frame": 0}, r"eps_last_frame must be positive, got 0"),
    ],
)
def test_what_is_no_schedule(arguments: dict[str, float], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        EpsilonSchedule(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 1.0])
def test_exploring_actions_are_uniform(epsilon: float) -> None:
    acting = policy(start=epsilon, end=epsilon)
    best = int(acting.act(same(1), step=0, greedy=True).action[0])
    actions = np.concatenate([acting.act(same(), step=0).action for _ in range(20)])
    expected = np.full(5, epsilon / 5)
    expected[best] += 1 - epsilon
    assert chi_square_p(np.bincount(actions, minlength=5), expected) > FALSE_ALARM
    assert acting.spec.exploration_rate(0) == epsilon


def test_exploration_follows_the_step() -> None:
    acting = policy(start=1.0, end=0.0, last_frame=100)
    best = acting.act(same(1), step=0, greedy=True).action[0]
    not_greedy = [float((acting.act(same(), step=step).action != best).mean()) for step in (0, 50, 100, 200)]
    assert not_greedy == pytest.approx([0.8, 0.4, 0.0, 0.0], abs=0.08)
    assert acting.spec.exploration_rate(50) == 0.5


def test_the_ladder_follows_the_worker() -> None:
    acting = PolicySpec("epsilon_greedy", ENVIRONMENT, (8,), EpsilonSchedule(ladder=True)).build()
    for worker in (0, 3):
        acting.begin(np.random.SeedSequence(0), worker, 4)
        assert acting.spec.exploration.at(10**6, acting.worker, acting.workers) == pytest.approx(
            0.4 ** (1 + 7 * worker / 3)
        )


def test_greedy_actions_are_the_best_and_use_no_randomness() -> None:
    acting = policy(start=1.0, end=1.0)
    acting.rng = None  # type: ignore[assignment]
    observation = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    action = acting.act(observation, step=0, greedy=True).action
    assert action.tolist() == acting(torch.from_numpy(observation)).argmax(1).tolist()
    assert action.dtype == np.int64
    assert len(set(action.tolist())) > 1


def test_each_lane_explores_by_itself() -> None:
    actions = policy(start=0.5, end=0.5).act(same(), step=0).action
    assert actions.shape == (LANES,)
    assert len(set(actions.tolist())) == 5


def test_zero_is_a_seed() -> None:
    def sampled(seed: int) -> list[int]:
        return policy(seed, start=1.0, end=1.0).act(same(50), step=0).action.tolist()

    assert sampled(0) == sampled(0)
    assert sampled(0) != sampled(1)


def test_discrete_observations_act() -> None:
    environment = specify("FrozenLake-v1")
    acting = PolicySpec("epsilon_greedy", environment, (8,)).build()
    assert acting.act(np.array([0, 15]), step=10**9, greedy=True).action.shape == (2,)


def test_a_q_network_needs_discrete_actions() -> None:
    environment = replace(ENVIRONMENT, actions=ContinuousActions((1,), (-2.0,), (2.0,)))
    with pytest.raises(ConfigurationError, match="epsilon-greedy needs a Discrete action space, got ContinuousActions"):
        EpsilonGreedyPolicy(PolicySpec("epsilon_greedy", environment))
