"""Frames of a game that was played, so that what compresses compresses as it does in life. NumPy and ale-py only."""

from __future__ import annotations

from typing import Any


def recorded(count: int, seed: int = 0) -> Any:
    """Return `[count, 84, 84]` uint8: screens of Pong under random play, every fourth frame, shrunk to 84x84."""
    import ale_py
    import numpy as np
    from ale_py import roms  # not imported by ale_py itself where there is no gymnasium

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    game = ale_py.ALEInterface()
    game.setInt("random_seed", seed)
    game.loadROM(roms.get_rom_path("pong"))
    actions, rng = game.getMinimalActionSet(), np.random.default_rng(seed)
    rows, columns = np.linspace(0, 209, 84).astype(int), np.linspace(0, 159, 84).astype(int)
    frames = np.empty((count, 84, 84), np.uint8)
    for index in range(count):
        action = actions[rng.integers(len(actions))]
        for _ in range(4):
            game.act(action)
        if game.game_over():
            game.reset_game()
        frames[index] = game.getScreenGrayscale()[rows][:, columns]
    return frames
