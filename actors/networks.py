"""Torsos and heads, chosen by the observation space. The same modules act in workers and learn in the learner."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from actors.environments import EnvironmentSpec
from replay.types import ConfigurationError


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
            nn.Conv2d(channels, 32, 8, 4), nn.ReLU(),
            nn.Conv2d(32, 64, 4, 2), nn.ReLU(),
            nn.Conv2d(64, 64, 3, 1), nn.ReLU(),
            nn.Flatten(),
        )  # fmt: skip
        with torch.no_grad():
            flat = self.convolutions(torch.zeros(1, channels, *size)).shape[1]
        self.dense = nn.Sequential(nn.Linear(flat, features), nn.ReLU())
        self.features = features

    def forward(self, observation: Tensor) -> Tensor:
        """Map images `[B, ...]` to features `[B, features]`."""
        if self.channels_last:
            observation = observation.movedim(-1, 1)
        features: Tensor = self.dense(self.convolutions(observation.float() / 255.0))
        return features


class VectorTorso(nn.Module):
    """Dense layers with ReLU over a flat observation, or over the one-hot code of a discrete one."""

    def __init__(self, inputs: int, hidden_sizes: Sequence[int], one_hot: bool = False) -> None:
        """Make a torso of one layer for each of `hidden_sizes`."""
        super().__init__()
        self.one_hot = inputs if one_hot else None
        layers: list[nn.Module] = []
        for width in hidden_sizes:
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        self.layers = nn.Sequential(*layers)
        self.features = inputs

    def forward(self, observation: Tensor) -> Tensor:
        """Map observations `[B, ...]` to features `[B, features]`."""
        if self.one_hot is not None:
            observation = nn.functional.one_hot(observation, self.one_hot)
        features: Tensor = self.layers(observation.reshape(len(observation), -1).float())
        return features


def make_torso(environment: EnvironmentSpec, hidden_sizes: Sequence[int]) -> NatureCNN | VectorTorso:
    """Return the Nature CNN for images and dense layers for everything else.

    Args:
        environment: whose observations the torso takes.
        hidden_sizes: widths of the dense layers; for images the last one is the width after the convolutions.

    Raises:
        ConfigurationError: no sizes, or one that is not positive.
    """
    if not hidden_sizes or min(hidden_sizes) < 1:
        raise ConfigurationError(f"hidden_sizes must name at least one positive width, got {list(hidden_sizes)}")
    if environment.is_image:
        return NatureCNN(environment.observation_shape, hidden_sizes[-1])
    if environment.observation_count is not None:
        return VectorTorso(environment.observation_count, hidden_sizes, one_hot=True)
    return VectorTorso(int(torch.Size(environment.observation_shape).numel()), hidden_sizes)


class QNetwork(nn.Module):
    """Action values: a torso and a linear head, `[B, ...]` -> `[B, actions]`."""

    def __init__(self, environment: EnvironmentSpec, actions: int, hidden_sizes: Sequence[int]) -> None:
        """Make the network for `actions` discrete actions."""
        super().__init__()
        self.torso = make_torso(environment, hidden_sizes)
        self.head = nn.Linear(self.torso.features, actions)

    def forward(self, observation: Tensor) -> Tensor:
        """Return the value of every action, `[B, actions]` float32."""
        values: Tensor = self.head(self.torso(observation))
        return values
