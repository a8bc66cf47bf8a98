"""The wheel holds all of Squall and works where no checkout is; an editable install hides what a wheel forgets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def sources() -> list[str]:
    """Return the files of the checkout that are tracked, or that are new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted({name for name in listed if (ROOT / name).is_file()})


@pytest.fixture(scope="module")
def wheel(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, where no earlier build has left anything, and return its path."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in sources:
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "source" / name)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, folder / "source", cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installation(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a virtual environment with the wheel in it; its dependencies are those of this interpreter.

    They come by a path file, after the wheel's own place. Path files in a folder that is named by another one are not
    read, so an editable install beside the dependencies stays unseen.
    """
    folder = tmp_path_factory.mktemp("installation") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    dependencies = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (site_packages,) = folder.glob("lib/python3*/site-packages")
    (site_packages / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    return folder


def run(*command: object, cwd: Path, old_runs: Path | None = None) -> str:
    """Run a command that knows nothing of this checkout, and return what it prints."""
    hidden = ("RAY_", "SQUALL_", "PYTHON")
    variables = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    if old_runs is not None:
        variables["SQUALL_HOME"] = str(old_runs)
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def packaged(sources: list[str]) -> set[str]:
    """Return the files that belong in the wheel: modules at the top, and all that lies in a package at the top."""
    packages = {name.split("/")[0] for name in sources if name.count("/") == 1 and name.endswith("/__init__.py")}
    modules = {name for name in sources if "/" not in name and name.endswith(".py")}
    return {name for name in sources if name.split("/")[0] in packages - {"tests"}} | modules


def test_the_wheel_has_every_file_of_the_packages_and_no_other(wheel: Path, sources: list[str]) -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    scripts = set(setuptools.get("script-files", []))  # which a wheel has beside the packages
    wanted = packaged(sources) - scripts
    assert {".py", ".pyi", ".proto", ".yaml", ".typed"} <= {Path(name).suffix for name in wanted}
    with ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name and ".data/scripts/" not in name}
    assert wanted - held == set(), "not in the wheel: pyproject.toml must name the package or its data"
    assert held - wanted - scripts == set(), "in the wheel, and of no package"


def test_every_module_is_imported_from_the_wheel(installation: Path, sources: list[str], tmp_path: Path) -> None:
    files = [name for name in packaged(sources) if name.endswith(".py") and not name.endswith("__main__.py")]
    names = sorted(name.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for name in files)
    program = (
        "import importlib, json, sys\n"
        "print(json.dumps({name: importlib.import_module(name).__file__ for name in json.loads(sys.argv[1])}))"
    )
    places = json.loads(run(installation / "bin" / "python", "-c", program, json.dumps(names), cwd=tmp_path))
    assert {name: place for name, place in places.items() if not Path(place).is_relative_to(installation)} == {}
    assert len(places) == len(names) > 50


@pytest.mark.ray
def test_the_installed_command_trains_in_an_empty_folder(installation: Path, tmp_path: Path) -> None:
    tiny = ("--set", "hidden_sizes=[8]", "--set", "replay_size=1000", "--set", "warm_start_size=200")
    short = ("--actors", "1", "--steps", "1000", "--set", "eval_every=0", "--set", "final_eval_episodes=1")
    command = (installation / "bin" / "squall", "train", "dqn", "CartPole-v1", *tiny, *short, "--json")
    summary = json.loads(run(*command, cwd=tmp_path))
    assert summary["env_steps"] >= 1000
    assert summary["updates"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert (tmp_path / "runs" / summary["run"] / "checkpoints" / "last.ckpt").is_file()
