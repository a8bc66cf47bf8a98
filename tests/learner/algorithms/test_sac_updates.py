"""Tests of SAC's updates: gradients of each loss, a slow twin, target networks, and the temperature."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from learner import SAC
from learner.batches import TransitionBatch
from tests.learner.toys import Batches, UpdateWatcher, box_batch, clone_parameters, quiet_trainer, same, small_sac, toy

# Which parameters each loss has gradients for.


def test_each_loss_reaches_its_own_parameters_alone() -> None:
    module = small_sac()
    names, parameters = zip(*module.named_parameters(), strict=True)
    learned = [p for p in parameters if p.requires_grad]
    reached = []
    for loss in module.separate_losses(box_batch(16)):
        assert loss.shape == ()
        gradients = torch.autograd.grad(loss, learned, allow_unused=True, retain_graph=True)
        by_name = zip([n for n, p in zip(names, parameters, strict=True) if p.requires_grad], gradients, strict=True)
        reached.append({name for name, gradient in by_name if gradient is not None and gradient.any()})
    actor, critics, temperature = reached
    assert actor == {name for name in names if name.startswith("policy.")}
    assert critics == {name for name in names if name.startswith("critics.")}
    assert temperature == {"log_alpha"}


def test_one_backward_of_the_sum_is_that_of_each_alone() -> None:
    module, batch = small_sac(), box_batch(16)
    torch.manual_seed(0)
    actor, critics, temperature = module.separate_losses(batch)
    expected = [
        *torch.autograd.grad(actor, list(module.policy.parameters())),
        *torch.autograd.grad(critics, list(module.critics.parameters())),
        *torch.autograd.grad(temperature, [module.log_alpha]),
    ]
    torch.manual_seed(0)
    module.loss(batch).backward()
    learned = [*module.policy.parameters(), *module.critics.parameters(), module.log_alpha]
    for parameter, gradient in zip(learned, expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(parameter.requires_grad for parameter in module.critics.parameters())
    assert all(parameter.grad is None for parameter in module.target_critics.parameters())


# One update, against a slow twin written with PyTorch's distributions.


def distribution(module: SAC, observation: Tensor) -> TransformedDistribution:
    mean, raw = module.policy(observation).chunk(2, 1)
    deviation = (-5.0 + 3.5 * (raw.tanh() + 1.0)).exp()
    return TransformedDistribution(Independent(Normal(mean, deviation), 1), [TanhTransform()])


def sample_action(module: SAC, observation: Tensor) -> tuple[Tensor, Tensor]:
    """Return actions and their log-densities, with the random noise that the module would sample next."""
    base = distribution(module, observation).base_dist.base_dist
    raw = base.mean + base.stddev * torch.randn_like(base.mean)
    unit = raw.tanh()
    log_probability = Normal(base.mean, base.stddev).log_prob(raw) - (1 - unit.square()).log()
    return unit, log_probability.sum(1)


def twin_losses(module: SAC, batch: TransitionBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses of equations 5, 7, and 18 of Haarnoja et al. 2018, computed one transition at a time."""
    alpha = module.log_alpha.exp().item()
    with torch.no_grad():
        next_unit, next_log = sample_action(module, batch.next_observation)
        q_t = module.target_critics(batch.next_observation, next_unit)
    unit, log = sample_action(module, batch.observation)
    q_tm1 = module.critics(batch.observation, batch.action / 2.0)
    frozen = copy.deepcopy(module.critics).requires_grad_(False)
    q = frozen(batch.observation, unit)
    of_critics, of_actor, of_temperature = [], [], []
    for i in range(len(batch.reward)):
        soft_value = min(q_t[0, i].item(), q_t[1, i].item()) - alpha * next_log[i].item()
        target = batch.reward[i].item() + batch.discount[i].item() * soft_value
        of_critics.append(0.5 * (q_tm1[0, i] - target) ** 2 + 0.5 * (q_tm1[1, i] - target) ** 2)
        of_actor.append(alpha * log[i] - torch.minimum(q[0, i], q[1, i]))
        of_temperature.append(-module.log_alpha.exp() * (log[i].item() + module.target_entropy))
    return torch.stack(of_actor).mean(), torch.stack(of_critics).mean(), torch.stack(of_temperature).mean()


def test_an_update_is_theta_minus_lr_times_grad() -> None:
    """The twin would reveal a density of the wrong sign, a mean of the critics, or one shared target network."""
    rates = {"policy_learning_rate": 0.1, "q_learning_rate": 0.05}
    module = small_sac(optimizer="sgd", init_alpha=0.7, target_alpha=0.25, **rates)
    with torch.no_grad():
        for parameter in module.target_critics.parameters():
            parameter.mul_(-1.5)
    twin = copy.deepcopy(module)
    old_target = clone_parameters(module.target_critics)
    batch = box_batch(32)
    torch.manual_seed(7)
    actor, critics, temperature = twin_losses(twin, batch)
    torch.manual_seed(7)
    for loss, expected in zip(module.separate_losses(batch), (actor, critics, temperature), strict=True):
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)

    class Seeded(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            torch.manual_seed(7)

    quiet_trainer(Seeded(), max_steps=1).fit(module, Batches([batch]))
    for loss, learned, moved, rate in (
        (actor, list(twin.policy.parameters()), module.policy.parameters(), 0.1),
        (critics, list(twin.critics.parameters()), module.critics.parameters(), 0.05),
        (temperature, [twin.log_alpha], [module.log_alpha], 0.1),
    ):
        gradients = torch.autograd.grad(loss, learned)
        for theta, gradient, after in zip(learned, gradients, moved, strict=True):
            torch.testing.assert_close(after, theta - rate * gradient, rtol=1e-4, atol=1e-5)
    for old, online, new in zip(
        old_target, clone_parameters(module.critics), clone_parameters(module.target_critics), strict=True
    ):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * online)


def critic_loss_of(module: SAC, batch: TransitionBatch) -> Tensor:
    torch.manual_seed(0)
    return module.separate_losses(batch)[1]


def test_the_next_states_density_lowers_the_target() -> None:
    """A lower density of the next action raises the target: with Q = 0 the target is -discount * alpha * log pi."""
    module = small_sac(init_alpha=2.0)
    with torch.no_grad():
        for critics in (module.critics, module.target_critics):
            for parameter in critics.parameters():
                parameter.zero_()
    batch = box_batch(1)._replace(reward=torch.zeros(1), discount=torch.tensor([0.5]))
    for density in (-3.0, 3.0):
        module._sample_action = lambda o, d=density: (torch.zeros(1, 1), torch.full((1,), d))  # type: ignore[method-assign, misc]
        torch.testing.assert_close(module.separate_losses(batch)[1], torch.tensor(2 * 0.5 * (0.5 * 2.0 * density) ** 2))
    # The sign: a critic with the value 3 is right if the log-density is -3, and wrong by 6 if it is 3.
    with torch.no_grad():
        module.critics.layers[-1].bias.fill_(3.0)  # type: ignore[operator, union-attr]
    for density, expected in ((-3.0, 0.0), (3.0, 36.0)):
        module._sample_action = lambda o, d=density: (torch.zeros(1, 1), torch.full((1,), d))  # type: ignore[method-assign, misc]
        torch.testing.assert_close(module.separate_losses(batch)[1], torch.tensor(expected))


def test_a_discount_of_0_drops_everything_of_the_next_state() -> None:
    module, batch = small_sac(), box_batch(16)
    over = batch._replace(discount=torch.zeros(16))
    elsewhere = {"next_observation": torch.full((16, 3), 50.0)}
    loss = critic_loss_of(module, over)
    assert torch.equal(loss, critic_loss_of(module, over._replace(**elsewhere)))
    q = module.critics(batch.observation, module.policy.to_unit(batch.action))
    torch.testing.assert_close(loss, 0.5 * (q - batch.reward).square().mean(1).sum())
    assert not torch.equal(critic_loss_of(module, batch), critic_loss_of(module, batch._replace(**elsewhere)))


# The critics and their target networks.


def test_soft_update_target_is_the_pages_weighted_sum() -> None:
    module = small_sac(target_alpha=0.25)
    online, target = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before, w_q = clone_parameters(target), clone_parameters(online)
    module.soft_update_target(online, target)
    for old, q, new in zip(before, w_q, clone_parameters(target), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * q)
    assert same(w_q, clone_parameters(online))


@pytest.mark.parametrize(("k", "sync_rate"), [(1, 1), (1, 7), (32, 7)])
def test_the_targets_move_by_target_alpha_every_sync_rate_updates(k: int, sync_rate: int) -> None:
    module = small_sac(updates_per_training_step=k, sync_rate=sync_rate, target_alpha=0.3, q_learning_rate=0.01)
    before = [clone_parameters(module.target_critics)]

    def look(trainer: pl.Trainer, module: SAC) -> None:
        after = clone_parameters(module.target_critics)
        if trainer.global_step % sync_rate:
            assert same(after, before[-1])
        else:
            for old, online, new in zip(before[-1], clone_parameters(module.critics), after, strict=True):
                torch.testing.assert_close(new, 0.7 * old + 0.3 * online)
            assert not same(after, before[-1])
        before.append(after)

    quiet_trainer(UpdateWatcher(look), max_steps=40).fit(module)
    assert len(before) == 41


def test_the_targets_begin_as_copies_that_nobody_optimizes() -> None:
    module = small_sac()
    assert same(clone_parameters(module.critics), clone_parameters(module.target_critics))
    groups = module.configure_optimizers().param_groups
    assert [group["lr"] for group in groups] == [3e-4, 3e-4, 3e-4]
    optimized = {id(p) for group in groups for p in group["params"]}
    assert optimized == {id(p) for p in (*module.policy.parameters(), *module.critics.parameters(), module.log_alpha)}
    groups = small_sac(policy_learning_rate=0.1, q_learning_rate=0.2).configure_optimizers().param_groups
    assert [group["lr"] for group in groups] == [0.1, 0.2, 0.1]


def test_the_critics_differ_and_count_by_the_smaller() -> None:
    module = small_sac()
    values = module.critics(torch.randn(8, 3), torch.randn(8, 1))
    assert values.shape == (2, 8)
    assert not torch.allclose(values[0], values[1])


# The temperature.


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_fixed_temperature_never_moves(max_grad_norm: float | None) -> None:
    module = small_sac(learn_alpha=False, init_alpha=0.2, policy_learning_rate=0.1, max_grad_norm=max_grad_norm)
    quiet_trainer(max_steps=20).fit(module)
    assert module.log_alpha.exp().item() == pytest.approx(0.2)
    assert module.latest_metrics["train/alpha"].item() == pytest.approx(0.2)


@pytest.mark.parametrize(("target", "rises"), [(50.0, True), (-50.0, False)])
def test_the_temperature_rises_while_the_entropy_is_below_its_target(target: float, rises: bool) -> None:
    module = small_sac(target_entropy=target, policy_learning_rate=0.01)
    alphas = [1.0]
    watcher = UpdateWatcher(lambda trainer, module: alphas.append(module.log_alpha.exp().item()))
    quiet_trainer(watcher, max_steps=10).fit(module, Batches([box_batch(16, seed=n) for n in range(10)]))
    assert alphas == sorted(alphas, reverse=not rises)
    assert len(set(alphas)) == 11


@pytest.mark.parametrize(("box", "given", "target"), [(1, None, -1.0), (6, None, -6.0), (6, 0.5, 0.5)])
def test_the_target_is_minus_one_nat_a_dimension(box: int, given: float | None, target: float) -> None:
    assert small_sac(toy(box=box), target_entropy=given).target_entropy == target


def test_the_entropy_comes_to_its_target() -> None:
    """In a bandit that pays -10 a^2, a policy without the entropy bonus would fall far below -1 nat."""
    rng = torch.Generator().manual_seed(0)
    action = torch.rand(400, 64, 1, generator=rng) * 4 - 2
    bandit = box_batch(400, 64)._replace(
        observation=torch.zeros(400, 64, 3),
        action=action,
        reward=-10 * (action[..., 0] / 2).square(),
        discount=torch.zeros(400, 64),
    )
    rates = {"policy_learning_rate": 0.02, "q_learning_rate": 0.02}
    module = small_sac(seed=0, init_alpha=0.5, target_entropy=-1.0, hidden_sizes=[32], **rates)
    quiet_trainer(max_steps=400).fit(module, Batches(bandit.split()))
    with torch.no_grad():
        _, density = sample_action(module, torch.zeros(2_000, 3))
    assert -density.mean().item() == pytest.approx(-1.0, abs=0.3)
    assert module.policy.act(np.zeros((1, 3), np.float32), step=0, greedy=True).action[0, 0] == pytest.approx(
        0.0, abs=0.3
    )
