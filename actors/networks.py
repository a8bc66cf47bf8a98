"""Neural networks: torsos that match the observation space, and heads for values and distributions.

Rollout workers and the learner use the same modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from actors.environments import EnvironmentSpec
from replay.errors import ConfigurationError

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
NOISES = ("factorised", "independent")


class NatureCNN(nn.Module):
    """The convolutional torso of Mnih et al. 2015: 32 8x8/4, 64 4x4/2, 64 3x3/1, then a dense layer.

    Maps uint8 images `[B, C, H, W]`, or `[B, H, W, C]` with the channels last, to features `[B, features]`.
    """

    def __init__(self, shape: tuple[int, ...], features: int = 512) -> None:
        """Make the torso for images of `shape`, `(C, H, W)` or `(H, W, C)`.

        The channels are last if the last axis has 1, 3, or 4 entries and the first axis more than 4.

        Raises:
            ConfigurationError: the image is too small for the three convolutions.
        """
        super().__init__()
        self.channels_last = shape[-1] in (1, 3, 4) and shape[0] > 4
        channels, *size = (shape[2], *shape[:2]) if self.channels_last else shape
        if min(size) < 36:
            raise ConfigurationError(f"the Nature CNN needs images of at least 36x36 pixels, got {tuple(size)}")
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 32, 8, 4), nn.ReLU(inplace=True),
            nn.Conv2d(32, 64, 4, 2), nn.ReLU(inplace=True),
            nn.Conv2d(64, 64, 3, 1), nn.ReLU(inplace=True),
            nn.Flatten(),
        )  # fmt: skip
        with torch.no_grad():
            flat = self.convolutions(torch.zeros(1, channels, *size)).shape[1]
        self.dense = nn.Sequential(nn.Linear(flat, features), nn.ReLU(inplace=True))
        self.features = features

    def forward(self, observation: Tensor) -> Tensor:
        """Map images `[B, ...]` to features `[B, features]`."""
        if self.channels_last:
            observation = observation.movedim(-1, 1)
        features: Tensor = self.dense(self.convolutions(_scale_pixels(observation)))
        return features


def _scale_pixels(image: Tensor) -> Tensor:
    """Scale uint8 to [0, 1].

    Inside autocast, the conversion goes directly to autocast's dtype, which represents 0 .. 255 exactly.
    """
    device = image.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    return image.to(dtype).div_(255.0)


class RunningNorm(nn.Module):
    """Normalization of vectors by the mean and standard deviation of all observed vectors, clipped to [-10, 10].

    The statistics are persistent buffers, so they are published with the weights. `forward` does not change them. The
    learner calls `observe` after an update, so that an action has the same probability in worker and learner.
    """

    limit = 10.0

    def __init__(self, features: int) -> None:
        """Start with mean 0 and variance 1: the identity, apart from the clipping."""
        super().__init__()
        self.mean: Tensor
        self.variance: Tensor
        self.count: Tensor
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("variance", torch.ones(features))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, vector: Tensor) -> Tensor:
        """Normalize vectors `[B, features]`."""
        scaled = (vector - self.mean) / (self.variance + 1e-8).sqrt()
        return scaled.clamp(-self.limit, self.limit)

    def observe(self, vector: Tensor) -> None:
        """Update the statistics with vectors `[B, features]` (Chan et al. 1979, parallel variance)."""
        old, new = self.count, len(vector)
        if not new:
            return
        total = old + new
        delta = vector.mean(0) - self.mean
        squares = self.variance * old + vector.var(0, correction=0) * new + delta.square() * old * new / total
        self.mean += delta * (new / total)
        self.variance.copy_(squares / total)
        self.count.copy_(total)


class VectorTorso(nn.Module):
    """Dense layers over a flattened observation, or over the one-hot encoding of a discrete observation."""

    def __init__(
        self,
        inputs: int,
        hidden_sizes: Sequence[int],
        *,
        one_hot: bool = False,
        normalize: bool = False,
        activation: str = "relu",
    ) -> None:
        """Make the layers.

        Args:
            inputs: size of the flattened observation, or number of discrete observations.
            hidden_sizes: width of each layer.
            one_hot: whether observations are discrete.
            normalize: whether a `RunningNorm` precedes the layers; ignored for discrete observations.
            activation: activation after each layer, one of `ACTIVATIONS`.
        """
        super().__init__()
        self.one_hot = inputs if one_hot else None
        self.norm = RunningNorm(inputs) if normalize and not one_hot else None
        self.layers = nn.Sequential()
        for width in hidden_sizes:
            self.layers.extend([nn.Linear(inputs, width), ACTIVATIONS[activation]()])
            inputs = width
        self.features = inputs

    def flatten(self, observation: Tensor) -> Tensor:
        """Return observations `[B, ...]` as float vectors `[B, inputs]`."""
        if self.one_hot is not None:
            observation = nn.functional.one_hot(observation, self.one_hot)
        if observation.ndim != 2:
            observation = observation.reshape(len(observation), -1)
        return observation.float()

    def forward(self, observation: Tensor) -> Tensor:
        """Map observations `[B, ...]` to features `[B, features]`."""
        vector = self.flatten(observation)
        if self.norm is not None:
            vector = self.norm(vector)
        for layer in self.layers:
            vector = layer(vector)
        return vector

    def observe(self, observation: Tensor) -> None:
        """Update the running statistics, if there are any, with observations `[B, ...]`."""
        if self.norm is not None:
            self.norm.observe(self.flatten(observation))


def make_torso(
    environment: EnvironmentSpec, hidden_sizes: Sequence[int], *, normalize: bool = False, activation: str = "relu"
) -> NatureCNN | VectorTorso:
    """Return a Nature CNN for image observations, and dense layers for all other observations.

    Args:
        environment: environment whose observations are the torso's input.
        hidden_sizes: widths of the dense layers; for images only the last width is used, after the convolutions.
        normalize: whether vectors are normalized by running statistics; images are always divided by 255.
        activation: activation of the dense layers for vectors, one of `ACTIVATIONS`.

    Raises:
        ConfigurationError: hidden_sizes is empty or has a width that is not positive, or the activation is unknown.
    """
    if not hidden_sizes or min(hidden_sizes) < 1:
        raise ConfigurationError(f"hidden_sizes must be one or more positive widths, got {list(hidden_sizes)}")
    if activation not in ACTIVATIONS:
        raise ConfigurationError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if environment.is_image:
        return NatureCNN(environment.observation_shape, hidden_sizes[-1])
    return _vector_torso(environment, hidden_sizes, normalize=normalize, activation=activation)


def _vector_torso(environment: EnvironmentSpec, hidden_sizes: Sequence[int], **options: Any) -> VectorTorso:
    if environment.observation_count is not None:
        return VectorTorso(environment.observation_count, hidden_sizes, one_hot=True, **options)
    return VectorTorso(int(torch.Size(environment.observation_shape).numel()), hidden_sizes, **options)


def in_full_precision(head: nn.Module, features: Tensor) -> Tensor:
    """Return `head(features)`, computed in float32 even inside autocast.

    Small differences between values matter, and bfloat16 resolves only about 0.01 near 1.0. A head in float32 is cheap.
    """
    output: Tensor
    if torch.is_autocast_enabled(features.device.type):
        with torch.autocast(features.device.type, enabled=False):
            output = head(features.float())
    else:
        output = head(features)
    return output


class Critics(nn.Module):
    """C independent critics `(observation, action) -> [C, B]`, computed in parallel.

    Each critic is a stack of dense layers over the observation and the action. For images, the critics share a Nature
    CNN.
    """

    def __init__(
        self,
        environment: EnvironmentSpec,
        actions: int,
        hidden_sizes: Sequence[int],
        *,
        count: int = 2,
        normalize: bool = False,
        activation: str = "relu",
    ) -> None:
        """Make the critics.

        Args:
            environment: environment whose observations are the input.
            actions: size of the flattened action.
            hidden_sizes: widths of the dense layers.
            count: number of critics.
            normalize: see `make_torso`.
            activation: see `make_torso`.
        """
        super().__init__()
        self.torso: NatureCNN | VectorTorso
        if environment.is_image:
            self.torso = NatureCNN(environment.observation_shape, hidden_sizes[-1])
        else:
            self.torso = _vector_torso(environment, (), normalize=normalize)
        inputs = self.torso.features + actions
        self.count = count
        self.layers = nn.Sequential()
        for width in hidden_sizes:
            self.layers.extend([ParallelLinear(count, inputs, width), ACTIVATIONS[activation]()])
            inputs = width
        self.layers.append(ParallelLinear(count, inputs, 1))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """Return the values `[C, B]` of observations `[B, ...]` and flattened actions `[B, actions]`."""
        features = self.torso(observation)
        inputs = torch.cat([features, action], 1)
        return in_full_precision(self.layers, inputs.expand(self.count, -1, -1))[..., 0]


class ParallelLinear(nn.Module):
    """`count` linear layers, computed as one batched product.

    Each layer is initialized like `nn.Linear`.
    """

    def __init__(self, count: int, inputs: int, outputs: int) -> None:
        """Make the layers, each from `inputs` to `outputs` features."""
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(count, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, 1, outputs).uniform_(-bound, bound))

    def forward(self, features: Tensor) -> Tensor:
        """Map `[C, B, inputs]` to `[C, B, outputs]`."""
        return torch.baddbmm(self.bias, features, self.weight)


class NoisyLinear(nn.Module):
    """A linear layer with learned noise on its weights (Fortunato et al. 2017, https://arxiv.org/abs/1706.10295).

    In training mode each forward pass samples new noise, shared by the whole batch. In evaluation mode the layer uses
    the means of its weights. The noise is not part of the state: it is neither saved nor published.

    - "factorised" (section 3b): `eps_ij = f(e_i) f(e_j)` with `f(x) = sign(x) sqrt(|x|)`; mu from
      `U(-1/sqrt(p), 1/sqrt(p))`, sigma `sigma_init / sqrt(p)` for p inputs.
    - "independent" (section 3a): one sample per weight; mu from `U(-sqrt(3/p), sqrt(3/p))`, sigma 0.017.
    """

    def __init__(self, inputs: int, outputs: int, noise: str = "factorised", sigma_init: float = 0.5) -> None:
        """Make the layer.

        Args:
            inputs: number of input features.
            outputs: number of output features.
            noise: "factorised" or "independent".
            sigma_init: initial scale of factorized noise.

        Raises:
            ConfigurationError: the noise is neither "factorised" nor "independent".
        """
        super().__init__()
        if noise not in NOISES:
            raise ConfigurationError(f"noise must be one of {', '.join(NOISES)}, got {noise!r}")
        self.factorized = noise == "factorised"
        bound = inputs**-0.5 if self.factorized else (3.0 / inputs) ** 0.5
        sigma = sigma_init * inputs**-0.5 if self.factorized else 0.017
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))
        self.weight_sigma = nn.Parameter(torch.full((outputs, inputs), sigma))
        self.bias_sigma = nn.Parameter(torch.full((outputs,), sigma))

    def forward(self, features: Tensor) -> Tensor:
        """Map `[B, inputs]` to `[B, outputs]`."""
        if not self.training:
            return nn.functional.linear(features, self.weight, self.bias)
        if self.factorized:
            input_noise, output_noise = _scaled_noise(self.weight[0]), _scaled_noise(self.bias)
            weight_noise, bias_noise = torch.outer(output_noise, input_noise), output_noise
        else:
            weight_noise, bias_noise = torch.randn_like(self.weight), torch.randn_like(self.bias)
        weight = self.weight + self.weight_sigma * weight_noise
        return nn.functional.linear(features, weight, self.bias + self.bias_sigma * bias_noise)


def _scaled_noise(like: Tensor) -> Tensor:
    noise = torch.randn_like(like)
    return noise.sign() * noise.abs().sqrt()


class QNetwork(nn.Module):
    """Action values of discrete actions, `[B, ...]` -> `[B, actions]`: a torso and a head.

    The dueling head (Wang et al. 2015, https://arxiv.org/abs/1511.06581, equation 9) returns
    `V(s) + A(s, a) - mean_a A(s, a)`.
    """

    def __init__(
        self,
        environment: EnvironmentSpec,
        actions: int,
        hidden_sizes: Sequence[int],
        *,
        dueling: bool = False,
        noise: str | None = None,
        normalize: bool = False,
        activation: str = "relu",
    ) -> None:
        """Make the network.

        Args:
            environment: environment whose observations are the input.
            actions: number of discrete actions.
            hidden_sizes: widths of the torso's dense layers, see `make_torso`.
            dueling: whether the head is dueling.
            noise: noise of the head's layers, see `NoisyLinear`; None for no noise.
            normalize: see `make_torso`.
            activation: see `make_torso`.
        """
        super().__init__()
        self.torso = make_torso(environment, hidden_sizes, normalize=normalize, activation=activation)
        self.head = _linear(self.torso.features, actions, noise)
        self.state_value = _linear(self.torso.features, 1, noise) if dueling else None

    def forward(self, observation: Tensor) -> Tensor:
        """Return the value of every action, `[B, actions]` float32."""
        features = self.torso(observation)
        values = in_full_precision(self.head, features)
        if self.state_value is not None:
            values = in_full_precision(self.state_value, features) + values - values.mean(1, keepdim=True)
        return values


def _linear(inputs: int, outputs: int, noise: str | None) -> nn.Module:
    return nn.Linear(inputs, outputs) if noise is None else NoisyLinear(inputs, outputs, noise)
