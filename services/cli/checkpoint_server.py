"""`squall serve`: the policy in a checkpoint, over gRPC. No Ray is started or asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from learner.checkpoints import load_algorithm
from services.rpc.auth import ServerConfig
from services.rpc.policy import PolicyService, ServedPolicy
from services.rpc.server import serve_until_signal
from services.runs import find_checkpoint


def serve_checkpoint(
    what: str,
    which: str,
    server_config: ServerConfig,
    announce: Callable[[str, Path], None],
    store_url: str | None = None,
) -> None:
    """Serve the policy in a run's checkpoint, or in a file, until SIGINT or SIGTERM.

    Args:
        what: a run's name, or the path of a checkpoint.
        which: `best` or `last`, of a run.
        server_config: where, and for whom.
        announce: told the address and the checkpoint when the server is up.
        store_url: where runs are registered.

    Raises:
        ConfigurationError: there is no checkpoint, or nothing can listen there.
    """
    path = find_checkpoint(what, which, store_url)
    serve_until_signal([policy_of(path, what)], server_config, lambda address: announce(address, path))


def policy_of(checkpoint: Path, name: str) -> PolicyService:
    """Return a service of the policy in a checkpoint, under the name of a run or file.

    Raises:
        ConfigurationError: the file is no checkpoint of Squall's.
    """
    algorithm = load_algorithm(checkpoint)
    version = max(algorithm.run_progress.get("weights_version", 0), 0)
    return PolicyService(
        ServedPolicy(algorithm.policy, algorithm.name, version=version, step=algorithm.env_steps), name
    )
