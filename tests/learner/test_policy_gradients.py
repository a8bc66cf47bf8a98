"""Tests of the formulas by hand numbers, by their gradients, and against slow twins written like the papers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.policy_gradients import n_step_returns, policy_gradient_loss, rewards_to_go

Ending = Literal["terminated", "truncated"]
Episode = tuple[list[float], Ending]
GARBAGE = 1e6  # content of a row that is not a step; rewards and values are of the order of 1
WRONG = -3e7  # a value that nothing may bootstrap from


def double(numbers: list[float] | list[list[float]]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def test_n_step_returns_by_hand() -> None:
    # A termination, a truncation, and the end of the rows; each reward is another power of two.
    reward = double([[1, 2, GARBAGE, 4, 8, GARBAGE, 16, 32]])
    discount = double([[0.5, 0, GARBAGE, 0.5, 0.5, GARBAGE, 0.5, 0.5]])
    valid = torch.tensor([[True, True, False, True, True, False, True, True]])
    value = double([[WRONG, WRONG, WRONG, WRONG, WRONG, 640, WRONG, WRONG, 8000]])
    returns = n_step_returns(reward, discount, valid, value)
    assert returns[valid].tolist() == [1 + 0.5 * 2, 2, 4 + 0.5 * 328, 8 + 0.5 * 640, 16 + 0.5 * 4032, 32 + 0.5 * 8000]


def test_n_step_returns_of_one_row_by_hand() -> None:
    reward, discount, value = double([[3], [5], [7]]), double([[0.5], [0], [0.25]]), double([[WRONG, 8]] * 3)
    returns = n_step_returns(reward, discount, torch.ones(3, 1, dtype=torch.bool), value)
    assert returns.tolist() == [[3 + 4], [5], [7 + 2]]


def test_a_row_that_is_no_step_may_come_first_and_last() -> None:
    reward, discount = double([[GARBAGE, 3, GARBAGE]]), double([[GARBAGE, 0.5, GARBAGE]])
    valid = torch.tensor([[False, True, False]])
    returns = n_step_returns(reward, discount, valid, double([[WRONG, WRONG, 10, WRONG]]))
    assert returns[valid].tolist() == [3 + 5]


def test_n_step_returns_of_no_rows_are_none() -> None:
    none = torch.zeros(2, 0)
    assert n_step_returns(none, none, none.bool(), torch.ones(2, 1)).shape == (2, 0)


@dataclass
class Lane:
    """T rows of one lane: `end` is how an episode ended in the row, `valid` whether the row is a step."""

    reward: list[float]
    end: list[Ending | None]
    valid: list[bool]
    value: list[float]

    def pieces(self) -> list[range]:
        """Return the ranges of consecutive rows up to an episode's end, or up to the last row."""
        pieces, start, rows = [], 0, len(self.reward)
        for row in range(rows):
            if not self.valid[row]:
                start = row + 1
            elif self.end[row] or row == rows - 1:
                pieces.append(range(start, row + 1))
        return pieces


NUMBERS = st.floats(-4.0, 4.0, width=32)


@st.composite
def lanes(draw: st.DrawFn) -> list[Lane]:
    rows, result = draw(st.integers(1, 12)), []
    for _ in range(draw(st.integers(1, 4))):
        end: list[Ending | None] = draw(
            st.lists(st.sampled_from([None, None, "terminated", "truncated"]), min_size=rows, max_size=rows)
        )
        valid = [draw(st.booleans())]  # the row before this trajectory may have ended an episode
        for row in range(1, rows):
            valid.append(not (valid[row - 1] and end[row - 1]))
        reward = [draw(NUMBERS) if valid[row] else GARBAGE for row in range(rows)]
        result.append(Lane(reward, end, valid, [draw(NUMBERS) for _ in range(rows + 1)]))
    return result


def tensors(lanes: list[Lane], gamma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    discount = [
        [
            (0.0 if end == "terminated" else gamma) if valid else GARBAGE
            for end, valid in zip(a.end, a.valid, strict=True)
        ]
        for a in lanes
    ]
    valid = torch.tensor([a.valid for a in lanes])
    return double([a.reward for a in lanes]), double(discount), valid, double([a.value for a in lanes])


def naive_n_step_returns(lane: Lane, gamma: float) -> dict[int, float]:
    """R = 0 for terminal s_t, V(s_t) for non-terminal s_t; for i in t - 1, ..., t_start: R <- r_i + gamma R."""
    returns = {}
    for piece in lane.pieces():
        t = piece[-1] + 1
        R = 0.0 if lane.end[t - 1] == "terminated" else lane.value[t]
        for i in reversed(piece):
            R = lane.reward[i] + gamma * R
            returns[i] = R
    return returns


@given(lanes(), st.sampled_from([0.0, 0.5, 0.99, 1.0]))
def test_n_step_returns_agree_with_their_slow_twin(lanes: list[Lane], gamma: float) -> None:
    returns = n_step_returns(*tensors(lanes, gamma))
    for lane, row in zip(lanes, returns.tolist(), strict=True):
        expected = naive_n_step_returns(lane, gamma)
        assert sorted(expected) == [i for i, valid in enumerate(lane.valid) if valid]
        for i, R in expected.items():
            assert row[i] == pytest.approx(R, rel=1e-12, abs=1e-12)


@given(lanes())
def test_what_stands_in_a_row_that_is_no_step_changes_nothing(lanes: list[Lane]) -> None:
    reward, discount, valid, value = tensors(lanes, 0.9)
    returns = n_step_returns(reward, discount, valid, value)
    again = n_step_returns(reward.where(valid, -7.0), discount.where(valid, 0.0), valid, value)
    assert torch.equal(returns[valid], again[valid])


def test_n_step_returns_have_no_gradient_and_change_no_input() -> None:
    reward, discount, value = (torch.rand(2, rows, requires_grad=True) for rows in (3, 3, 4))
    before = [x.detach().clone() for x in (reward, discount, value)]
    returns = n_step_returns(reward, discount, torch.tensor([[True, True, False], [True] * 3]), value)
    assert not returns.requires_grad
    assert all(torch.equal(x, y) for x, y in zip((reward, discount, value), before, strict=True))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("value", (5, 3)), ("value", (5, 5)), ("value", (4, 4)), ("value", (5,)), ("value", (5, 4, 1)),
        ("reward", (5, 4)), ("reward", (5, 1)), ("reward", (5,)), ("reward", ()), ("reward", (5, 3, 1)),
        ("discount", (5, 1)), ("discount", (1, 3)), ("discount", ()), ("discount", (3,)),
        ("valid", (5, 1)), ("valid", (1, 3)), ("valid", (3,)),
    ],
)  # fmt: skip
def test_n_step_shapes_that_do_not_agree_raise(name: str, shape: tuple[int, ...]) -> None:
    shapes = {"reward": (5, 3), "discount": (5, 3), "valid": (5, 3), "value": (5, 4), name: shape}
    with pytest.raises(ValueError, match=r"must be \[B, T\] and value \[B, T \+ 1\], got"):
        n_step_returns(
            **{key: torch.zeros(of, dtype=torch.bool if key == "valid" else None) for key, of in shapes.items()}
        )


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 1)])
def test_n_step_returns_of_another_rank_raise(shape: tuple[int, ...]) -> None:
    like = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"must be \[B, T\]"):
        n_step_returns(like, like, like.bool(), torch.zeros(4, 5))


@pytest.mark.parametrize(
    ("gamma", "expected"), [(0.5, [1 + 10 + 100, 20 + 200, 400]), (0.0, [1, 20, 400]), (1.0, [421, 420, 400])]
)
def test_rewards_to_go_by_hand(gamma: float, expected: list[float]) -> None:
    assert rewards_to_go(double([1, 20, 400]), gamma).tolist() == expected


def naive_rewards_to_go(reward: list[float], gamma: float) -> list[float]:
    """R_t = sum over k of gamma^k r_{t + k}."""
    returns = []
    for t in range(len(reward)):
        R = 0.0
        for k in range(len(reward) - t):
            R += gamma**k * reward[t + k]
        returns.append(R)
    return returns


@given(st.lists(NUMBERS, max_size=30), st.sampled_from([0.0, 0.5, 0.99, 1.0]))
def test_rewards_to_go_agree_with_their_slow_twin(reward: list[float], gamma: float) -> None:
    assert rewards_to_go(double(reward), gamma).tolist() == pytest.approx(
        naive_rewards_to_go(reward, gamma), rel=1e-12, abs=1e-12
    )


def test_a_reward_counts_for_the_steps_before_it_and_for_none_after() -> None:
    jacobian = torch.autograd.functional.jacobian(lambda reward: rewards_to_go(reward, 0.5), double([3, 1, 2]))
    assert torch.equal(jacobian, double([[1, 0.5, 0.25], [0, 1, 0.5], [0, 0, 1]]))


@pytest.mark.parametrize("shape", [(), (2, 3), (3, 1)])
def test_rewards_to_go_of_another_rank_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"rewards must be \[T\], got"):
        rewards_to_go(torch.zeros(shape), 0.9)


EPISODES = st.lists(
    st.tuples(st.lists(NUMBERS, min_size=1, max_size=8), st.sampled_from(["terminated", "truncated"])),
    min_size=1,
    max_size=4,
)


def padded(episodes: list[Episode], rows: int) -> tuple[list[Lane], Tensor]:
    """Return one lane per whole episode, with garbage after its end and with values of zero."""
    batch = []
    for reward, end in episodes:
        padding = rows - len(reward)
        batch.append(
            Lane(
                reward + [GARBAGE] * padding,
                [None] * (len(reward) - 1) + [end] + [None] * padding,
                [True] * len(reward) + [False] * padding,
                [0.0] * (rows + 1),
            )
        )
    return batch, torch.tensor([lane.valid for lane in batch])


@given(EPISODES, st.integers(8, 10), st.sampled_from([0.0, 0.9, 1.0]))
def test_without_values_padded_episodes_return_their_rewards_to_go(
    episodes: list[Episode], rows: int, gamma: float
) -> None:
    batch, valid = padded(episodes, rows)
    returns = n_step_returns(*tensors(batch, gamma))
    expected = torch.cat([rewards_to_go(double(reward), gamma) for reward, _ in episodes])
    torch.testing.assert_close(returns[valid], expected, rtol=1e-12, atol=1e-12)


def test_padding_enters_neither_the_loss_nor_its_gradient() -> None:
    episodes: list[Episode] = [([1.0, 2.0], "terminated"), ([4.0], "truncated"), ([8.0, 16.0, 32.0], "terminated")]
    batch, valid = padded(episodes, 4)
    log_probability = torch.full((3, 4), -0.5, dtype=torch.float64, requires_grad=True)
    returns = n_step_returns(*tensors(batch, 0.5))
    loss = policy_gradient_loss(log_probability[valid], returns[valid])
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (2 + 2 + 4 + 24 + 32 + 32) / 6)
    expected = double([[2, 2, 0, 0], [4, 0, 0, 0], [24, 32, 32, 0]]) / -6
    torch.testing.assert_close(_gradient(log_probability), expected)


def test_policy_gradient_loss_by_hand() -> None:
    loss = policy_gradient_loss(double([-1, -2, -4]), double([10, 100, -1000]))
    assert loss.item() == pytest.approx((10 + 200 - 4000) / 3)


def test_the_gradient_is_the_advantage_and_reaches_the_log_probability_alone() -> None:
    log_probability = double([-1, -2, -4, -8]).requires_grad_()
    advantage = double([10, 0, -100, 1000]).requires_grad_()
    policy_gradient_loss(log_probability, advantage).backward()
    assert _gradient(log_probability).tolist() == [-2.5, 0.0, 25.0, -250.0]
    assert advantage.grad is None


@pytest.mark.parametrize("seed", range(5))
def test_policy_gradient_loss_agrees_with_its_slow_twin(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(1, 40, (), generator=generator)) if seed else 1
    log_probability, advantage = torch.randn(2, size, generator=generator, dtype=torch.float64)
    total = 0.0
    for i in range(size):
        total += log_probability[i].item() * advantage[i].item()
    assert policy_gradient_loss(log_probability, advantage).item() == pytest.approx(-total / size, rel=1e-12)


def naive_policy_gradient(pi: list[float], q: list[float]) -> list[float]:
    """Sum over a of d pi(a) / d theta * Q(a), with a parameter theta_j for each action and pi their softmax."""
    gradient = []
    for j in range(len(pi)):
        total = 0.0
        for a in range(len(pi)):
            total += pi[a] * ((a == j) - pi[j]) * q[a]
        gradient.append(total)
    return gradient


def test_over_actions_as_frequent_as_the_policy_takes_them_it_is_the_policy_gradient() -> None:
    action = torch.tensor([0, 1, 1, 1, 2, 2, 2, 2])
    pi, q = [1 / 8, 3 / 8, 4 / 8], double([40, -8, 16])
    theta = double([math.log(p) for p in pi]).requires_grad_()
    policy_gradient_loss(theta.log_softmax(0)[action], q[action]).backward()
    assert (-_gradient(theta)).tolist() == pytest.approx(naive_policy_gradient(pi, q.tolist()), rel=1e-12)


@pytest.mark.parametrize(("left", "right"), [((5,), (5, 1)), ((5, 1), (5,)), ((5,), ()), ((5,), (1,)), ((5,), (4,))])
def test_policy_gradient_shapes_that_differ_raise(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must both be \[N\], got"):
        policy_gradient_loss(torch.zeros(left), torch.zeros(right))


@pytest.mark.parametrize("shape", [(), (5, 1), (5, 3)])
def test_policy_gradient_loss_of_another_rank_raises(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must both be \[N\], got"):
        policy_gradient_loss(torch.zeros(shape), torch.zeros(shape))
