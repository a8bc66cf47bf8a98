"""Squall's four packages, which must all come from one place: a folder that was submitted may hide one of them.

Nothing of Squall is imported here, because that may be just what is hidden.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOMS = ("replay", "actors", "learner", "services")


def place_of(room: str) -> str:
    """Return the folder that a package comes from; the path of a module in its place; or "nowhere"."""
    spec = importlib.util.find_spec(room)
    if spec is None or spec.origin is None:
        return "nowhere"
    origin = Path(spec.origin)
    return str(origin if spec.submodule_search_locations is None else origin.parents[1])


def hidden_rooms() -> str | None:
    """Say which packages come from elsewhere than this one does and what to do about it; None if none does."""
    home = str(Path(__file__).resolve().parents[1])
    places = {room: place_of(room) for room in ROOMS}
    elsewhere = {room: place for room, place in places.items() if str(Path(place).resolve()) != home}
    if not elsewhere:
        return None
    found = ", ".join(f"{room!r} comes from {place}" for room, place in elsewhere.items())
    return f"{found}, and Squall is in {home}: rename what hides a package of Squall's there, or submit another folder"
