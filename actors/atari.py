"""Atari."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ale_py
import numpy as np
from ale_py.vector_env import AtariVectorEnv

from replay.errors import ConfigurationError, EnvironmentFailed
from replay.types import Array

ATARI_FRAME_SKIP = 4


ATARI_STACK = 4


_ATARI_FRAMES_PER_SECOND = 60


RENDER_MODE = "rgb_array"


def make_atari(kind: type[AtariVectorEnv], name: str, num_envs: int, arguments: Mapping[str, Any]) -> AtariVectorEnv:
    """Make a native Atari vector: 84x84 grey, max-pool, skip 4, stack 4, no-op starts, fire reset, raw rewards."""
    arguments = dict(arguments)
    skip = arguments.pop("frameskip", 1)
    if not isinstance(skip, int):
        game = name.rpartition(":")[2].rpartition("-")[0]
        raise ConfigurationError(
            f"{name} draws its frame skip at random from {skip}; use {game}NoFrameskip-v4 or ALE/{game}-v5"
        )
    if not arguments.get("grayscale", True):
        raise ConfigurationError(f"{name} is stacked in grey only: grayscale=False is not supported")
    arguments = {"reward_clipping": False, "stack_num": ATARI_STACK, "num_threads": 1, **arguments}
    return kind(num_envs=num_envs, frameskip=ATARI_FRAME_SKIP if skip == 1 else skip, **arguments)


class RenderedAtari(AtariVectorEnv):
    """A native Atari vector that renders, with the help of a twin whose observations are the screen itself.

    The native vector keeps small grey frames only. The twin has the same seeds and gets the same actions; size,
    colour and stack of an observation never reach the emulator, so both play the same game. Each row checks it.
    """

    def __init__(self, game: str, num_envs: int, *, frameskip: int, **arguments: Any) -> None:
        """Make both."""
        super().__init__(game=game, num_envs=num_envs, frameskip=frameskip, **arguments)
        emulator, rom = ale_py.ALEInterface(), ale_py.roms.get_rom_path(game)
        assert rom is not None
        emulator.loadROM(rom)
        height, width = emulator.getScreenDims()
        screen = {"img_height": height, "img_width": width, "grayscale": False, "stack_num": 1}
        self._twin = AtariVectorEnv(game=game, num_envs=num_envs, frameskip=frameskip, **{**arguments, **screen})
        self._screens: Array = np.empty(0)
        self.metadata = {
            **self.metadata, "render_modes": [RENDER_MODE], "render_fps": _ATARI_FRAMES_PER_SECOND / frameskip,
        }  # fmt: skip

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset both; the first reset needs a seed."""
        observation, info = super().reset(seed=seed, options=options)
        screens, twins = self._twin.reset(seed=seed, options=options)
        self._compare(screens, [*info.values()], [*twins.values()])
        return observation, info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step both."""
        observation, reward, terminated, truncated, info = super().step(actions)
        screens, *outcome, twins = self._twin.step(actions)
        self._compare(screens, [reward, terminated, truncated, *info.values()], [*outcome, *twins.values()])
        return observation, reward, terminated, truncated, info

    def _compare(self, screens: Array, own: list[Any], twins: list[Any]) -> None:
        if not all(np.array_equal(mine, other) for mine, other in zip(own, twins, strict=True)):
            raise EnvironmentFailed("the emulator that renders plays another game than the one that is scored")
        self._screens = screens[:, -1]

    def render(self) -> tuple[Array, ...]:
        """Return each lane's screen, `[height, width, 3]` uint8."""
        return tuple(self._screens)

    def close(self, **kwargs: Any) -> None:
        """Close both."""
        self._twin.close(**kwargs)
        super().close(**kwargs)
