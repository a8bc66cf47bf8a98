"""Torsos and heads: which one an environment gets, shapes, scaling, and sizes that are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actors.environments import DiscreteActions, EnvironmentSpec
from actors.networks import NatureCNN, QNetwork, VectorTorso, make_torso
from replay.types import ConfigurationError


def spec(shape: tuple[int, ...], dtype: str = "float32", count: int | None = None) -> EnvironmentSpec:
    return EnvironmentSpec(None, shape, dtype, 1, DiscreteActions(3), observation_count=count)


def observations(environment: EnvironmentSpec, batch: int) -> torch.Tensor:
    shape = (batch, *environment.observation_shape)
    if environment.observation_count is not None:
        return torch.arange(batch) % environment.observation_count
    if environment.observation_dtype == "uint8":
        return torch.randint(0, 256, shape, dtype=torch.uint8)
    return torch.randn(shape).to(getattr(torch, environment.observation_dtype))


@pytest.mark.parametrize(
    ("environment", "torso"),
    [
        (spec((4, 84, 84), "uint8"), NatureCNN),
        (spec((1, 84, 84), "uint8"), NatureCNN),
        (spec((96, 96, 3), "uint8"), NatureCNN),
        (spec((4, 84, 84)), VectorTorso),
        (spec((7,)), VectorTorso),
        (spec((128,), "uint8"), VectorTorso),
        (spec((2, 3)), VectorTorso),
        (spec((5,), "int64"), VectorTorso),
        (spec((5,), "bool"), VectorTorso),
        (spec(()), VectorTorso),
        (spec((), "int64", 16), VectorTorso),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_kind_of_observation_has_a_torso(environment: EnvironmentSpec, torso: type, batch: int) -> None:
    network = QNetwork(environment, 3, (8, 16))
    assert isinstance(network.torso, torso)
    values = network(observations(environment, batch))
    assert values.shape == (batch, 3)
    assert values.dtype == torch.float32
    assert values.isfinite().all()


def test_the_nature_network_is_the_published_one() -> None:
    network = QNetwork(spec((4, 84, 84), "uint8"), 6, (512,))
    shapes = {name: tuple(value.shape) for name, value in network.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "torso.convolutions.0.weight": (32, 4, 8, 8),
        "torso.convolutions.2.weight": (64, 32, 4, 4),
        "torso.convolutions.4.weight": (64, 64, 3, 3),
        "torso.dense.0.weight": (512, 3136),
        "head.weight": (6, 512),
    }
    strides = [layer.stride for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    assert strides == [(4, 4), (2, 2), (1, 1)]
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_687_206


def test_pixels_are_scaled_to_one() -> None:
    torso = NatureCNN((4, 84, 84), 16)
    seen: list[torch.Tensor] = []
    torso.convolutions.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torso(torch.full((1, 4, 84, 84), 255, dtype=torch.uint8))
    assert seen[0].dtype == torch.float32
    assert (seen[0] == 1.0).all()


def test_channels_may_come_last() -> None:
    first, last = NatureCNN((3, 60, 80), 16), NatureCNN((60, 80, 3), 16)
    last.load_state_dict(first.state_dict())
    images = torch.randint(0, 256, (2, 3, 60, 80), dtype=torch.uint8)
    assert not first.channels_last
    assert last.channels_last
    torch.testing.assert_close(first(images), last(images.permute(0, 2, 3, 1)))


def test_discrete_observations_are_one_hot() -> None:
    torso = VectorTorso(4, (4,), one_hot=True)
    linear = torso.layers[0]
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.weight.copy_(torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])))
        linear.bias.zero_()
    assert torso(torch.tensor([2, 0])).tolist() == [[0.0, 0.0, 3.0, 0.0], [1.0, 0.0, 0.0, 0.0]]


def test_the_last_layer_is_linear_and_the_others_rectified() -> None:
    network = QNetwork(spec((2,)), 3, (5, 7))
    kinds = [type(layer).__name__ for layer in network.modules() if not list(layer.children())]
    assert kinds == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert (network(torch.randn(200, 2)) < 0).any()


def test_images_use_the_last_size_alone() -> None:
    torso = make_torso(spec((4, 84, 84), "uint8"), (32, 64))
    assert torso.features == 64


@pytest.mark.parametrize("sizes", [(), (0,), (64, -1)])
def test_sizes_are_positive(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match="hidden_sizes must name at least one positive width"):
        make_torso(spec((4,)), sizes)


@pytest.mark.parametrize("shape", [(3, 35, 84), (84, 20, 3)])
def test_images_must_not_be_too_small(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match="at least 36x36 pixels"):
        make_torso(spec(shape, "uint8"), (16,))
    assert make_torso(spec((3, 36, 36), "uint8"), (16,))(torch.zeros(1, 3, 36, 36, dtype=torch.uint8)).shape == (1, 16)
