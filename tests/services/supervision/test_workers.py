"""The worker pool: index, incarnation, and rank of workers that start and leave; with fake actors."""

from __future__ import annotations

from typing import Any

from services.supervision.workers import WorkerPool


class FakeHandle:
    """Records calls `handle.method.remote(...)`."""

    def __init__(self, calls: list[tuple[Any, ...]], worker: tuple[int, int]) -> None:
        self._calls, self._worker = calls, worker

    def __getattr__(self, method: str) -> Any:
        class Method:
            remote = staticmethod(lambda *arguments: self._calls.append((method, *self._worker, *arguments)))

        return Method


def test_ranks_have_no_gaps_and_an_index_comes_back_as_another_incarnation() -> None:
    calls: list[tuple[Any, ...]] = []
    worker_pool = WorkerPool(lambda index, incarnation, _: FakeHandle(calls, (index, incarnation)), first_incarnation=7)
    worker_pool.scale(4)
    worker_pool.start_some(100)
    assert [call for call in calls if call[0] == "set_rank"] == [("set_rank", n, 7, n, 4) for n in range(4)]
    calls.clear()
    worker_pool.scale(1)
    assert [process.index for process in worker_pool.draining] == [3, 2, 1]
    assert calls == [("stop", 3, 7, 8.0), ("stop", 2, 7, 8.0), ("stop", 1, 7, 8.0), ("set_rank", 0, 7, 0, 1)]
    calls.clear()
    # Those three are still leaving, so new workers get other indices, and ranks 1 and 2 of three.
    worker_pool.scale(3)
    worker_pool.start_some(100)
    ranks = [call for call in calls if call[0] == "set_rank"]
    assert ranks == [("set_rank", 0, 7, 0, 3), ("set_rank", 4, 7, 1, 3), ("set_rank", 5, 7, 2, 3)]
    # An index whose worker has left is reused with a new incarnation, and so with new seeds.
    for process, unsent in zip(worker_pool.draining, (0, 0, 56), strict=True):
        sums = {"steps_sent": 1234, "steps_unsent": unsent}
        process.done, process.handle, process.result = True, None, type("Report", (), sums)
    assert [message for _, message in worker_pool.reap()] == [
        *["left, with everything sent: 1,234 steps"] * 2, "left, with 1,234 steps sent; 56 steps were not accepted",
    ]  # fmt: skip
    worker_pool.scale(4)
    assert [(process.index, process.incarnation + 1) for process in worker_pool.starting] == [(1, 8)]


def test_many_are_started_a_few_at_a_time() -> None:
    calls: list[tuple[Any, ...]] = []
    worker_pool = WorkerPool(lambda index, incarnation, _: FakeHandle(calls, (index, incarnation)), first_incarnation=0)
    worker_pool.scale(100)

    def started() -> list[int]:
        return [process.index for process in worker_pool.workers if process.handle is not None]

    assert started() == []
    worker_pool.start_some(6)
    assert started() == [0, 1, 2, 3], "at most four in one tick"
    worker_pool.start_some(6)
    worker_pool.start_some(6)
    assert started() == [0, 1, 2, 3, 4, 5], "six workers are starting"
    worker_pool.workers[0].report = worker_pool.workers[4].report = object()
    worker_pool.workers[1].pending = "needs 1 CPU"
    worker_pool.start_some(6)
    assert started() == list(range(9))
    worker_pool.scale(7)
    assert [process.index for process in worker_pool.draining] == [8, 7], "a worker that was not started does not leave"
    assert not worker_pool.starting
