"""Torsos and heads, chosen by the observation space. The same modules act in workers and learn in the learner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from actors.environments import EnvironmentSpec
from replay.errors import ConfigurationError


class NatureCNN(nn.Module):
    """The convolutional torso of Mnih et al. 2015: 32 8x8/4, 64 4x4/2, 64 3x3/1, then a dense layer.

    Takes uint8 `[B, C, H, W]`, or `[B, H, W, C]` where the last axis is the channels; gives `[B, features]`.
    """

    def __init__(self, shape: tuple[int, ...], features: int = 512) -> None:
        """Make the torso for images of `shape`, `(C, H, W)` or `(H, W, C)`.

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
        features: Tensor = self.dense(self.convolutions(_from_bytes(observation)))
        return features


def _from_bytes(image: Tensor) -> Tensor:
    """Return uint8 as [0, 1], at once in autocast's precision, which holds 0 .. 255 exactly."""
    device = image.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    return image.to(dtype).div_(255.0)


class RunningNorm(nn.Module):
    """Shifts and scales vectors by the mean and deviation of those seen so far, and clips what is left to +-10.

    The statistics are persistent buffers, so they travel with the weights. `forward` never changes them: the learner
    calls `observe`, after an update, so that an action's probability is the same in the worker and in the learner.
    """

    limit = 10.0

    def __init__(self, features: int) -> None:
        """Start as the identity (but for the clipping)."""
        super().__init__()
        self.mean: Tensor
        self.variance: Tensor
        self.count: Tensor
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("variance", torch.ones(features))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, vector: Tensor) -> Tensor:
        """Map `[B, features]` to the same shape."""
        scaled = (vector - self.mean) / (self.variance + 1e-8).sqrt()
        return scaled.clamp(-self.limit, self.limit)

    def observe(self, vector: Tensor) -> None:
        """Take `[B, features]` into the statistics (Chan et al. 1979, parallel variance)."""
        seen, new = self.count, len(vector)
        if not new:
            return
        total = seen + new
        delta = vector.mean(0) - self.mean
        squares = self.variance * seen + vector.var(0, correction=0) * new + delta.square() * seen * new / total
        self.mean += delta * (new / total)
        self.variance.copy_(squares / total)
        self.count.copy_(total)


class VectorTorso(nn.Module):
    """Dense layers over a flat observation, or over the one-hot code of a discrete one."""

    def __init__(
        self,
        inputs: int,
        hidden_sizes: Sequence[int],
        *,
        one_hot: bool = False,
        normalize: bool = False,
        activation: str = "relu",
    ) -> None:
        """Make a torso of one layer for each of `hidden_sizes`; `normalize` puts a `RunningNorm` in front."""
        super().__init__()
        self.one_hot = inputs if one_hot else None
        self.norm = RunningNorm(inputs) if normalize and not one_hot else None
        self.layers = nn.Sequential()
        for width in hidden_sizes:
            self.layers.extend([nn.Linear(inputs, width), ACTIVATIONS[activation]()])
            inputs = width
        self.features = inputs

    def flat(self, observation: Tensor) -> Tensor:
        """Return observations `[B, ...]` as float vectors `[B, inputs]`."""
        if self.one_hot is not None:
            observation = nn.functional.one_hot(observation, self.one_hot)
        if observation.ndim != 2:
            observation = observation.reshape(len(observation), -1)
        return observation.float()

    def forward(self, observation: Tensor) -> Tensor:
        """Map observations `[B, ...]` to features `[B, features]`."""
        vector = self.flat(observation)
        if self.norm is not None:
            vector = self.norm(vector)
        for layer in self.layers:
            vector = layer(vector)
        return vector

    def observe(self, observation: Tensor) -> None:
        """Take observations `[B, ...]` into the running statistics, if there are any."""
        if self.norm is not None:
            self.norm.observe(self.flat(observation))


ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


def make_torso(
    environment: EnvironmentSpec, hidden_sizes: Sequence[int], *, normalize: bool = False, activation: str = "relu"
) -> NatureCNN | VectorTorso:
    """Return the Nature CNN for images and dense layers for everything else.

    Args:
        environment: whose observations the torso takes.
        hidden_sizes: widths of the dense layers; for images the last one is the width after the convolutions.
        normalize: whether vectors are normalised by running statistics; images are divided by 255 in any case.
        activation: of the dense layers, one of `ACTIVATIONS`.

    Raises:
        ConfigurationError: no sizes, one that is not positive, or an unknown activation.
    """
    if not hidden_sizes or min(hidden_sizes) < 1:
        raise ConfigurationError(f"hidden_sizes must name at least one positive width, got {list(hidden_sizes)}")
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
    """Return `head(features)` in float32, also inside autocast.

    A head costs little, and what matters of values is often their difference: bfloat16 tells 1.00 from 1.01, no less.
    """
    output: Tensor
    if torch.is_autocast_enabled(features.device.type):
        with torch.autocast(features.device.type, enabled=False):
            output = head(features.float())
    else:
        output = head(features)
    return output


class Critics(nn.Module):
    """Several action values `(observation, action) -> [C, B]`, independent of each other, computed side by side.

    Each is dense layers over the observation and the action; images go through a Nature CNN that the critics share.
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
        """Make `count` critics of flat actions of `actions` numbers; the other arguments are those of `make_torso`."""
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
        """Return `[C, B]` values of observations `[B, ...]` and flat actions `[B, actions]`."""
        features = self.torso(observation)
        both = torch.cat([features, action], 1)
        return in_full_precision(self.layers, both.expand(self.count, -1, -1))[..., 0]


class ParallelLinear(nn.Module):
    """`count` linear layers in one batched product, each begun as `nn.Linear` would begin it."""

    def __init__(self, count: int, inputs: int, outputs: int) -> None:
        """Make the layers."""
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(count, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, 1, outputs).uniform_(-bound, bound))

    def forward(self, features: Tensor) -> Tensor:
        """Map `[C, B, inputs]` to `[C, B, outputs]`."""
        return torch.baddbmm(self.bias, features, self.weight)


class NoisyLinear(nn.Module):
    """A linear layer with learned noise on its weights (Fortunato et al. 2017, https://arxiv.org/abs/1706.10295).

    In training mode every forward draws noise anew, one draw for the whole batch; in evaluation mode the layer
    acts on its means. The noise is no state: it is neither saved nor sent.

    - "factorised" (section 3b): `eps_ij = f(e_i) f(e_j)` with `f(x) = sign(x) sqrt(|x|)`; mu from
      `U(-1/sqrt(p), 1/sqrt(p))`, sigma `sigma_init / sqrt(p)` for p inputs.
    - "independent" (section 3a): a draw for every weight; mu from `U(-sqrt(3/p), sqrt(3/p))`, sigma 0.017.
    """

    def __init__(self, inputs: int, outputs: int, noise: str = "factorised", sigma_init: float = 0.5) -> None:
        """Make the layer.

        Raises:
            ConfigurationError: a noise that is neither "factorised" nor "independent".
        """
        super().__init__()
        if noise not in NOISES:
            raise ConfigurationError(f"noise must be one of {', '.join(NOISES)}, got {noise!r}")
        self.factorised = noise == "factorised"
        bound = inputs**-0.5 if self.factorised else (3.0 / inputs) ** 0.5
        sigma = sigma_init * inputs**-0.5 if self.factorised else 0.017
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))
        self.weight_sigma = nn.Parameter(torch.full((outputs, inputs), sigma))
        self.bias_sigma = nn.Parameter(torch.full((outputs,), sigma))

    def forward(self, features: Tensor) -> Tensor:
        """Map `[B, inputs]` to `[B, outputs]`."""
        if not self.training:
            return nn.functional.linear(features, self.weight, self.bias)
        if self.factorised:
            into, out = _scaled_noise(self.weight[0]), _scaled_noise(self.bias)
            weight_noise, bias_noise = torch.outer(out, into), out
        else:
            weight_noise, bias_noise = torch.randn_like(self.weight), torch.randn_like(self.bias)
        weight = self.weight + self.weight_sigma * weight_noise
        return nn.functional.linear(features, weight, self.bias + self.bias_sigma * bias_noise)


NOISES = ("factorised", "independent")


def _scaled_noise(like: Tensor) -> Tensor:
    noise = torch.randn_like(like)
    return noise.sign() * noise.abs().sqrt()


class QNetwork(nn.Module):
    """Action values `[B, ...]` -> `[B, actions]`: a torso and a head, plain or dueling, noisy or not.

    The dueling head (Wang et al. 2015, https://arxiv.org/abs/1511.06581, equation 9) gives
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
        """Make the network for `actions` discrete actions; `noise` makes the head's layers noisy.

        `normalize` and `activation` are those of `make_torso`.
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
