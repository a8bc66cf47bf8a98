"""Imports with the garbage collector disabled."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from replay.imports import no_collections


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """Generations that the garbage collector collects while a test runs."""
    seen: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append(info["generation"])

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


def test_what_is_made_in_the_block_is_not_looked_through(collections: list[int]) -> None:
    gc.collect()
    collections.clear()
    with no_collections():
        made = [[] for _ in range(100_000)]
    assert collections == []
    assert gc.isenabled()
    more = [[] for _ in range(1_000)]
    assert collections
    assert set(collections) <= {0, 1}, "objects of the block must be in the oldest generation"
    assert len(made) + len(more) == 101_000


def test_garbage_of_the_block_is_found_later() -> None:
    class Ring:
        ended = 0

        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            Ring.ended += 1

    with no_collections():
        Ring()
    assert Ring.ended == 0
    gc.collect()
    assert Ring.ended == 1


def test_it_is_as_it_was_after_an_error_and_where_it_was_off() -> None:
    with pytest.raises(ImportError), no_collections():
        raise ImportError("no such library")
    assert gc.isenabled()
    with no_collections():
        with no_collections():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
