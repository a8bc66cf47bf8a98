"""Several processes and threads that use one store at the same time, on every store."""

from __future__ import annotations

import threading

from services.store.base import HISTORY, RunStore
from tests.services.store.backends import Backend, record, start_python

COORDINATOR = """
import sys, time
from pathlib import Path
from services.store.locate import open_store
store = open_store(sys.argv[1], Path("."))
done = False
for step in range(1, 10_000):
    store.write_snapshot("pong-1", {"step": step, "twice": 2 * step}, time.time())
    store.add_metrics("pong-1", step, {"x": step}, time.time())
    store.add_event("pong-1", "tick", str(step), time.time())
    for command in store.pending_commands("pong-1"):
        store.acknowledge("pong-1", command.id, {"echo": command.arguments["n"]})
        done = command.kind == "stop"
    if done and step >= 200:
        break
print(step, flush=True)
"""


def test_a_coordinator_readers_and_a_commander_share_a_store(backend: Backend, store: RunStore) -> None:
    store.register(record())
    errors: list[BaseException] = []
    stop = threading.Event()

    def read() -> None:
        try:
            with backend.open() as reader:
                last = 0
                while not stop.is_set():
                    snapshot = reader.read_snapshot("pong-1") or {"step": 0, "twice": 0}
                    assert snapshot["twice"] == 2 * snapshot["step"]
                    assert snapshot["step"] >= last
                    last = snapshot["step"]
                    assert reader.list_runs()[0].state == "running"
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    coordinator = start_python(COORDINATOR, backend.url)
    try:
        for reader in readers:
            reader.start()
        for number in range(20):
            sent = store.send_command("pong-1", "scale" if number < 19 else "stop", {"n": number})
            assert store.wait_for_acknowledgement("pong-1", sent, deadline_seconds=10) == {"echo": number}
        output, _ = coordinator.communicate(timeout=20)
    finally:
        stop.set()
        coordinator.kill()
        coordinator.communicate()
        for reader in readers:
            reader.join(timeout=10)
    assert errors == []
    steps = int(output)
    assert [row.step for row in store.metrics("pong-1")] == list(range(1, steps + 1))
    assert [event.text for event in store.events("pong-1", limit=HISTORY)] == [
        str(step) for step in range(1, steps + 1)
    ]
    assert store.read_snapshot("pong-1") == {"step": steps, "twice": 2 * steps}


def test_threads_may_share_one_store(store: RunStore) -> None:
    store.register(record())
    errors: list[BaseException] = []

    def write(offset: int) -> None:
        try:
            for index in range(50):
                store.add_metrics("pong-1", offset + index, {}, 1.0)
                store.get("pong-1")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(50 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(row.step for row in store.metrics("pong-1")) == list(range(200))
