"""Gaussian and tanh-squashed Gaussian distributions over unit actions, as pure functions of their parameters."""

from __future__ import annotations

import math

from torch import Tensor, nn

_LOG_TWO_PI = math.log(2 * math.pi)
_LOG_STD_RANGE = (-5.0, 2.0)


def mean_and_log_std(output: Tensor) -> tuple[Tensor, Tensor]:
    """Split a head's output `[B, 2 D]` into means and log standard deviations, both `[B, D]`.

    The log standard deviations are squashed into [-5, 2], so that their exponential is neither too small nor too large.
    """
    mean, raw = output.chunk(2, 1)
    low, high = _LOG_STD_RANGE
    return mean, low + 0.5 * (high - low) * (raw.tanh() + 1.0)


def gaussian_log_density(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return the log-density `[B, D]` of each dimension of `x`, in nats."""
    return -0.5 * (((x - mean) / log_std.exp()).square() + _LOG_TWO_PI) - log_std


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Return the entropy `[B]` over all dimensions, in nats."""
    return (log_std + 0.5 * (1.0 + _LOG_TWO_PI)).sum(1)


def squashed_log_density(raw: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return the log-density `[B]` of `tanh(raw)`: log N(raw) - sum log(1 - tanh(raw)**2).

    This is equation 26 of Haarnoja et al. 2018 (https://arxiv.org/abs/1812.05905). The second term is computed as
    `2 (log 2 - raw - softplus(-2 raw))`, which does not underflow.
    """
    jacobian = 2.0 * (math.log(2.0) - raw - nn.functional.softplus(-2.0 * raw))
    return (gaussian_log_density(raw, mean, log_std) - jacobian).sum(1)
