"""Check of the installation: all of Squall's packages must come from one folder.

A folder that `squall submit` uploads may contain a package of the same name, which would hide Squall's. This module
imports nothing from Squall, because any of its packages may be hidden.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGES = ("replay", "actors", "learner", "services")


def package_location(package: str) -> str:
    """Return the folder that contains a package, the path of a module of that name, or "nowhere"."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return "nowhere"
    origin = Path(spec.origin)
    return str(origin if spec.submodule_search_locations is None else origin.parents[1])


def hidden_packages() -> str | None:
    """Return an error text that names the packages hidden by another folder, or None if no package is hidden."""
    installation = str(Path(__file__).resolve().parents[2])
    locations = {package: package_location(package) for package in PACKAGES}
    hidden = {package: found for package, found in locations.items() if str(Path(found).resolve()) != installation}
    if not hidden:
        return None
    listed = ", ".join(f"{package!r} comes from {found}" for package, found in hidden.items())
    return (
        f"{listed}, but Squall is installed in {installation}: rename the files or folders that hide its packages, "
        f"or submit another folder"
    )
