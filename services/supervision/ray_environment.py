"""Ray's environment variables. Ray reads some of them at import, so this module is imported first."""

from __future__ import annotations

import os
import secrets


def set_ray_defaults() -> None:
    """Set Ray's environment variables that the user has not set. Call this before anything imports ray.

    - Ray's workers get the driver's priority instead of nice 15, because the learner is one of Ray's workers. The
      coordinator lowers the priority of the run's other processes.
    - Arguments and results of up to 1 MiB instead of 100 KB are sent within the call. Through the object store, batches
      and published weights would cost the node's raylet more.
    - A cluster that Squall starts gets a random token. Without one, Ray leaves a token file in the home directory.
    """
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_max_direct_call_object_size", str(2**20))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not {"RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & os.environ.keys():
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
