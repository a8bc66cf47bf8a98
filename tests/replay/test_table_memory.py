"""The memory of a table: computed, allocated, refused, and measured."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from replay.errors import NotEnoughMemory
from replay.table import TableSpec, TransitionTable
from replay.types import Layout
from tests.replay.naive import make_segment

ATARI = Layout((84, 84), "uint8", 4, (), "int64", 64, 3)
VECTOR = Layout((17,), "float64", 1, (6,), "float32", 16, 1)
SMALL_STACK = Layout((3, 3), "uint8", 2, (), "int64", 8, 5)
GIB = 2**30


def allocated(table: TransitionTable) -> int:
    """Return the total size in bytes of the table's arrays, including the sum tree."""
    arrays = [*vars(table).values(), table._frames.array, *((table._tree._nodes,) if table._tree else ())]
    return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))


@pytest.mark.parametrize("alpha", [None, 0.6])
@pytest.mark.parametrize("layout", [ATARI, VECTOR, SMALL_STACK])
@pytest.mark.parametrize("capacity", [64, 100, 1024, 1025])
def test_expected_bytes_are_those_allocated(layout: Layout, capacity: int, alpha: float | None) -> None:
    spec = TableSpec(layout, capacity, alpha)
    assert allocated(TransitionTable(spec, seed=np.random.SeedSequence(0))) == spec.expected_bytes


@pytest.mark.parametrize("alpha", [None, 0.6])
@pytest.mark.parametrize("n_steps", [1, 3, 5])
@pytest.mark.parametrize("capacity", [20_000, 32_769, 100_000, 1_000_000])
def test_atari_takes_at_most_115_percent_of_a_frame_a_transition(
    capacity: int, n_steps: int, alpha: float | None
) -> None:
    layout = Layout((84, 84), "uint8", 4, (), "int64", 64, n_steps)
    per_transition = TableSpec(layout, capacity, alpha).expected_bytes / capacity
    assert 7056 < per_transition <= 1.15 * 7056


@pytest.mark.parametrize("n_steps", [1, 5])
@pytest.mark.parametrize("layout", [ATARI, VECTOR])
def test_full_segments_fill_a_table_to_its_capacity(layout: Layout, n_steps: int) -> None:
    layout = replace(layout, n_steps=n_steps)
    table = TransitionTable(TableSpec(layout, 3 * layout.segment_length + 5), seed=np.random.SeedSequence(0))
    for _ in range(10):
        table.insert([make_segment(layout, layout.segment_length)])
    assert table.size == 3 * layout.segment_length


def test_a_replay_larger_than_the_memory_is_refused_with_both_figures_before_anything_is_allocated() -> None:
    spec = TableSpec(ATARI, 1_000_000_000, 0.6)
    needed = f"{spec.expected_bytes / GIB:,.2f} GiB"
    with pytest.raises(NotEnoughMemory) as refusal:
        TransitionTable(spec, seed=np.random.SeedSequence(0))
    text = str(refusal.value)
    assert "a replay of 1,000,000,000 transitions" in text
    assert f"needs {needed}, but " in text
    assert " GiB are available here" in text


def test_the_boundary_is_exact() -> None:
    spec = TableSpec(ATARI, 10_000)
    spec.check_memory(spec.expected_bytes)
    with pytest.raises(NotEnoughMemory, match=r"0\.07 GiB, but 0\.07 GiB are"):
        spec.check_memory(spec.expected_bytes - 1)


@pytest.mark.parametrize("alpha", [None, 0.6])
@pytest.mark.parametrize("layout", [ATARI, VECTOR, SMALL_STACK])
@pytest.mark.parametrize("available", [2_000_000, 40_000_000, GIB])
def test_the_size_that_the_refusal_proposes_fits_and_is_not_timid(
    layout: Layout, available: int, alpha: float | None
) -> None:
    spec = TableSpec(layout, 200_000_000, alpha)
    with pytest.raises(NotEnoughMemory) as refusal:
        spec.check_memory(available)
    proposed = int(str(refusal.value).split("a replay_size of ")[1].split(" ")[0].replace(",", ""))
    replace(spec, capacity=proposed).check_memory(available)
    with pytest.raises(NotEnoughMemory):
        replace(spec, capacity=int(1.2 * proposed) + 1).check_memory(available)


def test_a_machine_that_holds_no_table_at_all_hears_so() -> None:
    with pytest.raises(NotEnoughMemory, match=r"but 0\.00 GiB are available here; no replay_size would fit"):
        TableSpec(ATARI, 1000).check_memory(0)


_FILL = """
import sys
import numpy as np
import psutil
from replay.table import TableSpec, TransitionTable
from replay.types import Layout
from tests.replay.naive import make_segment

layout, count = Layout((84, 84), "uint8", 4, (), "int64", 64, int(sys.argv[1])), 20_000
segment = make_segment(layout, 64, value=1)
before = psutil.Process().memory_info().rss
table = TransitionTable(TableSpec(layout, count), seed=np.random.SeedSequence(0))
for _ in range(2 * count // 64):
    table.insert([segment])
assert count - 64 < table.size <= count
print((psutil.Process().memory_info().rss - before) / table.size, table.bytes / table.size)
"""


@pytest.mark.slow
@pytest.mark.parametrize("n_steps", [1, 5])
def test_resident_memory_of_20_000_atari_transitions(n_steps: int) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _FILL, str(n_steps)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    resident, held = map(float, done.stdout.split())
    assert 7056 < resident <= 1.15 * 7056
    assert 7056 < held <= 1.15 * 7056
