"""`squall submit`: exit statuses, the log, the env file, bad input, and hidden packages."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from replay.errors import ConfigurationError
from services.cli.job_server import _exit_status, _LogStream, read_env_file
from tests.services.running import ROOT, environment, squall


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.RUNNING, None, None),
        (JobStatus.PENDING, None, None),
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.SUCCEEDED, None, 0),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, -9, 137),
        (JobStatus.FAILED, None, 1),
        (JobStatus.STOPPED, None, 143),
    ],
)
def test_the_exit_status_is_the_commands(status: JobStatus, code: int | None, expected: int | None) -> None:
    details: Any = SimpleNamespace(status=status, driver_exit_code=code)
    assert _exit_status(details) == expected


def test_a_log_that_is_sent_again_is_passed_on_once() -> None:
    written: list[str] = []
    log = _LogStream(written.append)
    log.restart()
    log.receive("one\n")
    log.receive("two\n")
    log.restart()
    log.receive("one\ntw")
    log.receive("o\nthree\n")
    log.restart()
    log.receive("one\n")
    assert "".join(written) == "one\ntwo\nthree\n"


def test_an_env_file_is_read_as_docker_compose_does(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("# a comment\nA=1\n export B = two words \nC='quoted=yes'\nD=\n\nnonsense\n")
    assert read_env_file(file) == {"A": "1", "B": "two words", "C": "quoted=yes", "D": ""}
    file.write_text(
        "A=abc # comment\nB=a#b\nC='a # b' # c\nD=\"a # b\"\t# c\nE= # c\nF=it's # c\nG=#c\nH=a b\t#c\nI='' # c\n"
    )
    assert read_env_file(file) == {
        "A": "abc", "B": "a#b", "C": "a # b", "D": "a # b", "E": "", "F": "it's", "G": "#c", "H": "a b", "I": "",
    }  # fmt: skip
    with pytest.raises(ConfigurationError, match="no-such"):
        read_env_file(tmp_path / "no-such")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name the command to run"),
        (["--", "submit", "--", "runs"], "name the command to run"),
        (["--", "train", "dqn", "CartPole-v1", "--actrs", "4"], "--actrs"),
        (["--address", "ftp://head", "--", "runs"], "'ftp://head'"),
        (["--address", "http://head:99999", "--", "runs"], "'http://head:99999'"),
        (["--env-file", "no-such-file", "--", "runs"], "no-such-file"),
    ],
)
def test_bad_input_is_refused_before_anybody_is_asked(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = squall(tmp_path, "submit", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert not done.stdout


def test_where_no_job_server_is_that_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    done = squall(tmp_path, "submit", "--address", f"http://127.0.0.1:{port}", "--", "runs")
    assert done.returncode == 1
    assert f"no job server at http://127.0.0.1:{port}" in done.stderr
    assert "--address" in done.stderr


def test_without_the_extra_its_installation_is_named(tmp_path: Path) -> None:
    (tmp_path / "aiohttp.py").write_text("raise ImportError('no aiohttp')\n")
    done = subprocess.run(
        [sys.executable, "-m", "services.cli.main", "submit", "--", "runs"],
        env={**environment(tmp_path), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "pip install 'squall[cluster]'" in done.stderr


@pytest.mark.parametrize(
    ("hides", "package"),
    [
        ("replay.py", "replay"),
        ("actors/__init__.py", "actors"),
        ("services/__init__.py", "services"),
        ("services.py", "services"),
    ],
)
def test_the_command_names_a_folder_that_hides_a_package(tmp_path: Path, hides: str, package: str) -> None:
    command = tmp_path / "bin" / "squall"
    command.parent.mkdir()
    shutil.copy(ROOT / "services" / "squall", command)
    submitted = tmp_path / "submitted"

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, command, "--version"],
            env={**environment(tmp_path), "PYTHONPATH": f"{submitted}{os.pathsep}{ROOT}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    (submitted / Path(hides).parent).mkdir(parents=True)
    (submitted / "data").mkdir()
    assert run().returncode == 0
    (submitted / hides).write_text("raise RuntimeError('never run')\n")
    done = run()
    assert done.returncode == 2
    assert f"'{package}'" in done.stderr
    assert str(submitted / hides) in done.stderr or str(submitted) in done.stderr
    assert "Traceback" not in done.stderr
