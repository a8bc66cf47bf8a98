"""Tests of double Q-learning and importance weights, by hand numbers, gradients, and definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learner.value_learning import double_q_learning, importance_weights, q_learning


def test_double_q_learning_selects_with_one_and_evaluates_with_the_other() -> None:
    q_tm1 = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    value = torch.tensor([[10.0, 99.0], [91.0, 20.0]], requires_grad=True)
    selector = torch.tensor([[5.0, 1.0], [1.0, 5.0]], requires_grad=True)
    actions, reward, discount = torch.tensor([1, 0]), torch.tensor([0.5, 1.0]), torch.tensor([0.9, 0.0])
    error = double_q_learning(q_tm1, actions, reward, discount, value, selector)
    assert error.tolist() == pytest.approx([0.5 + 0.9 * 10 - 2, 1.0 + 0.0 - 3.0])
    error.sum().backward()
    assert q_tm1.grad is not None
    assert q_tm1.grad.tolist() == [[0.0, -1.0], [-1.0, 0.0]]
    assert value.grad is None
    assert selector.grad is None


def test_with_one_network_double_q_learning_is_q_learning() -> None:
    torch.manual_seed(0)
    q_tm1, q_t = torch.randn(16, 5), torch.randn(16, 5)
    rest = (torch.randint(5, (16,)), torch.randn(16), torch.rand(16))
    assert torch.equal(double_q_learning(q_tm1, *rest, q_t, q_t), q_learning(q_tm1, *rest, q_t))


def test_double_q_learning_refuses_what_would_broadcast() -> None:
    q, column = torch.zeros(3, 2), torch.zeros(3, 1)
    with pytest.raises(ValueError, match="all other tensors"):
        double_q_learning(q, torch.zeros(3, dtype=torch.int64), column, torch.zeros(3), q, q)
    with pytest.raises(ValueError, match="all other tensors"):
        double_q_learning(q, torch.zeros(3, dtype=torch.int64), torch.zeros(3), torch.zeros(3), q, torch.zeros(3, 3))


def test_importance_weights_by_hand_and_at_both_ends_of_beta() -> None:
    probability = torch.tensor([0.1, 0.4, 0.5])
    assert importance_weights(probability, 10, 1.0).tolist() == pytest.approx([1.0, 0.25, 0.2])
    assert importance_weights(probability, 10, 0.5).tolist() == pytest.approx([1.0, 0.5, np.sqrt(0.2)])
    assert importance_weights(probability, 10, 0.0).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\], got 1.1"):
        importance_weights(probability, 10, 1.1)


def test_importance_weights_undo_the_bias_of_prioritized_draws() -> None:
    rng = np.random.default_rng(0)
    values, probability = rng.normal(size=50), rng.dirichlet(np.ones(50))
    sampled = rng.choice(50, size=400_000, p=probability)
    weights = importance_weights(torch.from_numpy(probability[sampled]), 50, 1.0).numpy()
    assert (weights * values[sampled]).sum() / weights.sum() == pytest.approx(values.mean(), abs=0.03)
