"""The limit: an 84x84 frame is 7,056 bytes."""

from __future__ import annotations

from measure import arguments, report

arguments()
report(84 * 84, transitions=100_000)
