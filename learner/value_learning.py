"""Value learning: published formulas as pure functions of tensors.

Subscripts are times: `q_tm1` are the values in the state in which `a_tm1` was taken. The next state came with `r_t` and
`discount_t`, and has the values `q_t`. `discount_t` is 0 after a termination, so that a target needs no "done".
Targets receive no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def q_learning(q_tm1: Tensor, a_tm1: Tensor, r_t: Tensor, discount_t: Tensor, q_t: Tensor) -> Tensor:
    """Return the TD error `r_t + discount_t * max_a q_t - q_tm1[a_tm1]`.

    Watkins & Dayan 1992; with `q_t` of a target network, Mnih et al. 2015 (https://doi.org/10.1038/nature14236),
    algorithm 1. With n-step rewards and discounts the target is the n-step target (Sutton 1988).

    Args:
        q_tm1: `[B, A]` values of the online network.
        a_tm1: `[B]` int64 actions taken.
        r_t: `[B]` rewards.
        discount_t: `[B]` discounts.
        q_t: `[B, A]` values to bootstrap from.

    Returns:
        `[B]` TD errors, with a gradient for `q_tm1` only.

    Raises:
        ValueError: the shapes do not match; the tensors would otherwise broadcast silently.
    """
    _check_shapes(q_tm1, a_tm1, r_t, discount_t, q_t)
    target = r_t + discount_t * q_t.amax(1)
    return target.detach() - _select(q_tm1, a_tm1)


def _select(values: Tensor, action: Tensor) -> Tensor:
    return values.gather(1, action[:, None]).squeeze(1)


def _check_shapes(q_tm1: Tensor, a_tm1: Tensor, r_t: Tensor, discount_t: Tensor, *q_t: Tensor) -> None:
    batch = q_tm1.shape[:1]
    wrong = [tuple(x.shape) for x in (a_tm1, r_t, discount_t) if x.shape != batch]
    wrong += [tuple(x.shape) for x in q_t if x.shape != q_tm1.shape]
    if q_tm1.ndim != 2 or wrong:
        raise ValueError(
            f"values must be [B, A] and all other tensors [B], got values {tuple(q_tm1.shape)} and others {wrong}"
        )


def huber(error: Tensor) -> Tensor:
    """Return `error**2 / 2` within [-1, 1] and `|error| - 1/2` outside, elementwise.

    The gradient is the error clipped to [-1, 1], as in Mnih et al. 2015 (methods, "training details").
    """
    return torch.nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none")


def double_q_learning(
    q_tm1: Tensor, a_tm1: Tensor, r_t: Tensor, discount_t: Tensor, q_t_value: Tensor, q_t_selector: Tensor
) -> Tensor:
    """Return the TD error `r_t + discount_t * q_t_value[argmax_a q_t_selector] - q_tm1[a_tm1]`.

    Double Q-learning, van Hasselt et al. 2015 (https://arxiv.org/abs/1509.06461), equation 4. One network selects the
    action and another evaluates it, so that an overestimated value is not both selected and used.

    Args:
        q_tm1: `[B, A]` values of the online network.
        a_tm1: `[B]` int64 actions taken.
        r_t: `[B]` rewards.
        discount_t: `[B]` discounts.
        q_t_value: `[B, A]` values of the target network, which evaluate the action.
        q_t_selector: `[B, A]` values of the online network, which select the action.

    Returns:
        `[B]` TD errors, with a gradient for `q_tm1` only.

    Raises:
        ValueError: the shapes do not match.
    """
    _check_shapes(q_tm1, a_tm1, r_t, discount_t, q_t_value, q_t_selector)
    target = r_t + discount_t * _select(q_t_value, q_t_selector.argmax(1))
    return target.detach() - _select(q_tm1, a_tm1)


def importance_weights(probability: Tensor, size: int, beta: float) -> Tensor:
    """Return `(size * probability) ** -beta`, divided by the largest of the batch.

    Schaul et al. 2016 (https://arxiv.org/abs/1511.05952), section 3.4. The weights correct the bias of sampling item i
    with probability P(i) instead of 1 / size, completely at beta = 1.

    Args:
        probability: `[B]` positive probabilities with which the items were sampled.
        size: number of items in the table when the batch was sampled.
        beta: exponent in [0, 1]: 0 corrects none of the bias, 1 all of it.

    Returns:
        `[B]` weights in (0, 1].

    Raises:
        ValueError: beta lies outside [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
    weights = (size * probability) ** -beta
    return weights / weights.amax()
