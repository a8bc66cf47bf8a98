"""The pages of the documentation: links, navigation, generated references, files that are named, and words."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import PositiveInt

from docs import hooks
from learner.algorithms import ALGORITHMS, Algorithm
from services.cli.main import build_parser
from services.config import RUN_KEYS
from tests.docs.blocks import PAGES, ROOT
from tests.docs.checks import check_file
from tests.test_words import RETIRED

DOCS = ROOT / "docs"
JSON_KEYS = ("last_word",)
"""Retired identifiers that stay as keys of the JSON that users read."""

MOVED = ("services/squall.proto",)
"""Files that docs/upgrade.md names by the path that they had."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """Return a page's text without its fenced blocks."""
    return re.sub(r"^([ \t]*)(```+|~~~+).*?^\1\2[ \t]*$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def code(page: Path) -> list[str]:
    """Return the pieces of inline code in a page's prose."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ +(.*?)\s*$", hooks.on_page_markdown(prose(page)), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pages
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{target}: there is no such file"
        assert not anchor or anchor in anchors(path), f"{target}: there is no such heading"


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    words = [word for piece in code(page) for word in piece.split() if re.search(r"\.\w+$|/$", word)]
    assert [wrong for word in words if word not in MOVED for wrong in check_file(word)] == []


@pages
def test_no_retired_identifier_is_named(page: Path) -> None:
    named = {name for piece in code(page) for name in re.findall(r"[A-Za-z_]\w*", piece)}
    assert named & RETIRED.keys() - set(JSON_KEYS) == set()


@pages
def test_a_page_begins_with_a_title_and_a_sentence(page: Path) -> None:
    title, _, rest = page.read_text().partition("\n")
    assert title.startswith("# ")
    assert re.match(r"\s*(?!```|<!--|!)[^\s#|-]", rest), "the first thing after the title should be a sentence"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_figures_of_the_readme_are_those_of_the_benchmarks() -> None:
    rows = [
        row.strip("| ").split(" | ") for row in (ROOT / "README.md").read_text().splitlines() if "`make bench" in row
    ]
    measured = [numbers(row) for row in (DOCS / "performance.md").read_text().splitlines() if row.startswith("| ")]
    assert len(rows) == 3
    for row in rows:
        figures = numbers(" | ".join(cell.partition(" ")[0] for cell in row[1:4]))
        assert len(figures) == 3
        assert any(figures == found[:3] for found in measured), f"{row[0]}: write it again, from docs/performance.md"


def numbers(row: str) -> list[float]:
    """Return the cells of a table's row that are numbers."""
    cells = (cell.strip().replace(",", "") for cell in row.split("|"))
    return [float(cell) for cell in cells if re.fullmatch(r"[\d.]+(e[+-]\d+)?", cell)]


def test_every_page_is_in_the_navigation_once() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = list(files_in(nav))
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS))


def files_in(nav: Any) -> Iterator[str]:
    """Yield the files of a navigation."""
    if isinstance(nav, str):
        yield nav
    for item in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from files_in(item)


# Generated references


def test_every_command_and_every_flag_is_in_the_reference() -> None:
    page = hooks.on_page_markdown((DOCS / "cli.md").read_text())
    assert "<!-- generated" not in page
    sections = dict(part.partition("\n")[::2] for part in page.split("\n## "))
    for name, parser in hooks.commands(build_parser()).items():
        section = sections["Every command"] + sections[f"squall {name}"]
        for action in parser._actions:
            for word in action.option_strings or [action.metavar or action.dest]:
                assert re.search(rf"[` ]{re.escape(str(word))}[`, ]", section), f"squall {name}: {word}"


def test_every_key_is_in_the_reference() -> None:
    page = hooks.on_page_markdown((DOCS / "configuration.md").read_text())
    assert "<!-- generated" not in page
    parts = page.split("\n## ")
    run = next(part for part in parts if part.startswith("Keys of a run"))
    assert [key for key in RUN_KEYS if f"| `{key}` |" not in run] == []
    sections = dict(part.partition("\n")[::2] for part in page.split("\n### "))
    for name, algorithm in ALGORITHMS.items():
        inherited = [sections[hooks.heading(base)] for base in algorithm.__mro__ if issubclass(base, Algorithm)]
        missing = [key for key in algorithm.hyperparameter_types() if f"| `{key}` |" not in "".join(inherited)]
        assert missing in ([], ["seed"]), name


def test_every_key_has_a_meaning() -> None:
    tables = [part for part in hooks.configuration().split("\n\n") if part.startswith("| key | type |")]
    rows = [row for part in tables for row in part.splitlines()]
    assert len(rows) > 70
    assert [row for row in rows if row.endswith("|  |")] == []


def test_each_algorithm_has_a_page() -> None:
    assert {page.stem for page in (DOCS / "algorithms").glob("*.md")} == {"index", *ALGORITHMS}


def test_values_and_types_in_words() -> None:
    assert hooks.value({"a": [1, None]}) == "`{a: [1, null]}`"
    assert hooks.value(1e-4) == "`0.0001`"
    assert hooks.kind(PositiveInt) == "int, > 0"
    assert hooks.kind(list[int] | None) == "list of int or null"
    docstring = (
        "A.\n\n`c` is a letter. So is `d`.\n\nArgs:\n    a: one\n        two.\n    b: three.\n\nRaises:\n    E: f."
    )
    assert hooks.arguments(docstring) == {"a": "one two", "b": "three"}
    assert hooks.mentions(docstring) == {"c": "`c` is a letter", "d": "So is `d`"}


# The site

OFFLINE = "http://127.0.0.1:1"
"""A proxy that is not there."""


class Loads(HTMLParser):
    """Collects the addresses that a browser loads with a page by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: text or "" for name, text in attributes}
        if tag in ("script", "img", "iframe", "source", "video"):
            self.addresses.append(given.get("src", ""))
        elif tag == "link" and given.get("rel") != "canonical":
            self.addresses.append(given.get("href", ""))


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="make docs installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {
        **os.environ,
        "NO_MKDOCS_2_WARNING": "1",
        "no_proxy": "",
        "http_proxy": OFFLINE,
        "https_proxy": OFFLINE,
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    built = list((tmp_path / "site").rglob("*.html"))
    assert len(built) > 30
    for file in built:
        page = Loads()
        page.feed(file.read_text())
        assert [address for address in page.addresses if re.match(r"(\w+:)?//", address)] == [], file
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", sheet.read_text()), sheet
