"""What is checked of a block without running it: a list of complaints, which is empty if all is well."""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Sequence

import yaml

from replay.errors import SquallError
from services.cli.main import build_parser
from services.config import parse_assignment, resolve
from tests.docs.blocks import ROOT, SHELL, Block, commands_of

OURS = ("squall", "replay", "actors", "learner", "services", "tests")
LAUNCHERS = ("docker", "kubectl", "ray", "ssh", "srun", "unshare")
"""Programs that may run a `squall` command given to them as arguments."""


def complaints(block: Block) -> list[str]:
    """Return what is wrong with a block."""
    if block.problem or block.mode == "output":
        return [block.problem] if block.problem else []
    try:
        if block.language in SHELL:
            return [wrong for words in commands_of(block.text) for wrong in check_command(words)]
        if block.language == "python":
            return list(check_python(block.text))
        parsers: dict[str, Callable[[str], object]] = {
            "yaml": lambda text: list(yaml.safe_load_all(text)),
            "json": json.loads,
            "toml": tomllib.loads,
        }
        parsers[block.language](block.text)
    except (ValueError, SyntaxError, ImportError, yaml.YAMLError) as error:
        return [f"{type(error).__name__}: {error}"]
    return []


def check_command(words: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with a shell command."""
    program, rest = words[0], list(words[1:])
    if program == "squall":
        yield from check_squall(rest)
    elif program == "make":
        yield from check_make(rest)
    elif re.fullmatch(r"(\S*/)?python[\d.]*", program) and rest[:1] == ["-m"]:
        yield from check_module(rest[1:])
    elif program in LAUNCHERS and "squall" in rest:
        yield from check_squall(rest[rest.index("squall") + 1 :])
    elif "--" in rest and rest[rest.index("--") + 1 :][:1] == ["squall"]:
        yield from check_squall(rest[rest.index("--") + 2 :])
    elif program in ("pip", "pip3") or program.endswith("/pip"):
        yield from check_extras(rest)
    for word in words:
        yield from check_file(word)


def check_squall(arguments: Sequence[str]) -> Iterator[str]:
    """Yield what the command line refuses: an argument, an algorithm, or a key or value of `--set`."""
    arguments = [word.replace("$(nproc)", "2") for word in arguments]
    try:
        parsed = parse(build_parser(), arguments)
        if (run := getattr(parsed, "arguments", None)) is not None:  # of squall submit
            yield from check_squall(run[1:] if run[:1] == ["--"] else run)
        if getattr(parsed, "algorithm", None) and not parsed.config:
            resolve(parsed.algorithm, parsed.environment, overrides=dict(map(parse_assignment, parsed.set)))
    except (ValueError, SquallError) as error:
        yield f"squall {shlex.join(arguments)}: {error}"


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Return the parsed arguments.

    Raises:
        ValueError: the parser refuses them.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            return parser.parse_args(arguments)
    except SystemExit as end:
        if end.code:
            raise ValueError(printed.getvalue().strip().splitlines()[-1]) from None
        return argparse.Namespace()  # --help, --version


@functools.cache
def makefile() -> str:
    """Return the Makefile's text."""
    return (ROOT / "Makefile").read_text()


def check_make(arguments: Sequence[str]) -> Iterator[str]:
    """Yield targets and variables that the Makefile does not have, and what is wrong with `make train ARGS=...`."""
    for word in (word for word in arguments if not word.startswith("-")):
        name, equals, value = word.partition("=")
        if equals and not re.search(
            rf"\$\({name}\)|^{name} *[:?]?=|\$\(filter .*\$\({name}\)", makefile(), re.MULTILINE
        ):
            yield f"make: the Makefile does not use {name}"
        elif not equals and not re.search(rf"^{re.escape(name)}:", makefile(), re.MULTILINE):
            yield f"make: there is no target {name}"
        if name == "ARGS" and "train" in arguments:
            yield from check_squall(["train", "dqn", "CartPole-v1", *shlex.split(value)])


def check_module(arguments: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with `python -m`: no such module, or arguments of `squall` that it refuses."""
    module, *rest = arguments
    if not find_module(module):
        yield f"python -m: there is no module {module}"
    if module in ("squall", "services.cli.main"):
        yield from check_squall(rest)


def find_module(name: str) -> bool:
    """Return whether a module exists."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def check_extras(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the extras in `squall[...]` or `.[...]` that pyproject.toml does not have."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in arguments:
        if match := re.fullmatch(r"(?:squall|\.)\[([\w,-]+)\]", word):
            yield from (f"pip: there is no extra {extra}" for extra in match[1].split(",") if extra not in extras)


def check_file(word: str) -> Iterator[str]:
    """Yield a file that is missing though its path begins with one of the repository's folders."""
    path = word.rstrip("/")
    folder, slash, _ = path.partition("/")
    if not slash or not re.fullmatch(r"[\w./*-]+", path) or folder not in FOLDERS:
        return
    if not any(ROOT.glob(path)):
        yield f"there is no file {path}"


FOLDERS = ("actors", "deploy", "docs", "learner", "replay", "services", "tests", ".ci")


def check_python(source: str) -> Iterator[str]:
    """Yield imports that do not resolve.

    Raises:
        SyntaxError: the source does not compile.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"there is no module {alias.name}" for alias in node.names if not find_module(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.module:
            if not find_module(node.module):
                yield f"there is no module {node.module}"
            elif node.module.partition(".")[0] in OURS:
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name) and not find_module(f"{node.module}.{alias.name}"):
                        yield f"there is no {alias.name} in {node.module}"
