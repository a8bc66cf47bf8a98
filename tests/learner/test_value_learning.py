"""Tests of the formulas by hand numbers, by their gradients, and against slow twins written like the papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.value_learning import huber, q_learning


def test_q_learning_by_hand() -> None:
    # Powers apart, so that a wrong action, network, branch or a minimum shows as a number of its own.
    q_tm1 = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    q_t = torch.tensor([[100.0, 900.0, 500.0], [700.0, 300.0, 200.0], [600.0, 100.0, 800.0]])
    r_t = torch.tensor([10.0, 20.0, 30.0])
    discount_t = torch.tensor([0.5, 0.9, 0.0])
    td_error = q_learning(q_tm1, torch.tensor([2, 0, 1]), r_t, discount_t, q_t)
    assert td_error.tolist() == pytest.approx([10 + 450 - 4, 20 + 630 - 1, 30 - 2])


def test_q_learning_takes_no_value_where_the_episode_terminated() -> None:
    unlearned = torch.tensor([[1e30, -1e30]])
    td_error = q_learning(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([7.0]), torch.tensor([0.0]), unlearned)
    assert td_error.item() == 7.0


def naive_q_learning(q: np.ndarray, action: np.ndarray, reward: np.ndarray, discount: np.ndarray, q_target: np.ndarray):
    """y_j = r_j if the episode terminates at step j + 1, else r_j + gamma max_a' Q^(phi_j+1, a'); error y_j - Q."""
    errors = []
    for j in range(len(q)):
        y = reward[j]
        if discount[j] != 0.0:
            best = q_target[j][0]
            for value in q_target[j]:
                best = value if value > best else best
            y = y + discount[j] * best
        errors.append(y - q[j][action[j]])
    return errors


@pytest.mark.parametrize("seed", range(5))
def test_q_learning_agrees_with_its_slow_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size, actions = int(rng.integers(1, 40)), int(rng.integers(1, 9))
    arrays = (
        rng.normal(size=(size, actions)),
        rng.integers(actions, size=size),
        rng.normal(size=size),
        rng.choice([0.0, 0.9, 0.99**3], size),
        rng.normal(size=(size, actions)),
    )
    td_error = q_learning(*map(torch.from_numpy, arrays))
    np.testing.assert_allclose(td_error.numpy(), naive_q_learning(*arrays), rtol=1e-12)


def test_the_gradient_reaches_the_value_of_the_action_taken_and_nothing_else() -> None:
    q_tm1, q_t = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    r_t, discount_t = torch.randn(4, requires_grad=True), torch.full((4,), 0.9, requires_grad=True)
    q_learning(q_tm1, torch.tensor([0, 2, 1, 2]), r_t, discount_t, q_t).sum().backward()
    expected = -torch.eye(3)[[0, 2, 1, 2]]
    assert torch.equal(_gradient(q_tm1), expected)
    assert [x.grad for x in (q_t, r_t, discount_t)] == [None, None, None]


def test_the_loss_moves_a_value_by_the_clipped_error() -> None:
    q_tm1 = torch.zeros(3, 2, requires_grad=True)
    error = q_learning(q_tm1, torch.tensor([0, 1, 0]), torch.tensor([5.0, 0.25, -9.0]), torch.zeros(3), q_tm1)
    huber(error).sum().backward()
    assert _gradient(q_tm1).tolist() == [[-1.0, 0.0], [0.0, -0.25], [1.0, 0.0]]


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


GOOD = {"q_tm1": (5, 3), "a_tm1": (5,), "r_t": (5,), "discount_t": (5,), "q_t": (5, 3)}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("a_tm1", (5, 1)), ("r_t", (5, 1)), ("discount_t", (5, 1)),  # these would broadcast to [B, B]
        ("a_tm1", ()), ("r_t", (1,)), ("discount_t", (1,)), ("r_t", (4,)),
        ("q_t", (5, 1)), ("q_t", (1, 3)), ("q_t", (5,)), ("q_t", (5, 4)), ("q_tm1", (5, 4)), ("q_tm1", (4, 3)),
    ],
)  # fmt: skip
def test_shapes_that_do_not_agree_raise(name: str, shape: tuple[int, ...]) -> None:
    shapes = {**GOOD, name: shape}
    tensors = {key: torch.zeros(of, dtype=torch.int64 if key == "a_tm1" else None) for key, of in shapes.items()}
    with pytest.raises(ValueError, match=r"values must be \[B, A\] and all other tensors \[B\]"):
        q_learning(**tensors)


@pytest.mark.parametrize("shape", [(5,), (2, 5, 3)])
def test_values_of_another_rank_raise(shape: tuple[int, ...]) -> None:
    values, other = torch.zeros(shape), torch.zeros(shape[:1])
    with pytest.raises(ValueError, match=r"values must be \[B, A\]"):
        q_learning(values, other.long(), other, other, values)


def test_the_complaint_names_the_shapes() -> None:
    flat = torch.zeros(5)
    with pytest.raises(ValueError, match=r"got values \(5, 3\) and others \[\(5, 1\)\]"):
        q_learning(torch.zeros(5, 3), flat.long(), torch.zeros(5, 1), flat, torch.zeros(5, 3))


ERRORS = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.25, 1.0, 1.5, 100.0], dtype=torch.float64)


def test_huber_is_as_defined() -> None:
    expected = [x * x / 2 if abs(x) <= 1 else abs(x) - 0.5 for x in ERRORS.tolist()]
    assert huber(ERRORS).tolist() == pytest.approx(expected)


def test_hubers_gradient_is_the_clipped_error() -> None:
    error = ERRORS.clone().requires_grad_()
    huber(error).sum().backward()
    assert torch.equal(_gradient(error), ERRORS.clamp(-1.0, 1.0))
