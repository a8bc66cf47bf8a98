"""The limit of the replay service: one copy of every byte of an item, from memory to memory."""

from __future__ import annotations

import numpy as np
from items import item_bytes
from measure import arguments, quantile, report, times

parsed = arguments("kind", "table")
size = item_bytes(parsed.kind)
count = 2**26 // size
source, target = np.ones(count * size, np.uint8), np.empty(count * size, np.uint8)


def copy() -> None:
    """Copy a batch of items."""
    np.copyto(target, source)


taken = times(copy, parsed.warm_up, parsed.seconds)
items = count * len(taken) / sum(taken)
report(
    items, item_bytes=size, inserted=items, sampled=items, p99_by_p50=quantile(taken, 0.99) / quantile(taken, 0.5)
)  # fmt: skip
