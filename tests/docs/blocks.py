"""The fenced blocks of README.md and docs/, and the commands in those that hold shell lines.

A comment directly before a block says how it is tested:

    <!-- test: run -->            run it; the default for shell and Python blocks
    <!-- test: check REASON -->   only check it: its flags, targets, modules, and files; a reason is one of `REASONS`
    <!-- test: output -->         not tested; so is a block of the language `text`
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
SHELL = ("console", "bash", "sh")
LANGUAGES = (*SHELL, "python", "yaml", "json", "toml", "text")
REASONS = ("cluster", "gpu", "hours", "server", "install")
MARKERS = ("run", "output", *(f"check {reason}" for reason in REASONS))

_BLOCK = re.compile(
    r"(?:^[ \t]*<!-- test: (?P<marker>.*?) -->[ \t]*\n\s*?)?"
    r"^(?P<indent>[ \t]*)(?P<fence>```+|~~~+)[ \t]*(?P<language>\S*)[^\n]*\n(?P<text>.*?)^(?P=indent)(?P=fence)[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
_HEREDOC = re.compile(r"<<-?\s*['\"]?(\w+)['\"]?.*?^\s*\1$", re.MULTILINE | re.DOTALL)
_REDIRECTION = re.compile(r"(?<!\S)\d?[<>]{1,2}(&\d|\s*[^\s<>&|;]+)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: path of its page, relative to the repository's root.
        line: line of the opening fence.
        language: the language after the fence.
        mode: `run`, `check`, or `output`.
        reason: why it is not run, of `REASONS`; else empty.
        text: its content, without indentation and prompts.
        problem: what is wrong with its marker or its language; else empty.
    """

    page: str
    line: int
    language: str
    mode: str
    reason: str
    text: str
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str, content: str) -> Iterator[Block]:
    """Yield the blocks of a page's Markdown."""
    for match in _BLOCK.finditer(content):
        line = content.count("\n", 0, match.start("fence")) + 1
        language, marker = match["language"], match["marker"]
        default = "run" if language in (*SHELL, "python") else "output" if language == "text" else "check"
        mode, _, reason = (marker or default).partition(" ")
        text = textwrap.dedent(match["text"])
        problem = ""
        if marker is not None and marker not in MARKERS:
            problem = f"the marker {marker!r} is none of: {', '.join(MARKERS)}"
        elif language not in LANGUAGES and mode != "output":
            problem = f"the language {language!r} is none of {', '.join(LANGUAGES)}, so nothing would test the block"
        yield Block(page, line, language, mode, reason, without_prompts(text) if language in SHELL else text, problem)


def without_prompts(text: str) -> str:
    """Return the commands of a session, without prompts and output; a text without prompts is returned as it is."""
    lines = text.splitlines()
    if not any(line.startswith("$ ") for line in lines):
        return text
    kept: list[str] = []
    for line in lines:
        if line.startswith("$ "):
            kept.append(line[2:])
        elif kept and kept[-1].endswith("\\"):
            kept.append(line.removeprefix("> "))
    return "\n".join(kept) + "\n"


def commands_of(text: str) -> Iterator[list[str]]:
    """Yield the words of each command in shell lines, without assignments in front, redirections, and comments."""
    pending = ""
    for line in _HEREDOC.sub("", text.replace("\\\n", " ")).splitlines():
        pending += f"{line}\n"
        lexer = shlex.shlex(_REDIRECTION.sub("", pending), posix=True, punctuation_chars="();|&")
        lexer.whitespace_split = True
        try:
            words = [*lexer, ";"]
        except ValueError:  # a quotation that goes on in the next line
            continue
        pending = ""
        command: list[str] = []
        for word in words:
            if word and set(word) <= set("();|&"):
                if command := _without_prefixes(command):
                    yield command
                command = []
            else:
                command.append(word)
    if pending:
        raise ValueError(f"a quotation does not end: {pending!r}")


def _without_prefixes(words: list[str]) -> list[str]:
    while words and (re.match(r"\w+=", words[0]) or words[0] in ("nohup", "time", "exec", "sudo", "then", "do", "!")):
        words = words[1:]
    return words
