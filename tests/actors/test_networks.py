"""Torsos, heads, and critics: selection by observation space, shapes, normalization, and invalid sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from actors.environments import DiscreteActions, EnvironmentSpec
from actors.networks import Critics, NatureCNN, ParallelLinear, QNetwork, RunningNorm, VectorTorso, make_torso
from actors.weights import pack, unpack
from replay.errors import ConfigurationError


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


@pytest.mark.parametrize("enabled", [False, True])
def test_pixels_go_to_the_precision_in_use_in_one_step_and_bit_for_bit(enabled: bool) -> None:
    torso, image = NatureCNN((4, 84, 84), 16), torch.arange(256).repeat(441)[: 4 * 84 * 84].to(torch.uint8)
    image = image.reshape(1, 4, 84, 84)
    before = image.clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        expected = torso.dense(torso.convolutions(before.float() / 255.0))
        actual = torso(image)
    assert actual.dtype == (torch.bfloat16 if enabled else torch.float32)
    assert torch.equal(actual, expected)
    assert torch.equal(image, before), "the batch must not be modified"


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
    with pytest.raises(ConfigurationError, match="hidden_sizes must be one or more positive widths"):
        make_torso(spec((4,)), sizes)


@pytest.mark.parametrize("shape", [(3, 35, 84), (84, 20, 3)])
def test_images_must_not_be_too_small(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match="at least 36x36 pixels"):
        make_torso(spec(shape, "uint8"), (16,))
    assert make_torso(spec((3, 36, 36), "uint8"), (16,))(torch.zeros(1, 3, 36, 36, dtype=torch.uint8)).shape == (1, 16)


def split(rows: list[list[float]], cuts: list[int]) -> list[torch.Tensor]:
    """Split rows at `cuts`; batches may be empty."""
    array = np.array(rows, np.float32).reshape(len(rows), -1)
    return [torch.from_numpy(part) for part in np.split(array, sorted(cut % (len(rows) + 1) for cut in cuts))]


@given(
    rows=st.lists(st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=3), min_size=1, max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=6),
)
@settings(deadline=None)
def test_running_statistics_are_those_of_all_rows_however_they_came(rows: list[list[float]], cuts: list[int]) -> None:
    norm = RunningNorm(3)
    for batch in split(rows, cuts):
        norm.observe(batch)
    everything = np.array(rows, np.float64)
    assert norm.count.item() == len(rows)
    np.testing.assert_allclose(norm.mean.numpy(), everything.mean(0), atol=1e-4)
    np.testing.assert_allclose(norm.variance.numpy(), everything.var(0), rtol=1e-4, atol=1e-3)


def test_running_statistics_do_not_drift_far_from_zero() -> None:
    norm = RunningNorm(2)
    rows = np.random.default_rng(0).normal((1000.0, -3.0), (2.0, 0.01), (4000, 2))
    for batch in np.split(rows.astype(np.float32), 400):
        norm.observe(torch.from_numpy(batch))
    np.testing.assert_allclose(norm.mean.numpy(), rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(norm.variance.numpy(), rows.astype(np.float32).astype(np.float64).var(0), rtol=1e-3)


def test_normalizing_is_the_identity_before_anything_was_observed() -> None:
    vectors = torch.tensor([[-9.5, 0.0, 3.25], [1e-3, 10.0, -10.0]])
    norm = RunningNorm(3)
    assert norm(vectors).equal(vectors)
    norm.observe(torch.empty(0, 3))
    assert norm.count.item() == 0
    assert norm(vectors).equal(vectors)


def test_what_is_normalized_is_shifted_scaled_and_clipped() -> None:
    norm = RunningNorm(2)
    norm.observe(torch.tensor([[1.0, -2.0], [3.0, 6.0]]))  # means 2 and 2, deviations 1 and 4
    torch.testing.assert_close(norm(torch.tensor([[2.0, 6.0], [0.0, -2.0]])), torch.tensor([[0.0, 1.0], [-2.0, -1.0]]))
    assert norm(torch.tensor([[1e6, -1e6], [12.5, -39.0]])).tolist() == [[10.0, -10.0], [10.0, -10.0]]


def test_a_batch_of_one_is_observed_and_leaves_no_nan() -> None:
    norm = RunningNorm(2)
    norm.observe(torch.tensor([[5.0, -5.0]]))
    assert (norm.mean.tolist(), norm.variance.tolist(), norm.count.item()) == ([5.0, -5.0], [0.0, 0.0], 1.0)
    assert norm(torch.tensor([[5.0, -4.0]])).tolist() == [[0.0, 10.0]]


def test_forward_never_changes_the_statistics() -> None:
    torso = VectorTorso(3, (4,), normalize=True)
    torso.observe(torch.randn(5, 3))
    before = {name: value.clone() for name, value in torso.state_dict().items()}
    torso.train()
    torso(torch.randn(7, 3))
    assert all(value.equal(before[name]) for name, value in torso.state_dict().items())


def test_the_statistics_travel_with_the_weights() -> None:
    there, here = VectorTorso(3, (4,), normalize=True), VectorTorso(3, (4,), normalize=True)
    there.observe(torch.randn(5, 3) * 4 + 2)
    assert {"norm.mean", "norm.variance", "norm.count"} <= set(there.state_dict())
    unpack(pack(there, 0), here)
    assert all(value.equal(here.state_dict()[name]) for name, value in there.state_dict().items())
    vectors = torch.randn(6, 3)
    assert here(vectors).equal(there(vectors))
    # Both continue from the same statistics.
    for torso in (there, here):
        torso.observe(vectors)
    assert here(vectors).equal(there(vectors))


@pytest.mark.parametrize(
    ("environment", "normalized"),
    [
        (spec((2, 3)), True),
        (spec((5,), "int64"), True),
        (spec((), "int64", 4), False),
        (spec((4, 84, 84), "uint8"), False),
    ],
)
def test_vectors_alone_are_normalized(environment: EnvironmentSpec, normalized: bool) -> None:
    torso = make_torso(environment, (8,), normalize=True)
    assert any(isinstance(module, RunningNorm) for module in torso.modules()) == normalized
    assert not any(isinstance(module, RunningNorm) for module in make_torso(environment, (8,)).modules())
    if isinstance(torso, VectorTorso):
        torso.observe(observations(environment, 3))
        assert torso(observations(environment, 3)).isfinite().all()
    if normalized:
        assert isinstance(torso, VectorTorso)
        assert torso.norm is not None
        assert torso.norm.count.item() == 3


def test_the_activation_is_chosen() -> None:
    torso = make_torso(spec((2,)), (5, 7), activation="tanh")
    assert isinstance(torso, VectorTorso)
    assert [type(layer) for layer in torso.layers] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh]
    with pytest.raises(ConfigurationError, match="activation must be one of relu, tanh, got 'swish'"):
        make_torso(spec((2,)), (5,), activation="swish")


def plain_critic(critics: Critics, index: int) -> nn.Sequential:
    """Return critic `index` as `nn.Linear` layers with the same weights."""
    plain = nn.Sequential()
    for layer in critics.layers:
        if isinstance(layer, ParallelLinear):
            linear = nn.Linear(*layer.weight.shape[1:])
            with torch.no_grad():
                linear.weight.copy_(layer.weight[index].T)
                linear.bias.copy_(layer.bias[index, 0])
            plain.append(linear)
        else:
            plain.append(layer)
    return plain


@pytest.mark.parametrize("actions", [1, 6])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(
    "environment",
    [spec((7,)), spec((2, 3)), spec((), "int64", 4), spec((3, 36, 36), "uint8")],
    ids=lambda e: str(e)[20:50],
)
def test_each_critic_is_a_network_of_its_own(environment: EnvironmentSpec, count: int, actions: int) -> None:
    critics = Critics(environment, actions, (16, 8), count=count, activation="tanh")
    observation, action = observations(environment, 5), torch.randn(5, actions)
    values = critics(observation, action)
    assert values.shape == (count, 5)
    inputs = torch.cat([critics.torso(observation), action], 1)
    for index in range(count):
        torch.testing.assert_close(values[index], plain_critic(critics, index)(inputs)[:, 0], rtol=1e-4, atol=1e-5)
    assert len({tuple(row.tolist()) for row in values}) == count
    assert critics(observation[:1], action[:1]).shape == (count, 1)


def test_critics_of_vectors_see_the_observation_itself() -> None:
    critics = Critics(spec((2, 3)), 2, (4,), normalize=True)
    observation = torch.randn(4, 2, 3)
    assert critics.torso(observation).equal(observation.reshape(4, 6))
    critics.torso.observe(observation)  # type: ignore[operator]
    torch.testing.assert_close(critics.torso(observation).mean(0), torch.zeros(6), atol=1e-5, rtol=0)


def test_a_critic_s_gradient_is_its_own() -> None:
    critics = Critics(spec((3,)), 2, (8, 8), count=3)
    critics(torch.randn(6, 3), torch.randn(6, 2))[0].sum().backward()
    for parameter in critics.parameters():
        assert parameter.grad is not None
        assert parameter.grad[0].any()
        assert not parameter.grad[1:].any()


def test_the_action_has_a_gradient_through_every_critic() -> None:
    critics = Critics(spec((3,)), 2, (8,), count=2, activation="tanh")
    action = torch.randn(4, 2, requires_grad=True)
    for values in critics(torch.randn(4, 3), action):
        (gradient,) = torch.autograd.grad(values.sum(), action, retain_graph=True)
        assert (gradient != 0).all()


@pytest.mark.parametrize("inputs", [1, 9, 400])
def test_parallel_layers_begin_as_linear_ones(inputs: int) -> None:
    torch.manual_seed(0)
    layer, bound = ParallelLinear(50, inputs, 40), inputs**-0.5
    for parameter in layer.parameters():
        assert parameter.abs().max() <= bound
        # Uniform: the sample deviation of 2,000 or more numbers is within 5 % of the true deviation.
        assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert abs(parameter.mean().item()) < 0.1 * bound
        assert not parameter[0].equal(parameter[1])


@pytest.mark.parametrize("dueling", [False, True])
def test_a_head_keeps_full_precision_inside_autocast(dueling: bool) -> None:
    """bfloat16 has 8 bits of precision: around 100, its numbers are 0.5 apart."""
    torch.manual_seed(0)
    network = QNetwork(spec((4, 84, 84), "uint8"), 6, (64,), dueling=dueling)
    with torch.no_grad():
        (network.state_value if dueling else network.head).bias += 100.0  # type: ignore[union-attr, operator]
    images = torch.randint(0, 255, (8, 4, 84, 84), dtype=torch.uint8)
    exact = network(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert network.torso(images).dtype == torch.bfloat16
        rounded = network(images)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.01


def test_critics_keep_full_precision_inside_autocast() -> None:
    torch.manual_seed(0)
    critics = Critics(spec((4, 84, 84), "uint8"), 2, (64,))
    with torch.no_grad():
        critics.layers[-1].bias -= 100.0
    images, actions = torch.randint(0, 255, (8, 4, 84, 84), dtype=torch.uint8), torch.rand(8, 2)
    exact = critics(images, actions)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = critics(images, actions)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.01
