"""Atari vector environments with the standard DQN preprocessing, made by ale-py, with and without rendering."""

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
RENDER_MODE = "rgb_array"
_ATARI_FRAMES_PER_SECOND = 60


def make_atari(kind: type[AtariVectorEnv], name: str, num_envs: int, arguments: Mapping[str, Any]) -> AtariVectorEnv:
    """Make a native Atari vector environment: 84x84 gray, max-pool, skip 4, stack 4, no-op starts, fire reset.

    Rewards are not clipped.

    Args:
        kind: `AtariVectorEnv`, or `RenderedAtari` to render the screen.
        name: Gymnasium id.
        num_envs: number of lanes.
        arguments: keyword arguments of the id's registration and of the user.

    Raises:
        ConfigurationError: the id has a random frame skip, or the arguments request color observations.
    """
    arguments = dict(arguments)
    skip = arguments.pop("frameskip", 1)
    if not isinstance(skip, int):
        game = name.rpartition(":")[2].rpartition("-")[0]
        raise ConfigurationError(
            f"{name} has a random frame skip, from {skip}; use {game}NoFrameskip-v4 or ALE/{game}-v5 instead"
        )
    if not arguments.get("grayscale", True):
        raise ConfigurationError(f"{name} has gray observations only: grayscale=False is not supported")
    arguments = {"reward_clipping": False, "stack_num": ATARI_STACK, "num_threads": 1, **arguments}
    return kind(num_envs=num_envs, frameskip=ATARI_FRAME_SKIP if skip == 1 else skip, **arguments)


class RenderedAtari(AtariVectorEnv):
    """A native Atari vector environment with a `render` method.

    The native environment keeps only small gray frames. Therefore a second environment, whose observations are the
    full color screen, runs in parallel with the same seeds and the same actions. The size, color, and stacking of
    observations do not affect the emulator, so both environments play the same game. Each step checks this.
    """

    def __init__(self, game: str, num_envs: int, *, frameskip: int, **arguments: Any) -> None:
        """Make both environments."""
        super().__init__(game=game, num_envs=num_envs, frameskip=frameskip, **arguments)
        emulator, rom = ale_py.ALEInterface(), ale_py.roms.get_rom_path(game)
        assert rom is not None
        emulator.loadROM(rom)
        height, width = emulator.getScreenDims()
        screen = {"img_height": height, "img_width": width, "grayscale": False, "stack_num": 1}
        self._screen_env = AtariVectorEnv(game=game, num_envs=num_envs, frameskip=frameskip, **{**arguments, **screen})
        self._screens: Array = np.empty(0)
        self.metadata = {
            **self.metadata, "render_modes": [RENDER_MODE], "render_fps": _ATARI_FRAMES_PER_SECOND / frameskip,
        }  # fmt: skip

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset both environments; the first reset needs a seed."""
        observation, info = super().reset(seed=seed, options=options)
        screens, screen_info = self._screen_env.reset(seed=seed, options=options)
        self._check_same_game([*info.values()], [*screen_info.values()])
        self._screens = screens[:, -1]
        return observation, info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step both environments with the same actions."""
        observation, reward, terminated, truncated, info = super().step(actions)
        screens, *outcome, screen_info = self._screen_env.step(actions)
        self._check_same_game([reward, terminated, truncated, *info.values()], [*outcome, *screen_info.values()])
        self._screens = screens[:, -1]
        return observation, reward, terminated, truncated, info

    def _check_same_game(self, scored: list[Any], rendered: list[Any]) -> None:
        if not all(np.array_equal(one, other) for one, other in zip(scored, rendered, strict=True)):
            raise EnvironmentFailed("the rendered Atari game differs from the game that is scored")

    def render(self) -> tuple[Array, ...]:
        """Return each lane's screen, `[height, width, 3]` uint8."""
        return tuple(self._screens)

    def close(self, **kwargs: Any) -> None:
        """Close both environments."""
        self._screen_env.close(**kwargs)
        super().close(**kwargs)
