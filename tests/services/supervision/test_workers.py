"""WorkerPool: who joins and leaves, under which index, incarnation and rank; with stand-ins for the actors."""

from __future__ import annotations

from typing import Any

from services.supervision.workers import WorkerPool


class Handle:
    """Remembers what it was told, as `handle.method.remote(...)`."""

    def __init__(self, told: list[tuple[Any, ...]], who: tuple[int, int]) -> None:
        self._told, self._who = told, who

    def __getattr__(self, method: str) -> Any:
        class Method:
            remote = staticmethod(lambda *arguments: self._told.append((method, *self._who, *arguments)))

        return Method


def test_ranks_have_no_gaps_and_an_index_comes_back_as_another_incarnation() -> None:
    told: list[tuple[Any, ...]] = []
    worker_pool = WorkerPool(lambda index, incarnation, _: Handle(told, (index, incarnation)), first_incarnation=7)
    worker_pool.scale(4)
    worker_pool.start_some(100)
    assert [entry for entry in told if entry[0] == "place"] == [("place", n, 7, n, 4) for n in range(4)]
    told.clear()
    worker_pool.scale(1)
    assert [process.index for process in worker_pool.draining] == [3, 2, 1]
    assert told == [("stop", 3, 7, 8.0), ("stop", 2, 7, 8.0), ("stop", 1, 7, 8.0), ("place", 0, 7, 0, 1)]
    told.clear()
    # Those three are still leaving, so that new ones have other indices; and rungs of their own on a ladder of three.
    worker_pool.scale(3)
    worker_pool.start_some(100)
    places = [entry for entry in told if entry[0] == "place"]
    assert places == [("place", 0, 7, 0, 3), ("place", 4, 7, 1, 3), ("place", 5, 7, 2, 3)]
    # An index whose holder has left comes back as an incarnation, and so with seeds, that there never was.
    for process, unsent in zip(worker_pool.draining, (0, 0, 56), strict=True):
        sums = {"steps_sent": 1234, "steps_unsent": unsent}
        process.done, process.handle, process.result = True, None, type("Report", (), sums)
    assert [word for _, word in worker_pool.reap()] == [
        *["left, with everything sent: 1,234 steps"] * 2, "left, with 1,234 steps sent; 56 steps were not taken",
    ]  # fmt: skip
    worker_pool.scale(4)
    assert [(process.index, process.incarnation + 1) for process in worker_pool.starting] == [(1, 8)]


def test_many_are_started_a_few_at_a_time() -> None:
    told: list[tuple[Any, ...]] = []
    worker_pool = WorkerPool(lambda index, incarnation, _: Handle(told, (index, incarnation)), first_incarnation=0)
    worker_pool.scale(100)

    def started() -> list[int]:
        return [process.index for process in worker_pool.workers if process.handle is not None]

    assert started() == []
    worker_pool.start_some(6)
    assert started() == [0, 1, 2, 3], "no more in one tick"
    worker_pool.start_some(6)
    worker_pool.start_some(6)
    assert started() == [0, 1, 2, 3, 4, 5], "six are busy with their start"
    worker_pool.workers[0].report = worker_pool.workers[4].report = object()
    worker_pool.workers[1].pending = "waits for room"
    worker_pool.start_some(6)
    assert started() == list(range(9))
    worker_pool.scale(7)
    assert [process.index for process in worker_pool.draining] == [8, 7], "who was not started does not have to leave"
    assert not worker_pool.starting
