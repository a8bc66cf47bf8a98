"""Connection to a Ray cluster: a local one started for the run, or an existing one at RAY_ADDRESS."""

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

MIN_OBJECT_STORE_BYTES = 128 * 2**20
_MAX_TEMPORARY_PATH = 30


class RayCluster:
    """Context manager of a Ray cluster: connects to the one at RAY_ADDRESS, or starts a local one and ends it."""

    def __init__(self, object_store_bytes: int) -> None:
        """Describe the cluster without starting it.

        Args:
            object_store_bytes: shared memory that a local cluster needs.
        """
        self._object_store_bytes = object_store_bytes
        self._folder: str | None = None

    def __enter__(self) -> RayCluster:
        """Start the cluster, or connect to it.

        Raises:
            RayUnavailable: Ray could not be started or reached, or there is too little shared memory.
        """
        try:
            try:
                self._start()
            except RayUnavailable:
                raise
            except Exception:  # Ray raises a bare Exception when its start takes too long on a busy machine
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
            return self._object_store_bytes
        if free < MIN_OBJECT_STORE_BYTES:
            raise RayUnavailable(
                f"/dev/shm has {free / 2**20:.0f} MiB free, but Ray needs {MIN_OBJECT_STORE_BYTES / 2**20:.0f} MiB; "
                f"in a container, raise its shm_size"
            )
        return min(self._object_store_bytes, int(free * 0.8))

    def __exit__(self, *_: object) -> None:
        """Disconnect from the cluster; end a local one and remove its files."""
        ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _session_folder() -> str:
    """Create a folder for Ray's session, named after this process, and remove those of processes that have exited.

    Ray's sockets are in this folder, and the length of a socket's path is limited, so /tmp replaces a long TMPDIR.
    """
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) > _MAX_TEMPORARY_PATH:
        parent = Path("/tmp")
    for old in parent.glob("squall-*-*"):
        pid = old.name.split("-")[1]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(old, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"squall-{os.getpid()}-", dir=parent)
