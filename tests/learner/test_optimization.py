"""Tests of optimizers by name, gradient clipping, and schedules, against PyTorch's own implementations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from learner.optimization import (
    OPTIMIZERS,
    SCHEDULES,
    clip_gradient,
    make_optimizer,
    set_learning_rate,
    zero_grad,
)
from tests.learner.toys import clone_parameters

PLAIN: dict[str, Any] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}


def test_every_name_is_tested() -> None:
    assert set(OPTIMIZERS) == set(PLAIN)


@pytest.mark.parametrize("name", PLAIN)
def test_it_is_the_class_of_that_name_with_that_learning_rate(name: str) -> None:
    optimizer = make_optimizer(name, (nn.Linear(2, 2).parameters(), 0.125))
    assert type(optimizer) is PLAIN[name]
    assert [group["lr"] for group in optimizer.param_groups] == [0.125]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


@pytest.mark.parametrize("name", PLAIN)
def test_it_steps_as_the_plain_one_does(name: str) -> None:
    ours, plain = nn.Linear(3, 2), nn.Linear(3, 2)
    plain.load_state_dict(ours.state_dict())
    optimizers = [make_optimizer(name, (ours.parameters(), 0.01)), PLAIN[name](plain.parameters(), lr=0.01)]
    for seed in range(5):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        for module, optimizer in zip((ours, plain), optimizers, strict=True):
            zero_grad(optimizer) if module is ours else optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    for mine, theirs in zip(clone_parameters(ours), clone_parameters(plain), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("longest", [1e-3, 0.5, 1.0, 1e3])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e6, float("inf"), float("nan")])
def test_a_gradient_is_clipped_bit_for_bit_as_pytorch_clips_it(longest: float, scale: float) -> None:
    ours, plain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    plain.load_state_dict(ours.state_dict())
    for module in (ours, plain):
        module(torch.arange(6.0).view(2, 3)).square().mean().backward()
        for parameter in module.parameters():
            parameter.grad.mul_(scale)  # type: ignore[union-attr]
        module[1].bias.grad = None
    clip_gradient(ours.parameters(), longest)
    nn.utils.clip_grad_norm_(plain.parameters(), longest)
    assert ours[1].bias.grad is None
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        if mine is not ours[1].bias:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0.0, atol=0.0, equal_nan=True)


def test_there_may_be_no_gradient_to_clip() -> None:
    clip_gradient(nn.Linear(2, 2).parameters(), 1.0)


def test_a_name_that_is_none_raises() -> None:
    with pytest.raises(KeyError, match="adagrad"):
        make_optimizer("adagrad", (nn.Linear(2, 2).parameters(), 0.1))


@pytest.mark.parametrize("name", PLAIN)
def test_each_group_has_its_own_rate_and_steps_with_it(name: str) -> None:
    slow, fast = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = make_optimizer(name, (slow.parameters(), 0.0), (fast.parameters(), 0.5))
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.5]
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.0, 0.5]
    before = [clone_parameters(slow), clone_parameters(fast)]
    (slow(torch.ones(1, 2)) + fast(torch.ones(1, 2))).sum().backward()
    optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(before[0], clone_parameters(slow), strict=True))
    assert not any(torch.equal(*pair) for pair in zip(before[1], clone_parameters(fast), strict=True))


@pytest.mark.parametrize(("name", "option", "value"), [
    ("adam", "eps", 1e-3), ("adamw", "weight_decay", 0.5), ("rmsprop", "alpha", 0.5), ("sgd", "momentum", 0.5),
])  # fmt: skip
def test_options_reach_every_group(name: str, option: str, value: float) -> None:
    groups = [(nn.Linear(2, 2).parameters(), rate) for rate in (0.1, 0.2)]
    optimizer = make_optimizer(name, *groups, options={option: value})
    assert [group[option] for group in optimizer.param_groups] == [value, value]


def test_an_option_that_is_none_raises() -> None:
    with pytest.raises(TypeError, match="epsilon"):
        make_optimizer("adam", (nn.Linear(2, 2).parameters(), 0.1), options={"epsilon": 1e-3})


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.0, 0.0]),
        # (1 + cos(pi / 4)) / 2 = 0.853553...
        ("cosine", [1.0, 0.8535533905932737, 0.5, 0.0, 0.0]),
    ],
)
def test_schedules_by_hand(schedule: str, factors: list[float]) -> None:
    """At 0, a quarter, half, and all of the steps, and beyond; always relative to the initial rate."""
    optimizer = make_optimizer("sgd", (nn.Linear(2, 2).parameters(), 0.4), (nn.Linear(2, 2).parameters(), 8.0))
    for step, factor in zip((0, 25, 50, 100, 1_000), factors, strict=True):
        set_learning_rate(optimizer, schedule, step, 100)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.4 * factor, 8.0 * factor], abs=1e-12)
    set_learning_rate(optimizer, schedule, 0, 100)
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 8.0]


def test_every_schedule_is_tested() -> None:
    assert set(SCHEDULES) == {"constant", "linear", "cosine"}
