"""RayCluster: the Ray cluster that a run lives in: one of this machine's own, or one that is there already."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import psutil
import ray

from replay.remote import NAMESPACE
from services.errors import RayUnavailable

LEAST_OBJECT_STORE = 128 * 2**20
_LONGEST_TEMPORARY_PATH = 30


class RayCluster:
    """A Ray cluster for as long as a `with` block lasts: one of this machine's own, or the one in RAY_ADDRESS."""

    def __init__(self, object_store_bytes: int) -> None:
        """Say how much shared memory a cluster of our own needs."""
        self._bytes = object_store_bytes
        self._folder: str | None = None

    def __enter__(self) -> RayCluster:
        """Start or join the cluster.

        Raises:
            RayUnavailable: it could not be started or reached, or shared memory is short.
        """
        try:
            try:
                self._start()
            except RayUnavailable:
                raise
            except Exception:  # Ray raises a bare Exception when its start takes too long, as on a loaded machine
                self.__exit__()
                self._start()
        except Exception as error:
            self.__exit__()
            if isinstance(error, RayUnavailable):
                raise
            address = os.environ.get("RAY_ADDRESS")
            where = f"the Ray cluster at {address}" if address else "a local Ray"
            reason = str(error).splitlines()[0] if str(error) else repr(error)
            raise RayUnavailable(f"cannot use {where}: {reason}") from error
        return self

    def _start(self) -> None:
        common: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "configure_logging": False}
        if address := os.environ.get("RAY_ADDRESS"):
            ray.init(address=address, **common)
            return
        self._folder = _session_folder()
        ray.init(
            address="local",
            num_cpus=os.cpu_count(),
            include_dashboard=False,
            object_store_memory=self._shared_memory(),
            _temp_dir=self._folder,
            **common,
        )

    def _shared_memory(self) -> int:
        try:
            free = psutil.disk_usage("/dev/shm").free
        except OSError:
            return self._bytes
        if free < LEAST_OBJECT_STORE:
            raise RayUnavailable(
                f"/dev/shm has {free / 2**20:.0f} MiB free and Ray needs {LEAST_OBJECT_STORE / 2**20:.0f} MiB; "
                f"in a container raise its shm_size"
            )
        return min(self._bytes, int(free * 0.8))

    def __exit__(self, *_: object) -> None:
        """Leave the cluster; one of our own ends, and its files go."""
        ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _session_folder() -> str:
    """Make a folder for Ray's session, named after this process, and remove those whose process is gone.

    Ray's sockets lie in it, and a socket's path is short by nature, so a long TMPDIR gives way to /tmp.
    """
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) > _LONGEST_TEMPORARY_PATH:
        parent = Path("/tmp")
    for old in parent.glob("squall-*-*"):
        pid = old.name.split("-")[1]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(old, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"squall-{os.getpid()}-", dir=parent)
