"""Ray's environment variables. Ray reads some of them when it is imported, so this comes before."""

from __future__ import annotations

import os
import secrets


def set_ray_defaults() -> None:
    """Set what the user has not set; call this before anything imports ray.

    Workers run at the priority of the driver instead of nice 15, since the learner is one of them; those beside it
    give way by themselves. Arguments and answers up to a megabyte instead of 100 KB travel within the call: batches,
    and weights on their way to the store, cost a node's raylet more through the object store. A cluster of our own gets
    a token of its own; without one Ray leaves a file with a token in the home directory.
    """
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_max_direct_call_object_size", str(2**20))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not {"RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & os.environ.keys():
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
