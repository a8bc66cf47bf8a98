"""Soft actor-critic: published formulas as pure functions of tensors.

Equations are those of Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications"
(https://arxiv.org/abs/1812.05905).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def soft_q_target(r_t: Tensor, discount_t: Tensor, q_t: Tensor, log_probability_t: Tensor, alpha: Tensor) -> Tensor:
    """Return `r_t + discount_t * (min_i q_t[i] - alpha * log_probability_t)`, equations 3 and 5.

    The minimum over the critics counters the bias of maximizing over noise (section 6, after Fujimoto et al. 2018).

    Args:
        r_t: `[B]` rewards.
        discount_t: `[B]` discounts.
        q_t: `[C, B]` values of the target critics for actions sampled from the policy in the next state.
        log_probability_t: `[B]` log-probabilities of those actions.
        alpha: scalar temperature.

    Returns:
        `[B]` targets, without a gradient.

    Raises:
        ValueError: the shapes do not match; the tensors would otherwise broadcast silently.
    """
    _check_shapes(q_t, r_t, discount_t, log_probability_t)
    _check_scalar(alpha)
    return (r_t + discount_t * (q_t.amin(0) - alpha * log_probability_t)).detach()


def critic_loss(q_tm1: Tensor, target: Tensor) -> Tensor:
    """Return half the squared error, averaged over the batch and summed over the critics; equation 5.

    Args:
        q_tm1: `[C, B]` values of the actions taken.
        target: `[B]` targets, which receive no gradient.

    Raises:
        ValueError: the shapes do not match.
    """
    _check_shapes(q_tm1, target)
    return 0.5 * (q_tm1 - target.detach()).square().mean(1).sum()


def actor_loss(q: Tensor, log_probability: Tensor, alpha: Tensor) -> Tensor:
    """Return `mean(alpha * log_probability - min_i q[i])`, equations 7 and 9.

    Args:
        q: `[C, B]` values of actions sampled from the policy with the reparameterization trick.
        log_probability: `[B]` log-probabilities of those actions.
        alpha: scalar temperature, which receives no gradient.

    Raises:
        ValueError: the shapes do not match.
    """
    _check_shapes(q, log_probability)
    _check_scalar(alpha)
    return (alpha.detach() * log_probability - q.amin(0)).mean()


def temperature_loss(log_alpha: Tensor, log_probability: Tensor, target_entropy: float) -> Tensor:
    """Return `-mean(alpha * (log_probability + target_entropy))`, equation 18, as a function of log alpha.

    Args:
        log_alpha: scalar parameter, the logarithm of the temperature.
        log_probability: `[B]` log-probabilities of sampled actions, which receive no gradient.
        target_entropy: target of the policy's entropy, in nats.

    Raises:
        ValueError: the parameter is not a scalar, or the log-probabilities are not `[B]`.
    """
    _check_scalar(log_alpha)
    if log_probability.ndim != 1:
        raise ValueError(f"log-probabilities must be [B], got {tuple(log_probability.shape)}")
    return -(log_alpha.exp() * (log_probability + target_entropy).detach()).mean()


def polyak_update(target: Sequence[Tensor], online: Sequence[Tensor], rate: float) -> None:
    """Move each target toward its online tensor, in place: `target = (1 - rate) * target + rate * online`.

    Raises:
        ValueError: the two lists differ in the number or the shapes of their tensors.
    """
    shapes = [[tuple(x.shape) for x in tensors] for tensors in (target, online)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"targets and online tensors must have the same shapes, got {shapes[0]} and {shapes[1]}")
    with torch.no_grad():
        torch._foreach_lerp_(list(target), list(online), rate)


def _check_shapes(values: Tensor, *others: Tensor) -> None:
    wrong = [tuple(x.shape) for x in others if x.shape != values.shape[1:]]
    if values.ndim != 2 or wrong:
        raise ValueError(
            f"values must be [C, B] and all other tensors [B], got values {tuple(values.shape)} and others {wrong}"
        )


def _check_scalar(temperature: Tensor) -> None:
    if temperature.ndim != 0:
        raise ValueError(f"the temperature must be a scalar, got {tuple(temperature.shape)}")
