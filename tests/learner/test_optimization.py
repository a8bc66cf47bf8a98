"""Optimizers by name: the right class and learning rate, and what PyTorch's plain implementation would do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from learner.optimization import OPTIMIZERS, make_optimizer
from tests.learner.toys import copies

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
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    for mine, theirs in zip(copies(ours), copies(plain), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_a_name_that_is_none_raises() -> None:
    with pytest.raises(KeyError, match="adagrad"):
        make_optimizer("adagrad", (nn.Linear(2, 2).parameters(), 0.1))
