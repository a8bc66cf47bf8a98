"""Where runs lie, and the store beside them. Light to import: commands that only read start at once."""

from __future__ import annotations

import os
from pathlib import Path

from services.sqlite_store import open_store
from services.store import RunStore

CONFIG = "config.yaml"
SUMMARY = "summary.json"


def home() -> Path:
    """Return the folder that holds all runs: SQUALL_HOME, or `runs` here, as an absolute path."""
    return Path(os.environ.get("SQUALL_HOME") or "runs").absolute()


def open_home_store(*, create: bool = False) -> RunStore:
    """Open the store of this home; without `create` a missing one reads as empty and is not made."""
    return open_store(None, home(), create=create)
