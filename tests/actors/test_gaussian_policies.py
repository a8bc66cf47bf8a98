"""Gaussian and squashed Gaussian policies: samples, densities, entropies, and greedy actions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from actors.environments import ContinuousActions, EnvironmentSpec
from actors.policies import GaussianPolicy, SquashedGaussianPolicy
from replay.errors import ConfigurationError
from replay.types import Array
from tests.actors.stochastic_policies import WIDE, box, different, in_the_learner, same, stochastic
from tests.replay.statistics import FALSE_ALARM, kolmogorov_p

OPEN = box((-math.inf, 0.0, -math.inf), (math.inf, math.inf, 5.0))


def gaussian(
    environment: EnvironmentSpec, mean: list[float] | None = None, std: float | list[float] = 1.0
) -> GaussianPolicy:
    built = stochastic("gaussian", environment, mean)
    assert isinstance(built, GaussianPolicy)
    with torch.no_grad():
        built.log_std.copy_(torch.tensor(std).log())
    return built


def squashed(environment: EnvironmentSpec, output: list[float] | None = None, **options: Any) -> SquashedGaussianPolicy:
    built = stochastic("squashed_gaussian", environment, output, **options)
    assert isinstance(built, SquashedGaussianPolicy)
    return built


def raw_deviation(log_std: float) -> float:
    """Return the head's output for a log standard deviation in (-5, 2)."""
    return math.atanh((log_std + 5.0) / 3.5 - 1.0)


def normal_distribution(x: Array) -> Array:
    return np.array([0.5 * math.erfc(-value / math.sqrt(2.0)) for value in x])


# Gaussian policies.


def test_gaussian_actions_have_the_mean_and_deviation_of_each_dimension() -> None:
    environment = box((-1.0, 0.0), (3.0, 0.5))  # unit actions are scaled by 2 around 1, and by 0.25 around 0.25
    mean, std = np.array([0.3, -0.5]), np.array([0.2, 1.5])
    acting = gaussian(environment, mean.tolist(), std.tolist())
    actions = np.concatenate([acting.act(same(), step=0).action for _ in range(20)])
    assert actions.dtype == np.float32
    standard = ((actions - [1.0, 0.25]) / [2.0, 0.25] - mean) / std
    for dimension in range(2):
        assert kolmogorov_p(standard[:, dimension], normal_distribution) > FALSE_ALARM
    assert abs(np.corrcoef(standard.T)[0, 1]) < 4.5 / math.sqrt(len(actions))


def test_the_density_of_a_gaussian_is_the_closed_form() -> None:
    mean, std = np.array([0.3, -0.5]), np.array([0.2, 1.5])
    acting = gaussian(box((-1.0, -1.0), (1.0, 1.0)), mean.tolist(), std.tolist())
    action, log_density = acting.act(same(50), step=0)
    densities = np.exp(-((action - mean) ** 2) / (2 * std**2)) / np.sqrt(2 * np.pi * std**2)
    np.testing.assert_allclose(log_density, np.log(densities.prod(1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("std", [0.1, 1.0, 3.0])
def test_the_density_of_a_gaussian_integrates_to_one_and_gives_its_entropy(std: float) -> None:
    acting = gaussian(box((-2.0,), (4.0,)), [0.25], [std])
    unit = torch.linspace(0.25 - 12 * std, 0.25 + 12 * std, 4001)[:, None]
    output = torch.full_like(unit, 0.25)
    log_density, entropy = acting.log_probability(output, torch.from_numpy(acting.from_unit(unit)))
    density, width = log_density.exp(), 24 * std / 4000
    assert (density.sum() * width).item() == pytest.approx(1.0, abs=1e-4)
    assert entropy.shape == (4001,)
    assert entropy[0].item() == pytest.approx(-(density * log_density).sum().item() * width, abs=1e-3)


@pytest.mark.parametrize(
    "environment",
    [
        box(),
        box((-1.0,), (3.0,), ()),
        box((0.0, -8.0), (0.5, 2.0)),
        WIDE,
        OPEN,
        box((-1.0, 2.0), (1.0, 2.0)),  # the second dimension has equal bounds
    ],
    ids=lambda environment: str(environment.actions),
)
def test_a_gaussian_log_density_is_the_learner_s(environment: EnvironmentSpec) -> None:
    assert isinstance(environment.actions, ContinuousActions)
    acting = gaussian(environment, std=0.5)
    action, log_density = acting.act(different(), step=0)
    assert action.shape == (64, *environment.actions.shape)
    assert action.dtype == np.float32
    assert log_density is not None
    assert np.isfinite(log_density).all()
    actual, entropy = in_the_learner(acting, different(), action)
    np.testing.assert_allclose(actual, log_density, rtol=1e-4, atol=1e-4)
    assert entropy.shape == (64,)


def test_a_side_without_a_bound_is_not_stretched() -> None:
    acting = gaussian(OPEN)
    unit = torch.tensor([[-7.0, 0.5, 3.0]])
    assert acting.from_unit(unit).tolist() == unit.tolist()
    assert acting.to_unit(unit).tolist() == unit.tolist()


def test_the_ends_of_a_unit_are_the_box() -> None:
    acting = gaussian(WIDE)
    assert isinstance(WIDE.actions, ContinuousActions)
    for unit, bound in ((-1.0, WIDE.actions.low), (1.0, WIDE.actions.high)):
        action = acting.from_unit(torch.full((1, 6), unit))
        assert action.shape == (1, 2, 3)
        np.testing.assert_allclose(action.ravel(), bound, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(acting.to_unit(torch.from_numpy(action)), unit, rtol=1e-6)


def test_the_greedy_gaussian_action_is_the_mean() -> None:
    acting = gaussian(box((-1.0, 0.0), (3.0, 0.5)), [0.5, -3.0], [0.5, 2.0])
    acting.rng = None  # type: ignore[assignment]
    action, log_density = acting.act(same(2), step=0, greedy=True)
    assert action.tolist() == [[2.0, -0.5]] * 2
    assert log_density == pytest.approx([-math.log(2 * math.pi)] * 2)  # 0.5 * 2 = 1


def test_a_gaussian_action_is_clipped_for_the_environment_alone() -> None:
    environment = box((-1.0, 0.0), (3.0, 0.5))
    acting = gaussian(environment, std=5.0)
    action, _ = acting.act(same(), step=0)
    assert (action.min(0) < [-1.0, 0.0]).all()
    assert (action.max(0) > [3.0, 0.5]).all()
    given = environment.to_environment(action)
    assert np.array_equal(given, np.clip(action, np.float32([-1.0, 0.0]), np.float32([3.0, 0.5])))


# Squashed Gaussian policies.


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (0.4, -1.0), (-1.0, -0.5), (0.2, 0.3)])
def test_the_squashed_density_integrates_to_one_and_is_that_of_the_draws(mean: float, log_std: float) -> None:
    acting = squashed(box((-2.0,), (4.0,)), [mean, raw_deviation(log_std)])
    sampled = np.concatenate([acting.act(same(), step=0).action for _ in range(20)])[:, 0]
    acting.double()
    # Midpoints of a grid that is dense at the ends, where the density may be steep.
    edges = torch.linspace(-7.0, 7.0, 20_001, dtype=torch.float64).tanh()
    unit = (edges[1:] + edges[:-1])[:, None] / 2
    output = acting.head.bias.expand(len(unit), -1)
    log_density, _ = acting.log_probability(output, acting.center + acting.scale * unit)
    mass = (log_density.exp() * edges.diff()).detach().numpy()
    assert mass.sum() == pytest.approx(1.0, abs=1e-4)
    cumulated = np.concatenate([[0.0], mass.cumsum()])
    assert kolmogorov_p((sampled - 1.0) / 3.0, lambda x: np.interp(x, edges.numpy(), cumulated)) > FALSE_ALARM


def test_squashed_densities_multiply() -> None:
    noise = torch.tensor([[0.3, -1.0]])
    together = squashed(box((-1.0, -1.0), (1.0, 1.0))).draw(torch.tensor([[0.5, -0.2, 0.1, 0.7]]), noise)
    alone = squashed(box())
    first, second = (
        alone.draw(torch.tensor([[m, s]]), noise[:, i : i + 1]) for i, m, s in ((0, 0.5, 0.1), (1, -0.2, 0.7))
    )
    torch.testing.assert_close(together[1], first[1] + second[1])
    torch.testing.assert_close(together[0], torch.cat([first[0], second[0]], 1))


def test_the_deviation_of_a_squashed_gaussian_stays_in_its_range() -> None:
    acting = squashed(box())
    for raw, log_std in ((-100.0, -5.0), (0.0, -1.5), (100.0, 2.0)):
        unit, _ = acting.draw(torch.tensor([[0.0, raw]]), torch.full((1, 1), 0.01))
        assert unit.atanh().item() == pytest.approx(0.01 * math.exp(log_std), rel=1e-3)


def test_the_squashed_density_is_stable_far_out() -> None:
    raw = np.array([0.0, 1.0, 5.0, 9.0, 15.0, 50.0, 1000.0])
    raw = np.concatenate([-raw, raw])
    output = torch.tensor([[mean, 0.0] for mean in raw], dtype=torch.float32, requires_grad=True)
    unit, log_density = squashed(box()).draw(output, torch.zeros(len(raw), 1))
    # log N(0 | 0, exp(-1.5)) - log(1 - tanh(x)**2), and 1 - tanh(x)**2 = 4 / (e^x + e^-x)**2.
    expected = 1.5 - 0.5 * np.log(2 * np.pi) - 2 * (np.log(2.0) - np.logaddexp(raw, -raw))
    np.testing.assert_allclose(log_density.detach(), expected, rtol=1e-6, atol=1e-6)
    assert unit.isfinite().all()
    (gradient,) = torch.autograd.grad(log_density.sum(), output)
    np.testing.assert_allclose(gradient[:, 0], 2 * np.tanh(raw), rtol=1e-4, atol=1e-6)
    assert gradient.isfinite().all()


def test_squashed_samples_are_reparameterized() -> None:
    acting = squashed(box((-1.0, -1.0), (1.0, 1.0)))
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(5, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    noise = torch.randn(5, 2, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda given: acting.draw(given, noise), output)  # against finite differences
    unit, _ = acting.draw(output, noise)
    (gradient,) = torch.autograd.grad(unit.sum(), output)
    torch.testing.assert_close(gradient[:, :2], 1 - unit.detach().square())


@pytest.mark.parametrize("environment", [box(), box((0.1,), (0.7,), ()), WIDE], ids=lambda e: str(e.actions))
def test_a_squashed_log_density_is_the_learner_s(environment: EnvironmentSpec) -> None:
    acting = squashed(environment)
    action, log_density = acting.act(different(), step=0)
    assert log_density is not None
    assert (acting.to_unit(torch.from_numpy(action)).abs() < 0.999).all()
    actual, entropy = in_the_learner(acting, different(), action)
    np.testing.assert_allclose(actual, log_density, rtol=1e-3, atol=1e-3)
    assert entropy.shape == (64,)


def test_the_entropy_of_a_squashed_gaussian_is_that_before_squashing() -> None:
    output = torch.tensor([[0.3, -0.7, raw_deviation(0.5), raw_deviation(-2.0)]])
    _, entropy = squashed(box((-1.0, -1.0), (1.0, 1.0))).log_probability(output, torch.zeros(1, 2))
    assert entropy.item() == pytest.approx(0.5 - 2.0 + math.log(2 * math.pi * math.e), rel=1e-5)


@pytest.mark.parametrize("mean", [-1000.0, -3.0, 0.0, 3.0, 1000.0])
def test_squashed_actions_stay_in_their_box(mean: float) -> None:
    assert isinstance(WIDE.actions, ContinuousActions)
    acting = squashed(WIDE, [mean] * 6 + [100.0] * 6)
    action, log_density = acting.act(same(), step=0)
    low, high = (np.reshape(bound, (2, 3)) for bound in (WIDE.actions.low, WIDE.actions.high))
    assert ((action >= low - 1e-6) & (action <= high + 1e-6)).all()
    assert np.isfinite(log_density).all()  # type: ignore[arg-type]
    given = WIDE.to_environment(action)
    assert ((given >= np.float32(low)) & (given <= np.float32(high))).all()
    assert np.isfinite(in_the_learner(acting, same(), action)[0]).all()


@pytest.mark.parametrize("random_steps", [0, 100])
def test_the_greedy_squashed_action_is_the_squashed_mean(random_steps: int) -> None:
    acting = squashed(box((-1.0, 0.0), (3.0, 0.5)), [0.5, -1.0, 0.0, 1.0], random_steps=random_steps)
    acting.rng = None  # type: ignore[assignment]
    action, _ = acting.act(same(2), step=0, greedy=True)
    expected = [1.0 + 2.0 * math.tanh(0.5), 0.25 - 0.25 * math.tanh(1.0)]
    np.testing.assert_allclose(action, [expected] * 2, rtol=1e-6)


def test_actions_are_uniform_before_the_random_steps_are_over_and_not_after() -> None:
    acting = squashed(WIDE, [0.4] * 6 + [raw_deviation(-1.0)] * 6, random_steps=100)
    assert isinstance(WIDE.actions, ContinuousActions)
    low, high = np.array(WIDE.actions.low), np.array(WIDE.actions.high)

    def uniformity(step: int) -> float:
        chosen = [acting.act(same(), step=step) for _ in range(50)]
        assert all((each.log_probability is None) == (step < 100) for each in chosen)
        flat = np.concatenate([each.action for each in chosen]).reshape(-1, 6)
        assert ((flat >= low - 1e-5) & (flat <= high + 1e-5)).all()
        assert np.unique(flat, axis=0).shape == flat.shape
        return min(kolmogorov_p(column, lambda x: x) for column in ((flat - low) / (high - low)).T)

    assert uniformity(0) > FALSE_ALARM
    assert uniformity(99) > FALSE_ALARM
    assert uniformity(100) < FALSE_ALARM
    assert uniformity(10**9) < FALSE_ALARM


@pytest.mark.parametrize(
    ("low", "high"), [((-math.inf,), (1.0,)), ((0.0,), (math.inf,)), ((-1.0, -math.inf), (1.0, math.inf))]
)
def test_squashing_needs_a_finite_box(low: tuple[float, ...], high: tuple[float, ...]) -> None:
    with pytest.raises(ConfigurationError, match=r"squashed_gaussian needs finite bounds of actions, got low .*inf"):
        squashed(box(low, high))
