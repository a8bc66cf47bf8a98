"""Available memory, without and within the limit of a control group."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from replay.memory import available_memory


def control_group(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(text + "\n")
    return folder


def test_available_memory_is_the_machines_where_no_control_group_limits_it(tmp_path: Path) -> None:
    machine = psutil.virtual_memory().available
    assert available_memory(tmp_path) == pytest.approx(machine, rel=0.2)
    control_group(tmp_path, max="max", current="1", stat="inactive_file 0")
    assert available_memory(tmp_path) == pytest.approx(machine, rel=0.2)
    control_group(tmp_path, max=str(2**60))
    assert available_memory(tmp_path) == pytest.approx(machine, rel=0.2)


def test_available_memory_is_the_control_groups_where_that_is_less(tmp_path: Path) -> None:
    control_group(tmp_path, max="5000", current="3000", stat="anon 1500\ninactive_file 1000\nactive_file 500")
    assert available_memory(tmp_path) == 3000  # the inactive page cache counts as available
    control_group(tmp_path, max="1000")
    assert available_memory(tmp_path) == 0
