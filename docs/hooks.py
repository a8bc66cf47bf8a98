"""MkDocs hooks: fill in the reference pages from the command-line parser and the configuration models.

A page names what it wants with a comment on a line of its own, such as `<!-- generated: command line -->`.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

BASES = {"Algorithm": "All algorithms", "OffPolicyAlgorithm": "Replay", "OnPolicyAlgorithm": "On-policy"}
"""Headings of the classes that are no algorithms themselves."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page's Markdown with its generated parts; MkDocs calls this function for every page."""
    parts: dict[str, Callable[..., str]] = {
        "command line": command_line,
        "configuration": configuration,
        "results": results,
    }
    return re.sub(
        r"^<!-- generated: (command line|configuration|results) ?(\S*) -->$",
        lambda match: parts[match[1]](*match[2].split()),
        markdown,
        flags=re.MULTILINE,
    )


def results(algorithm: str) -> str:
    """Return the rows of an algorithm in docs/results.md, with the headings of their table."""
    rows = [line for line in (Path(__file__).parent / "results.md").read_text().splitlines() if line.startswith("| ")]
    first = next(index for index, row in enumerate(rows) if row.startswith("| row |"))
    return "\n".join([*rows[first : first + 2], *(row for row in rows if row.startswith(f"| {algorithm}-"))])


def table(*rows: Sequence[str]) -> str:
    """Return rows as a Markdown table; the first row holds the headings."""
    lines = [[cell.replace("|", r"\|") for cell in row] for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def command_line() -> str:
    """Return a section for each command, with all its arguments."""
    from services.cli.main import build_parser

    rows = {
        f"squall {name}": [(f"`{spelling(action)}`", action.help or "") for action in parser._actions]
        for name, parser in commands(build_parser()).items()
    }
    texts = {f"squall {name}": parser.description for name, parser in commands(build_parser()).items()}
    common = [row for row in next(iter(rows.values())) if all(row in of_command for of_command in rows.values())]
    parts = ["## Every command", "All commands take these arguments:", table(("argument", "meaning"), *common)]
    for name, of_command in rows.items():
        own = [row for row in of_command if row not in common]
        parts += [f"## {name}", texts[name] or "", *([table(("argument", "meaning"), *own)] if own else [])]
    return "\n\n".join(parts)


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the commands, by name."""
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(subparsers.choices)


def spelling(action: argparse.Action) -> str:
    """Return an argument as a person types it, such as `--actors N`."""
    value = str(action.metavar or (f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest))
    if not action.option_strings:
        return value
    options = ", ".join(action.option_strings)
    if action.nargs == 0:
        return options
    return f"{options} [{value}]" if action.nargs == "?" else f"{options} {value}"


def configuration() -> str:
    """Return the keys of a run, and the hyper-parameters and presets of each algorithm."""
    from learner.algorithms import ALGORITHMS, Algorithm
    from services.cli.main import build_parser
    from services.config import RunConfig

    options = [action for action in commands(build_parser())["train"]._actions if action.option_strings]
    flags = {action.dest: f"`{action.option_strings[-1]}`" for action in options}
    keys = [
        (f"`{key}`", kind(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation),
         value(field.get_default()), flags.get(key, ""), field.description or "")
        for key, field in RunConfig.model_fields.items() if not field.is_required() and key != "hyperparameters"
    ]  # fmt: skip
    parts = ["## Keys of a run", table(("key", "type", "default", "flag", "meaning"), *keys), "## Hyper-parameters"]
    lines = {
        owner: [base for base in owner.__mro__ if issubclass(base, Algorithm)]
        for algorithm in ALGORITHMS.values()
        for owner in reversed(algorithm.__mro__)
        if issubclass(owner, Algorithm)
    }
    for owner in sorted(lines, key=lambda owner: owner in ALGORITHMS.values()):
        parts += hyperparameters(owner, lines[owner], flags)
    return "\n\n".join(parts)


def hyperparameters(owner: Any, line: Sequence[Any], flags: Mapping[str, str]) -> list[str]:
    """Return the section of an algorithm or a base class: the parameters that differ from those of its base classes."""
    inherited = [(name, p.default) for base in line[1:] for name, p in base.hyperparameter_types().items()]
    texts = [inspect.cleandoc(base.__init__.__doc__) for base in reversed(line) if "__init__" in vars(base)]
    meanings: dict[str, str] = {}
    for text in texts:
        meanings |= mentions(text)
    for text in texts:
        meanings |= arguments(text)
    rows = [
        (f"`{name}`", kind(p.annotation), value(p.default), flags.get(name, ""), meanings.get(name, ""))
        for name, p in owner.hyperparameter_types().items()
        if (name, p.default) not in inherited and name != "seed"  # the run sets the seed
    ]
    parts = [f"### {heading(owner)}"]
    if line[1:]:
        links = ", ".join(f"[{heading(base)}](#{heading(base).lower().replace(' ', '-')})" for base in line[1:])
        parts.append(f"`{owner.__name__}` also has the keys of: {links}.")
    parts += [table(("key", "type", "default", "flag", "meaning"), *rows)] if rows else []
    return parts + (presets(owner.name) if heading(owner) not in BASES.values() else [])


def heading(owner: Any) -> str:
    """Return the heading of an algorithm's or a base class's section."""
    return BASES.get(owner.__name__) or str(owner.name)


def presets(algorithm: str) -> list[str]:
    """Return the presets of an algorithm as a table with a column for each environment."""
    file = yaml.safe_load((resources.files("learner.presets") / f"{algorithm}.yaml").read_text())
    base = file.pop("inherits", None)
    columns = {
        environment: {**preset.get("run", {}), **preset.get("hyperparameters", {})}
        for environment, preset in file.items()
    }
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    rows = [(f"`{key}`", *(value(column[key]) if key in column else "" for column in columns.values())) for key in keys]
    where = f"`learner/presets/{algorithm}.yaml`"
    if base:
        parts = [f"Presets: those of [{base}](#{base}){f'; {where} changes:' if rows else '.'}"]
    else:
        parts = [f"Presets, in {where}:"]
    return parts + ([table(("key", *(f"`{name}`" for name in columns)), *rows)] if rows else [])


def arguments(docstring: str) -> dict[str, str]:
    """Return the entries of a docstring's Args section, by name."""
    section = re.search(r"^Args:\n((?: .*\n|\n)+)", docstring + "\n", re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section[1], re.MULTILINE) if section else []
    return {name: " ".join(text.split()).rstrip(".") for name, text in entries}


def mentions(docstring: str) -> dict[str, str]:
    """Return the first sentence of a docstring's text that names an argument, by name."""
    text = re.split(r"^(?:Args|Raises):", docstring, maxsplit=1, flags=re.MULTILINE)[0]
    sentences = re.split(r"(?<=[.])\s", " ".join(text.split()))
    return {name: said.rstrip(".") for said in reversed(sentences) for name in re.findall(r"`(\w+)`", said)}


def kind(annotation: Any) -> str:
    """Return a type in words, with its bounds."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        signs = {"gt": "> ", "ge": "≥ ", "lt": "< ", "le": "≤ "}
        bounds = [f"{sign}{bound:g}" for part in inner[1:] for name, sign in signs.items()
                  if (bound := getattr(part, name, None)) is not None]  # fmt: skip
        return ", ".join([kind(inner[0]), *bounds])
    if origin in (Union, UnionType):
        return " or ".join(map(kind, inner))
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in inner)
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return "mapping" if issubclass(origin, Mapping) else f"list of {kind(inner[0])}"
    return "null" if annotation is NoneType else getattr(annotation, "__name__", str(annotation))


def value(given: Any) -> str:
    """Return a value as `--set` takes it."""
    return f"`{yaml.safe_dump(given, default_flow_style=True, width=1000).removesuffix('...' + chr(10)).strip()}`"
