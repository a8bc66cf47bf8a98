"""Policy gradients: published formulas as pure functions of tensors.

Trajectories are `[B, T]`, with time as the last dimension. `discount` is gamma, or 0 where a step terminated. `valid`
is False in the last row of an episode. That row is not a step, and the next row starts another episode.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def n_step_returns(reward: Tensor, discount: Tensor, valid: Tensor, value: Tensor) -> Tensor:
    """Return every step's discounted future rewards, bootstrapped where the trajectory or the episode ends.

    Mnih et al. 2016 (https://arxiv.org/abs/1602.01783), algorithm S3, backwards from the last step:
    `R_t = r_t + discount_t * R_{t+1}`. `value` replaces `R_{t+1}` after the last step and where row t+1 is not a step.
    Before such a row the episode ended, by truncation (`discount_t` is gamma) or by termination (`discount_t` is 0).

    Args:
        reward: `[B, T]` rewards.
        discount: `[B, T]` discounts.
        valid: `[B, T]` bool, whether the row is a step.
        value: `[B, T + 1]` values of the observations.

    Returns:
        `[B, T]` returns, without a gradient; meaningless in invalid rows.

    Raises:
        ValueError: the shapes do not match.
    """
    match = reward.ndim == 2 and reward.shape == discount.shape == valid.shape
    if not match or value.shape != (reward.shape[0], reward.shape[1] + 1):
        raise ValueError(
            f"reward, discount, and valid must be [B, T] and value [B, T + 1], got {tuple(reward.shape)}, "
            f"{tuple(discount.shape)}, {tuple(valid.shape)}, and {tuple(value.shape)}"
        )
    returns = torch.empty_like(reward)
    following = value[:, -1]
    for t in reversed(range(reward.shape[1])):
        returns[:, t] = reward[:, t] + discount[:, t] * following
        following = torch.where(valid[:, t], returns[:, t], value[:, t])
    return returns


def rewards_to_go(reward: Tensor, gamma: float) -> Tensor:
    """Return `sum_k gamma**k r_{t+k}` for every step of one whole episode, without bootstrapping.

    Sutton et al. 1999; Williams 1992 (https://doi.org/10.1007/BF00992696). A truncated episode does not bootstrap
    either, since there is no value function.

    Args:
        reward: `[T]` rewards.
        gamma: discount of one step.

    Returns:
        `[T]` rewards to go.

    Raises:
        ValueError: the rewards are not `[T]`.
    """
    if reward.ndim != 1:
        raise ValueError(f"rewards must be [T], got {tuple(reward.shape)}")
    returns = torch.empty_like(reward)
    following = torch.zeros((), dtype=reward.dtype, device=reward.device)
    for t in reversed(range(len(reward))):
        following = reward[t] + gamma * following
        returns[t] = following
    return returns


def policy_gradient_loss(log_probability: Tensor, advantage: Tensor) -> Tensor:
    """Return `-mean(log_probability * advantage)`, whose gradient is the negative policy gradient.

    Sutton et al. 1999 (policy gradient theorem), equation 2. The advantage receives no gradient.

    Args:
        log_probability: `[N]` log-probabilities of the actions taken, under the trained policy.
        advantage: `[N]` advantages.

    Raises:
        ValueError: the shapes differ; the tensors would otherwise broadcast silently.
    """
    if log_probability.shape != advantage.shape or log_probability.ndim != 1:
        raise ValueError(
            f"log_probability and advantage must both be [N], got {tuple(log_probability.shape)} and "
            f"{tuple(advantage.shape)}"
        )
    return -(log_probability * advantage.detach()).mean()
