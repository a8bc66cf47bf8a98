"""The available memory of a process, within the limit of its control group (container)."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil


def available_memory(control_group: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the memory in bytes that this process can still allocate, within the limit of its control group."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = (control_group / "memory.max").read_text().strip()
        if limit != "max":
            used = int((control_group / "memory.current").read_text())
            # The inactive part of the page cache counts as used, but the kernel frees it on demand.
            lines = (control_group / "memory.stat").read_text().splitlines()
            used -= int(dict(line.split() for line in lines).get("inactive_file", 0))
            available = min(available, int(limit) - used)
    except OSError:
        with contextlib.suppress(OSError):  # control groups, version 1
            limit = (control_group / "memory" / "memory.limit_in_bytes").read_text()
            used = int((control_group / "memory" / "memory.usage_in_bytes").read_text())
            available = min(available, int(limit) - used)
    return max(available, 0)


def gibibytes(size: int) -> str:
    """Return a size in bytes as text in GiB, such as `"1.50 GiB"`."""
    return f"{size / 2**30:,.2f} GiB"
