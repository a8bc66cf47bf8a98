"""The peers, each in a virtual environment of its own: they pin what Squall does not, and the other way round."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
PEERS: dict[str, tuple[str, ...]] = {
    "stable-baselines3": ("stable-baselines3==2.9.2", "torch==2.13.0", "ale-py==0.12.1", "opencv-python-headless"),
    "tianshou": ("tianshou==2.0.1", "torch==2.13.0"),
    "cpprb": ("cpprb==11.0.0",),
    "reverb": ("dm-reverb[tensorflow]==0.14.0", "ale-py==0.12.1"),
    "rllib": ("ray[rllib]==2.60.0", "torch==2.13.0", "numba", "ale-py==0.12.1", "opencv-python-headless"),
}
"""What is installed for each, pinned where a version was tried; all of them also need psutil."""


class PeerMissing(Exception):
    """A peer that could not be installed; the text says why."""


def interpreter(peer: str) -> str:
    """Return the Python of a peer's environment, made at the first call; "" is this environment's own.

    They lie in SQUALL_PEERS, default `runs/peers`.

    Raises:
        PeerMissing: it could not be installed.
    """
    if not peer:
        return sys.executable
    folder = Path(os.environ.get("SQUALL_PEERS") or ROOT / "runs" / "peers").absolute() / peer
    done = folder / ".installed"
    python = str(folder / "bin" / "python")
    wanted = "\n".join(PEERS[peer])
    if done.exists() and done.read_text() == wanted:
        return python
    print(f"installs {peer} in {folder}", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True, clear=True)
    made = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "psutil", *PEERS[peer]], capture_output=True, text=True, check=False
    )
    if made.returncode:
        raise PeerMissing(f"{peer}: {(made.stderr.strip().splitlines() or ['pip failed'])[-1]}")
    done.write_text(wanted)
    return python
