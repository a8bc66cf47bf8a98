"""Tests of the formulas by hand numbers, by their gradients, and against slow twins written like the papers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from learner.soft_actor_critic import actor_loss, critic_loss, polyak_update, soft_q_target, temperature_loss


def double(numbers: float | list[float] | list[list[float]]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def random(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return values `[C, B]`, three tensors `[B]`, and a temperature; seed 0 has one critic and a batch of one."""
    generator = torch.Generator().manual_seed(seed)
    critics, size = (int(torch.randint(1, most, (), generator=generator)) if seed else 1 for most in (4, 40))
    q = torch.randn(critics, size, generator=generator, dtype=torch.float64)
    rest = torch.randn(3, size, generator=generator, dtype=torch.float64)
    return q, *rest, torch.rand((), generator=generator, dtype=torch.float64)


def smallest(values: Tensor, j: int) -> float:
    least = math.inf
    for i in range(len(values)):
        least = values[i][j].item() if values[i][j].item() < least else least
    return least


def test_soft_q_target_by_hand() -> None:
    # Each critic has the smaller value in some elements, and neither in all.
    q_t = double([[100, 900, 500], [800, 300, 400]])
    target = soft_q_target(double([1, 2, 3]), double([0.5, 0.25, 0]), q_t, double([-10, 20, 30]), double(0.5))
    assert target.tolist() == [1 + 0.5 * (100 + 5), 2 + 0.25 * (300 - 10), 3]


def test_soft_q_target_takes_nothing_of_the_next_state_where_the_episode_terminated() -> None:
    unlearned = double([[1e30, -1e30], [-1e30, 1e30]])
    target = soft_q_target(double([7, 8]), double([0, 0]), unlearned, double([1e30, -1e30]), double(1e3))
    assert target.tolist() == [7.0, 8.0]


def test_a_less_likely_action_has_a_higher_target() -> None:
    likely, unlikely = soft_q_target(
        *torch.zeros(1, 2), torch.ones(2), torch.zeros(2, 2), double([-1, -9]), double(0.5)
    )
    assert (likely.item(), unlikely.item()) == (0.5, 4.5)


@pytest.mark.parametrize("seed", range(6))
def test_soft_q_target_agrees_with_its_slow_twin(seed: int) -> None:
    """V(s) = Q(s, a) - alpha log pi(a|s), equation 3, with the minimum of the critics; r + gamma V(s'), equation 5."""
    q, r, log_pi, noise, alpha = random(seed)
    discount = noise.sign().relu() * 0.99
    target = soft_q_target(r, discount, q, log_pi, alpha).tolist()
    for j in range(len(r)):
        V = smallest(q, j) - alpha.item() * log_pi[j].item()
        y = r[j].item() + (0.99 * V if discount[j].item() else 0.0)
        assert target[j] == pytest.approx(y, rel=1e-12, abs=1e-12)


def test_soft_q_target_has_no_gradient() -> None:
    q, r, discount, log_pi, alpha = (x.requires_grad_() for x in random(3))
    assert not soft_q_target(r, discount, q, log_pi, alpha).requires_grad


def test_critic_loss_by_hand() -> None:
    loss = critic_loss(double([[1, 2], [3, 6]]), double([0, 4]))
    assert loss.item() == (1 + 4) / 4 + (9 + 4) / 4


def test_each_critic_moves_by_its_own_error_and_the_target_not_at_all() -> None:
    q_tm1, target = double([[1, 2], [3, 6]]).requires_grad_(), double([0, 4]).requires_grad_()
    critic_loss(q_tm1, target).backward()
    assert _gradient(q_tm1).tolist() == [[0.5, -1.0], [1.5, 1.0]]
    assert target.grad is None


@pytest.mark.parametrize("seed", range(6))
def test_critic_loss_agrees_with_its_slow_twin(seed: int) -> None:
    """J(theta_i) is the mean of (Q_i - y)^2 / 2, equation 5; its gradient that of Q_i times (Q_i - y), equation 6."""
    q, y, *_ = random(seed)
    q.requires_grad_()
    loss = critic_loss(q, y)
    loss.backward()
    total, size = 0.0, len(y)
    for i in range(len(q)):
        J = 0.0
        for j in range(size):
            error = q[i][j].item() - y[j].item()
            J += error**2 / 2
            assert _gradient(q)[i][j].item() == pytest.approx(error / size, rel=1e-12)
        total += J / size
    assert loss.item() == pytest.approx(total, rel=1e-12)


def test_actor_loss_by_hand() -> None:
    loss = actor_loss(double([[10, 200], [30, 100]]), double([-2, 4]), double(0.5))
    assert loss.item() == ((-1 - 10) + (2 - 100)) / 2


def test_the_gradient_of_the_actor_loss_reaches_the_smaller_value_and_the_log_probability() -> None:
    q, log_probability = double([[10, 200], [30, 100]]).requires_grad_(), double([-2, 4]).requires_grad_()
    alpha = double(0.25).requires_grad_()
    actor_loss(q, log_probability, alpha).backward()
    assert _gradient(q).tolist() == [[-0.5, 0.0], [0.0, -0.5]]
    assert _gradient(log_probability).tolist() == [0.125, 0.125]
    assert alpha.grad is None


def test_critics_that_agree_share_the_gradient() -> None:
    q = torch.zeros(2, 1, requires_grad=True)
    actor_loss(q, torch.zeros(1), torch.tensor(0.5)).backward()
    assert _gradient(q).sum().item() == -1.0


@pytest.mark.parametrize("seed", range(6))
def test_actor_loss_agrees_with_its_slow_twin(seed: int) -> None:
    """J = mean of alpha log pi(a|s) - min_i Q_i(s, a), equation 7."""
    q, log_pi, _, _, alpha = random(seed)
    J = 0.0
    for j in range(len(log_pi)):
        J += alpha.item() * log_pi[j].item() - smallest(q, j)
    assert actor_loss(q, log_pi, alpha).item() == pytest.approx(J / len(log_pi), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_the_gradient_of_the_actor_loss_is_equation_10(seed: int) -> None:
    """For a = f(eps) = mu + sigma eps and Q_i = -(a - c_i)^2: d alpha log pi + (d_a alpha log pi - d_a Q) d f."""
    centres, noise, _, _, alpha = random(seed)
    mu, log_sigma = double(0.3).requires_grad_(), double(-0.2).requires_grad_()
    a = mu + log_sigma.exp() * noise
    log_pi = torch.distributions.Normal(mu, log_sigma.exp()).log_prob(a)
    actor_loss(-((a - centres) ** 2), log_pi, alpha).backward()

    sigma, size, d_mu, d_log_sigma = math.exp(-0.2), len(noise), 0.0, 0.0
    for j in range(size):
        eps = noise[j].item()
        c = max((centre[j].item() for centre in centres), key=lambda centre: abs(0.3 + sigma * eps - centre))
        d_a = alpha.item() * -eps / sigma + 2 * (0.3 + sigma * eps - c)
        d_mu += alpha.item() * eps / sigma + d_a
        d_log_sigma += alpha.item() * (eps**2 - 1) + d_a * sigma * eps
    assert _gradient(mu).item() == pytest.approx(d_mu / size, rel=1e-9, abs=1e-12)
    assert _gradient(log_sigma).item() == pytest.approx(d_log_sigma / size, rel=1e-9, abs=1e-12)


def test_temperature_loss_by_hand() -> None:
    loss = temperature_loss(double(math.log(2.0)), double([-1, -3]), -4.0)
    assert loss.item() == pytest.approx(2 * (5 + 7) / 2)


def test_the_gradient_of_the_temperature_loss_reaches_the_temperature_alone() -> None:
    log_alpha, log_probability = double(math.log(2.0)).requires_grad_(), double([-1, -3]).requires_grad_()
    temperature_loss(log_alpha, log_probability, -4.0).backward()
    assert _gradient(log_alpha).item() == pytest.approx(2 * (5 + 7) / 2)
    assert log_probability.grad is None


@pytest.mark.parametrize(("entropy", "direction"), [(-3.0, 1), (-1.0, -1), (-2.0, 0)])
def test_a_policy_less_random_than_the_target_raises_the_temperature(entropy: float, direction: int) -> None:
    log_alpha = double(-1.0).requires_grad_()
    optimizer = torch.optim.SGD([log_alpha], lr=0.1)
    temperature_loss(log_alpha, double([-entropy - 0.5, -entropy + 0.5]), -2.0).backward()
    optimizer.step()
    assert math.copysign(1, log_alpha.item() + 1.0) * (log_alpha.item() != -1.0) == direction


@pytest.mark.parametrize("seed", range(6))
def test_temperature_loss_agrees_with_its_slow_twin(seed: int) -> None:
    """J(alpha) = mean of -alpha log pi(a|s) - alpha H, equation 18."""
    _, log_pi, _, _, log_alpha = random(seed)
    alpha, J = math.exp(log_alpha.item()), 0.0
    for j in range(len(log_pi)):
        J += -alpha * log_pi[j].item() - alpha * -1.5
    assert temperature_loss(log_alpha, log_pi, -1.5).item() == pytest.approx(J / len(log_pi), rel=1e-12, abs=1e-12)


SHAPES = {
    soft_q_target: {"r_t": (5,), "discount_t": (5,), "q_t": (2, 5), "log_probability_t": (5,), "alpha": ()},
    critic_loss: {"q_tm1": (2, 5), "target": (5,)},
    actor_loss: {"q": (2, 5), "log_probability": (5,), "alpha": ()},
}


@pytest.mark.parametrize(
    ("formula", "name", "shape"),
    [
        (formula, name, shape)
        for formula, shapes in SHAPES.items()
        for name, good in shapes.items()
        for shape in {
            (5,): [(5, 1), (1, 5), (1,), (), (4,)],  # all but the last would broadcast
            (2, 5): [(5,), (2, 5, 1), (2, 1), (2, 4), (5, 1), ()],
            (): [],
        }[good]
    ],
)
def test_shapes_that_do_not_agree_raise(formula: Callable[..., Tensor], name: str, shape: tuple[int, ...]) -> None:
    shapes = {**SHAPES[formula], name: shape}
    with pytest.raises(ValueError, match=r"values must be \[C, B\] and all other tensors \[B\], got values"):
        formula(**{key: torch.zeros(of) for key, of in shapes.items()})


@pytest.mark.parametrize("formula", SHAPES)
def test_a_batch_in_columns_raises(formula: Callable[..., Tensor]) -> None:
    columns = {(5,): (5, 1), (2, 5): (2, 5, 1), (): ()}
    with pytest.raises(ValueError, match=r"must be \[C, B\] and all other tensors \[B\], got values \(2, 5, 1\)"):
        formula(**{key: torch.zeros(columns[of]) for key, of in SHAPES[formula].items()})


@pytest.mark.parametrize("formula", [soft_q_target, actor_loss])
@pytest.mark.parametrize("shape", [(1,), (5,), (5, 1)])
def test_a_temperature_for_each_element_raises(formula: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    shapes = {**SHAPES[formula], "alpha": shape}
    with pytest.raises(ValueError, match="temperature must be a scalar, got"):
        formula(**{key: torch.zeros(of) for key, of in shapes.items()})


@pytest.mark.parametrize("shape", [(1,), (5,)])
def test_a_temperature_loss_of_several_temperatures_raises(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="temperature must be a scalar, got"):
        temperature_loss(torch.zeros(shape), torch.zeros(5), -1.0)


@pytest.mark.parametrize("shape", [(), (5, 1), (5, 3)])
def test_a_temperature_loss_of_log_probabilities_of_another_rank_raises(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"log-probabilities must be \[B\], got"):
        temperature_loss(torch.zeros(()), torch.zeros(shape), -1.0)


@pytest.mark.parametrize(
    ("rate", "expected"), [(0.0, [1.0, 2.0]), (1.0, [101.0, -198.0]), (0.25, [26.0, -48.0]), (0.005, [1.5, 1.0])]
)
def test_polyak_update_by_hand(rate: float, expected: list[float]) -> None:
    target, online = [double(1.0), double([[2.0]])], [double(101.0), double([[-198.0]])]
    polyak_update(target, online, rate)
    assert [x.item() for x in target] == pytest.approx(expected, rel=1e-12)
    assert [x.item() for x in online] == [101.0, -198.0]


def test_polyak_update_at_rate_1_copies_exactly() -> None:
    target, online = torch.tensor([0.1, 1e30]), torch.tensor([0.7, -3.0])
    polyak_update([target], [online], 1.0)
    assert torch.equal(target, online)


def test_polyak_update_writes_in_place_and_builds_no_graph() -> None:
    target, online = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    pointers = [x.data_ptr() for x in target.parameters()]
    before = [x.detach().clone() for x in online.parameters()]
    for _ in range(2):
        polyak_update(list(target.parameters()), list(online.parameters()), 0.5)
    assert [x.data_ptr() for x in target.parameters()] == pointers
    assert all(x.is_leaf and x.requires_grad and x.grad is None for x in target.parameters())
    assert all(torch.equal(x, y) for x, y in zip(online.parameters(), before, strict=True))
    target(torch.ones(1, 3)).sum().backward()
    assert all(x.grad is None for x in online.parameters())


def test_polyak_update_agrees_with_its_slow_twin() -> None:
    """psi_bar <- tau psi + (1 - tau) psi_bar, algorithm 1, while the online tensor moves on."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(4, generator=generator, dtype=torch.float64)
    twin = target.tolist()
    for _ in range(500):
        online = torch.randn(4, generator=generator, dtype=torch.float64)
        polyak_update([target], [online], 0.005)
        for i in range(4):
            twin[i] = 0.005 * online[i].item() + (1 - 0.005) * twin[i]
    assert target.tolist() == pytest.approx(twin, rel=1e-9)


@pytest.mark.parametrize(
    ("target", "online"), [([(3,)], [(1,)]), ([(3,)], [()]), ([(3,)], [(3,), (3,)]), ([(2, 3), (3,)], [(3,), (2, 3)])]
)
def test_polyak_update_of_other_shapes_raises(target: list[tuple[int, ...]], online: list[tuple[int, ...]]) -> None:
    tensors = [torch.zeros(shape) for shape in target]
    with pytest.raises(ValueError, match="must have the same shapes, got"):
        polyak_update(tensors, [torch.ones(shape) for shape in online], 0.5)
    assert not any(x.any() for x in tensors)
