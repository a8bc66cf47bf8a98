"""Tests of A2C: updates against a slow twin, bootstrapped returns, the parts of the loss, and batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from learner import AdvantageActorCritic
from learner.batches import TrajectoryBatch
from replay.types import Trajectory
from tests.learner.algorithms.policy_gradient_updates import assert_stepped, batch_of, sgd_update
from tests.learner.toys import CARTPOLE, make_trajectory, quiet_trainer, small, toy


def unroll(seed: int, ends: dict[int, str], rows: int = 5, gamma: float = 0.9) -> Trajectory:
    """Return a trajectory of fixed length in which the step in row t ends an episode, for each t in `ends`."""
    made = make_trajectory(rows, seed=seed, gamma=gamma)
    discount, valid = np.full(rows, gamma, np.float32), np.ones(rows, np.bool_)
    for row, how in ends.items():
        discount[row] = gamma * (how == "truncated")
        if row + 1 < rows:
            valid[row + 1] = False
            discount[row + 1] = 0.0
    return replace(made, discount=discount, valid=valid, episodic=False)


UNROLLS = [
    unroll(0, {}),
    unroll(1, {2: "truncated"}),
    unroll(2, {1: "terminated", 4: "truncated"}),
    unroll(3, {0: "truncated", 4: "terminated"}),
]


def small_a2c(**options: Any) -> AdvantageActorCritic:
    return small(
        AdvantageActorCritic, CARTPOLE, **{"optimizer": "sgd", "lr": 0.1, "gamma": 0.9, "batch_size": 20,
        "unroll_length": 5, **options},
    )  # fmt: skip


def actor_critic_twin(module: AdvantageActorCritic, trajectories: Sequence[Trajectory]) -> list[Tensor]:
    """Return the gradient of algorithm S3 of Mnih et al. 2016, for trajectories in which episodes end."""
    hparams = module.hparams
    actor, critic, entropy = [], [], []
    for it in trajectories:
        values = [module.critic(module.policy.torso(torch.from_numpy(o[None])))[0, 0] for o in it.observation]
        for t in range(len(it.reward)):
            if not it.valid[t]:
                continue
            # Forwards from t: the rewards up to the end of the episode or trajectory, then the value to bootstrap from.
            target, weight, s = 0.0, 1.0, t
            while True:
                target += weight * float(it.reward[s])
                weight *= float(it.discount[s])
                s += 1
                if s == len(it.reward) or not it.valid[s]:
                    target += weight * values[s].item()
                    break
            logits = module.policy.head(module.policy.torso(torch.from_numpy(it.observation[t : t + 1])))[0]
            distribution = torch.distributions.Categorical(logits=logits)
            advantage = target - values[t].item()
            actor.append(-distribution.log_prob(torch.tensor(it.action[t])) * advantage)
            critic.append((target - values[t]) ** 2)
            entropy.append(distribution.entropy())
    loss = (
        torch.stack(actor).mean()
        + hparams["critic_beta"] * torch.stack(critic).mean()
        - hparams["entropy_beta"] * torch.stack(entropy).mean()
    )
    return list(torch.autograd.grad(loss, list(module.parameters())))


@pytest.mark.parametrize("betas", [(0.01, 0.5), (0.3, 2.0), (0.0, 0.1)])
def test_an_actor_critic_update_is_theta_minus_lr_times_grad(betas: tuple[float, float]) -> None:
    module = small_a2c(entropy_beta=betas[0], critic_beta=betas[1])
    gradient = actor_critic_twin(copy.deepcopy(module), UNROLLS)
    before, after = sgd_update(module, batch_of(UNROLLS))
    assert_stepped(before, gradient, after)


class LossSpy:
    """Records the arguments of an A2C's loss."""

    def __init__(self, module: AdvantageActorCritic) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self._loss: Callable[..., Tensor] = module.loss
        module.loss = self  # type: ignore[assignment]

    def __call__(self, *arguments: Tensor) -> Tensor:
        self.calls.append(arguments)  # type: ignore[arg-type]
        return self._loss(*arguments)


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        # Every observation has the value 10, gamma is 1/2, the step in row 2 ends the episode, row 3 is a reset.
        ("truncated", [4.0, 6.0, 8.0, 9.0]),
        ("terminated", [2.75, 3.5, 3.0, 9.0]),
    ],
)
def test_returns_bootstrap_at_truncation_inside_an_unroll_and_not_at_termination(
    end: str, expected: list[float]
) -> None:
    module = small_a2c(gamma=0.5)
    with torch.no_grad():
        module.critic.weight.zero_()
        module.critic.bias.fill_(10.0)
    spy = LossSpy(module)
    trajectory = replace(unroll(0, {2: end}, gamma=0.5), reward=np.array([1, 2, 3, 100, 4], np.float32))
    sgd_update(module, TrajectoryBatch.of([trajectory]))
    ((states, actions, returns),) = spy.calls
    assert returns.tolist() == expected
    assert states.shape == (4, 4)
    assert actions.shape == (4,)


def test_compute_returns_by_hand() -> None:
    """The `done` of the second step excludes the last value, 10, from the first two returns."""
    module = small_a2c(gamma=0.5)
    rewards, dones = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 0])
    assert module.compute_returns(rewards, dones, torch.tensor(10.0)).tolist() == [2.0, 2.0, 9.0]
    assert module.compute_returns(rewards, torch.zeros(3), torch.tensor(10.0)).tolist() == [4.25, 6.5, 9.0]
    assert module.compute_returns([1, 2, 4], [False, True, True], 10).tolist() == [2.0, 2.0, 4.0]  # type: ignore[arg-type]


def test_values_and_returns_are_flat_and_a_column_is_refused() -> None:
    module = small_a2c()
    batch = batch_of(UNROLLS)
    states, actions = batch.visited, batch.action[batch.valid]
    steps = len(states)
    assert module(states)[1].shape == (steps,)
    assert module(states)[0].shape == (steps, 2)
    torch.testing.assert_close(module(states)[0].exp().sum(1), torch.ones(steps))
    assert module.loss(states, actions, torch.zeros(steps)).shape == ()
    for shape in ((steps, 1), (1, steps), (1,)):
        with pytest.raises(ValueError, match=rf"values and returns must both be \[N\], got \({steps},\), "):
            module.loss(states, actions, torch.zeros(shape))


def head_gradients(**betas: float) -> dict[str, Tensor]:
    module, batch = small_a2c(seed=0, **betas), batch_of(UNROLLS)
    loss = module.loss(batch.visited, batch.action[batch.valid], torch.linspace(-1, 3, int(batch.valid.sum())))
    names = ("policy.head.weight", "critic.weight")
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(loss, [parameters[name] for name in names], allow_unused=True)
    return {n: torch.zeros(()) if g is None else g for n, g in zip(names, gradients, strict=True)}


def test_each_beta_does_its_own_part() -> None:
    """The critic's head has gradients of the critic's loss only, the actor's head of all other terms."""
    actor_alone = head_gradients(critic_beta=0.0, entropy_beta=0.0)
    assert not actor_alone["critic.weight"].any(), "the advantage must not train the critic"
    assert actor_alone["policy.head.weight"].any()
    one, three = (head_gradients(critic_beta=beta, entropy_beta=0.0) for beta in (1.0, 3.0))
    torch.testing.assert_close(three["critic.weight"], 3 * one["critic.weight"])
    assert one["critic.weight"].any()
    for gradients in (one, three):
        torch.testing.assert_close(gradients["policy.head.weight"], actor_alone["policy.head.weight"])
    half, whole = (head_gradients(critic_beta=1.0, entropy_beta=beta) for beta in (0.5, 1.0))
    torch.testing.assert_close(half["critic.weight"], one["critic.weight"])
    bonus = whole["policy.head.weight"] - actor_alone["policy.head.weight"]
    torch.testing.assert_close(half["policy.head.weight"] - actor_alone["policy.head.weight"], 0.5 * bonus)
    assert bonus.any()


def test_more_entropy_is_a_smaller_loss() -> None:
    module = small_a2c(critic_beta=0.0, entropy_beta=1.0)
    states, actions = torch.randn(6, 4), torch.zeros(6, dtype=torch.int64)
    value = module(states)[1].detach()  # with an advantage of 0 only the bonus remains
    losses = []
    for scale in (0.0, 30.0):
        with torch.no_grad():
            module.policy.head.weight.mul_(scale or 1.0)
            module.policy.head.bias.mul_(scale or 1.0)
        losses.append(module.loss(states, actions, value).item())
    assert -np.log(2) <= losses[0] < losses[1] <= 0.0


def test_a_batch_is_batch_size_rows() -> None:
    module = small(AdvantageActorCritic, toy(lengths=(2, 7)), num_envs=3, batch_size=40, unroll_length=5)
    assert module.experience_spec().units_per_batch == 8
    batch: TrajectoryBatch = next(module.train_batch())
    assert batch.observation.shape == (8, 6, 4)
    assert batch.reward.shape == (8, 5)
    assert not batch.valid.all()


# Regressions.


def test_a_batch_without_a_single_step_is_survived() -> None:
    """All lanes of Pendulum are truncated at step 200, and the next row is not a step in any lane."""
    module = AdvantageActorCritic("Pendulum-v1", unroll_length=1, batch_size=4, num_envs=4, hidden_sizes=[4])
    trainer = quiet_trainer(max_steps=203)
    trainer.fit(module)
    assert trainer.global_step == 203
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_lanes_without_a_share_in_the_batch_are_not_made() -> None:
    module = small(AdvantageActorCritic, toy(), num_envs=16, batch_size=32, unroll_length=8)
    quiet_trainer(max_steps=10).fit(module)
    assert module.env_steps <= 10 * 32


def test_returns_that_are_all_alike_scale_nothing() -> None:
    module = small(AdvantageActorCritic, toy(lengths=(1,), pays=0.1), num_envs=3, batch_size=24, normalize_rewards=True)
    quiet_trainer(max_steps=30).fit(module)
    assert float(module.return_std) == 1.0
    assert abs(float(module.latest_metrics["train/loss"])) < 10.0
