"""Policy gradients: the published formulas as pure functions of tensors.

Trajectories are `[B, T]`, time last. `discount` is gamma, or 0 where a step terminated. `valid` is False in the
row after an episode's end, which is no step: what follows it is another episode.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def n_step_returns(reward: Tensor, discount: Tensor, valid: Tensor, value: Tensor) -> Tensor:
    """Return for every step the rewards to come, bootstrapped where the trajectory or the episode is cut.

    Mnih et al. 2016 (https://arxiv.org/abs/1602.01783), algorithm S3, backwards from the last step:
    `R_t = r_t + discount_t * R_{t+1}`, with `value` in place of `R_{t+1}` after the last step and where row t+1
    is no step: there the episode ended, by truncation (and its discount is gamma) or termination (and it is 0).

    Args:
        reward: `[B, T]`.
        discount: `[B, T]`.
        valid: `[B, T]` bool.
        value: `[B, T + 1]` values of the observations.

    Returns:
        `[B, T]` returns, without a gradient; of no meaning in invalid rows.

    Raises:
        ValueError: shapes do not agree.
    """
    agree = reward.ndim == 2 and reward.shape == discount.shape == valid.shape
    if not agree or value.shape != (reward.shape[0], reward.shape[1] + 1):
        raise ValueError(
            f"reward, discount and valid must be [B, T] and value [B, T + 1], got {tuple(reward.shape)}, "
            f"{tuple(discount.shape)}, {tuple(valid.shape)} and {tuple(value.shape)}"
        )
    returns = torch.empty_like(reward)
    following = value[:, -1]
    for t in reversed(range(reward.shape[1])):
        returns[:, t] = reward[:, t] + discount[:, t] * following
        following = torch.where(valid[:, t], returns[:, t], value[:, t])
    return returns


def rewards_to_go(reward: Tensor, gamma: float) -> Tensor:
    """Return `sum_k gamma**k r_{t+k}` for every step of one whole episode, without a bootstrap.

    Sutton et al. 1999; Williams 1992 (https://doi.org/10.1007/BF00992696). A truncated episode is not
    bootstrapped: there is no value function to do it with.

    Args:
        reward: `[T]`.
        gamma: discount of one step.

    Returns:
        `[T]`.

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
    """Return `-mean(log_probability * advantage)`, whose gradient is the policy gradient with the sign reversed.

    Sutton et al. 1999 (policy gradient theorem), equation 2. No gradient flows into the advantage.

    Args:
        log_probability: `[N]` of the actions taken, under the policy that is trained.
        advantage: `[N]`.

    Raises:
        ValueError: shapes differ, which would otherwise broadcast silently.
    """
    if log_probability.shape != advantage.shape or log_probability.ndim != 1:
        raise ValueError(f"both must be [N], got {tuple(log_probability.shape)} and {tuple(advantage.shape)}")
    return -(log_probability * advantage.detach()).mean()
