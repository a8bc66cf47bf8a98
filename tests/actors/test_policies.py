"""Exploration, its schedule, and random streams; distributions of actions, their densities, and their entropies."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from actors.environments import ContinuousActions, DiscreteActions, EnvironmentSpec, specify
from actors.policies import (
    EpsilonGreedyPolicy,
    EpsilonSchedule,
    GaussianPolicy,
    Policy,
    PolicySpec,
    SquashedGaussianPolicy,
    StochasticPolicy,
)
from actors.weights import pack, unpack
from replay.errors import ConfigurationError
from replay.types import Array
from tests.replay.statistics import FALSE_ALARM, chi_square_p, kolmogorov_p

ENVIRONMENT = EnvironmentSpec(None, (3,), "float32", 1, DiscreteActions(5))
LANES = 1000


def policy(seed: int = 0, **exploration: float) -> Policy:
    built = PolicySpec("epsilon_greedy", ENVIRONMENT, (8,), EpsilonSchedule(**exploration)).build()  # type: ignore[arg-type]
    built.begin(np.random.SeedSequence(seed))
    return built


def same(lanes: int = LANES) -> Array:
    """Return the same observation in every lane, so that there is one greedy action."""
    return np.ones((lanes, 3), np.float32)


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


def test_a_spec_travels() -> None:
    spec = PolicySpec("epsilon_greedy", specify("CartPole-v1"), (8,))
    again = pickle.loads(pickle.dumps(spec))
    assert again == spec
    assert again.build().state_dict().keys() == spec.build().state_dict().keys()


def test_discrete_observations_act() -> None:
    environment = specify("FrozenLake-v1")
    acting = PolicySpec("epsilon_greedy", environment, (8,)).build()
    assert acting.act(np.array([0, 15]), step=10**9, greedy=True).action.shape == (2,)


def test_a_q_network_needs_discrete_actions() -> None:
    environment = replace(ENVIRONMENT, actions=ContinuousActions((1,), (-2.0,), (2.0,)))
    with pytest.raises(ConfigurationError, match="epsilon-greedy needs a Discrete action space, got ContinuousActions"):
        EpsilonGreedyPolicy(PolicySpec("epsilon_greedy", environment))


def box(
    low: tuple[float, ...] = (-1.0,), high: tuple[float, ...] = (1.0,), shape: tuple[int, ...] | None = None
) -> EnvironmentSpec:
    return replace(ENVIRONMENT, actions=ContinuousActions((len(low),) if shape is None else shape, low, high))


WIDE = box((-1.0, -100.0, 0.0, 2.0, -3.0, 0.1), (3.0, 0.0, 0.5, 7.0, 3.0, 0.7), (2, 3))
OPEN = box((-math.inf, 0.0, -math.inf), (math.inf, math.inf, 5.0))
CONTINUOUS = ["gaussian", "squashed_gaussian"]
KINDS = [("epsilon_greedy", ENVIRONMENT), ("categorical", ENVIRONMENT), *((kind, WIDE) for kind in CONTINUOUS)]


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


def different(lanes: int = 64) -> Array:
    return np.random.default_rng(1).normal(size=(lanes, 3)).astype(np.float32)


def in_the_learner(acting: StochasticPolicy, observation: Array, action: Array) -> tuple[Array, Array]:
    """Return log-probabilities and entropies as the losses compute them."""
    log_probability, entropy = acting.log_probability(acting(torch.from_numpy(observation)), torch.from_numpy(action))
    return log_probability.detach().numpy(), entropy.detach().numpy()


def normal_distribution(x: Array) -> Array:
    return np.array([0.5 * math.erfc(-value / math.sqrt(2.0)) for value in x])


@pytest.mark.parametrize(("kind", "environment"), KINDS)
def test_one_seed_gives_the_same_actions(kind: str, environment: EnvironmentSpec) -> None:
    def sampled(seed: int) -> list[Array]:
        torch.manual_seed(0)
        acting = PolicySpec(kind, environment, (8,), EpsilonSchedule(1.0, 1.0)).build()
        acting.begin(np.random.SeedSequence(seed))
        torch.manual_seed(seed)
        return [acting.act(different(), step=step).action for step in range(3)]

    first, second, other = sampled(0), sampled(0), sampled(1)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[0], first[1])


@pytest.mark.parametrize(("kind", "environment"), KINDS)
def test_weights_make_another_instance_act_alike(kind: str, environment: EnvironmentSpec) -> None:
    there = PolicySpec(kind, environment, (8,), normalize=True, activation="tanh").build()
    there.get_submodule("q_network.torso" if kind == "epsilon_greedy" else "torso").observe(  # type: ignore[operator]
        torch.from_numpy(different(20) * 3)
    )
    here = pickle.loads(pickle.dumps(there.spec)).build()
    expected = there.act(different(), step=0, greedy=True)
    assert not np.array_equal(here.act(different(), step=0, greedy=True).action, expected.action)
    unpack(pack(there, 0), here)
    actual = here.act(different(), step=0, greedy=True)
    assert np.array_equal(actual.action, expected.action)
    assert np.array_equal(actual.log_probability, expected.log_probability)


@pytest.mark.parametrize("kind", ["categorical", *CONTINUOUS])
def test_the_other_kind_of_actions_is_refused(kind: str) -> None:
    wanted, environment = ("Discrete", box()) if kind == "categorical" else ("Box", ENVIRONMENT)
    with pytest.raises(ConfigurationError, match=f"{kind} needs a {wanted} action space, got"):
        PolicySpec(kind, environment).build()


@pytest.mark.parametrize("kind", ["categorical", *CONTINUOUS])
def test_only_epsilon_greedy_has_an_exploration_rate(kind: str) -> None:
    assert PolicySpec(kind, ENVIRONMENT).exploration_rate(0) is None
    assert PolicySpec("epsilon_greedy", ENVIRONMENT).exploration_rate(0) == 1.0


def test_categorical_actions_follow_the_softmax() -> None:
    logits = [0.0, 1.0, -1.0, 2.0, 0.5]
    acting = stochastic("categorical", ENVIRONMENT, logits)
    actions = np.concatenate([acting.act(same(), step=0).action for _ in range(20)])
    assert chi_square_p(np.bincount(actions, minlength=5), np.exp(logits) / np.exp(logits).sum()) > FALSE_ALARM


def test_a_categorical_log_probability_is_the_learner_s() -> None:
    acting = stochastic("categorical", ENVIRONMENT)
    action, log_probability = acting.act(different(), step=0)
    assert (action.shape, action.dtype) == ((64,), np.int64)
    assert len(set(action.tolist())) == 5
    logits = acting(torch.from_numpy(different())).detach().numpy().astype(np.float64)
    by_hand = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert log_probability is not None
    np.testing.assert_allclose(log_probability, by_hand[np.arange(64), action], rtol=1e-5)
    np.testing.assert_allclose(in_the_learner(acting, different(), action)[0], log_probability, rtol=1e-5)
    normal = acting.normalized(torch.from_numpy(logits))
    np.testing.assert_allclose(normal, by_hand, rtol=1e-9)


def test_the_greedy_categorical_action_is_the_most_probable_and_uses_no_randomness() -> None:
    acting = stochastic("categorical", ENVIRONMENT)
    acting.rng = None  # type: ignore[assignment]
    action, log_probability = acting.act(different(), step=0, greedy=True)
    output = acting(torch.from_numpy(different()))
    assert action.tolist() == output.argmax(1).tolist()
    assert len(set(action.tolist())) > 1
    np.testing.assert_allclose(log_probability, output.log_softmax(1).amax(1).detach(), rtol=1e-5)


def test_the_entropy_of_a_categorical_by_hand() -> None:
    acting = stochastic("categorical", replace(ENVIRONMENT, actions=DiscreteActions(4)))
    output = torch.tensor([[0.5, 0.25, 0.125, 0.125], [1.0, 1.0, 1.0, 1.0], [1.0, 1e-30, 1e-30, 1e-30]]).log() + 7.0
    _, entropy = acting.log_probability(output, torch.tensor([0, 1, 2]))
    assert entropy.tolist() == pytest.approx([1.75 * math.log(2), 2 * math.log(2), 0.0])
    # Very small probabilities must not produce NaN.
    log_probability, entropy = acting.log_probability(torch.tensor([[1e4, 0.0, 0.0, -1e4]]), torch.tensor([0]))
    assert (log_probability.item(), entropy.item()) == (0.0, 0.0)


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
