"""Installation check: Squall's packages must all come from one folder, because a submitted folder may hide one of them.

This module imports nothing of Squall, because that may be just what is hidden.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGES = ("replay", "actors", "learner", "services")


def package_location(package: str) -> str:
    """Return the folder that holds a package, the path of a module of that name, or "nowhere"."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return "nowhere"
    origin = Path(spec.origin)
    return str(origin if spec.submodule_search_locations is None else origin.parents[1])


def hidden_packages() -> str | None:
    """Return which packages come from another folder than this one, and what to do about it; None if none does."""
    installation = str(Path(__file__).resolve().parents[2])
    locations = {package: package_location(package) for package in PACKAGES}
    hidden = {package: found for package, found in locations.items() if str(Path(found).resolve()) != installation}
    if not hidden:
        return None
    listed = ", ".join(f"{package!r} comes from {found}" for package, found in hidden.items())
    return (
        f"{listed}, and Squall is in {installation}: rename what hides a package of Squall's there, "
        f"or submit another folder"
    )
