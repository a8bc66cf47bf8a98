"""Imports, of which heavy libraries' take seconds."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collections() -> Iterator[None]:
    """Keep Python's collector of garbage from looking at what is made in a `with` block of imports.

    That stays, and to look through it again and again takes a fifth of their time. After the block it counts as old.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            # Enabled first, the collector would begin with all that as the youngest.
            gc.freeze()
            gc.enable()
            gc.unfreeze()
