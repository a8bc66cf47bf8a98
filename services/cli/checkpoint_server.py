"""gRPC server of the policy in a checkpoint, for `squall serve`. It does not use Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from learner.checkpoints import load_algorithm
from services.rpc.auth import ServerConfig
from services.rpc.policy import PolicyService, ServedPolicy
from services.rpc.server import serve_until_signal
from services.runs import find_checkpoint


def serve_checkpoint(
    run_or_path: str,
    which: str,
    server_config: ServerConfig,
    announce: Callable[[str, Path], None],
    store_url: str | None = None,
) -> None:
    """Serve the policy of a checkpoint until SIGINT or SIGTERM.

    Args:
        run_or_path: name of a run, or path of a `.ckpt` file.
        which: checkpoint of the run: `best` or `last`.
        server_config: address and credentials of the server.
        announce: called with the address and the checkpoint's path when the server is ready.
        store_url: URL of the run store; None takes the default.

    Raises:
        ConfigurationError: there is no checkpoint, or the server cannot listen on this address.
    """
    path = find_checkpoint(run_or_path, which, store_url)
    serve_until_signal([policy_of(path, run_or_path)], server_config, lambda address: announce(address, path))


def policy_of(checkpoint: Path, name: str) -> PolicyService:
    """Return a gRPC service of the policy in a checkpoint.

    Args:
        checkpoint: path of the checkpoint.
        name: name under which callers request the policy: a run's name, or a path.

    Raises:
        ConfigurationError: the file is not a checkpoint of Squall.
    """
    algorithm = load_algorithm(checkpoint)
    version = max(algorithm.run_progress.get("weights_version", 0), 0)
    return PolicyService(
        ServedPolicy(algorithm.policy, algorithm.name, version=version, step=algorithm.env_steps), name
    )
