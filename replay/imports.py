"""Faster imports of heavy libraries, which take seconds."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collections() -> Iterator[None]:
    """Disable Python's garbage collector during a `with` block of imports.

    Nearly all objects that an import creates stay alive, and traversing them repeatedly takes a fifth of the import
    time. After the block, these objects belong to the oldest generation.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            # `freeze` and `unfreeze` move all objects to the oldest generation. If the collector were enabled before,
            # the collector would first traverse these objects as its youngest generation.
            gc.freeze()
            gc.enable()
            gc.unfreeze()
