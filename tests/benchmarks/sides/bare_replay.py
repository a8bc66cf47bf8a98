"""The limit of the replay service: one copy of every byte of an item, from memory to memory."""

from __future__ import annotations

import numpy as np
from items import item_bytes
from measure import arguments, rate, report

parsed = arguments("kind", "table", "what")
size = item_bytes(parsed.kind)
count = 2**26 // size
source, target = np.ones(count * size, np.uint8), np.empty(count * size, np.uint8)


def copy() -> int:
    """Copy a batch of items."""
    np.copyto(target, source)
    return count


report(rate(copy, parsed.warm_up, parsed.seconds), item_bytes=size)
