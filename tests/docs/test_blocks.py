"""Every fenced block of README.md and docs/ works: it is run, or its commands and imports are checked.

The markers are described in `tests.docs.blocks`.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, ROOT, SHELL, Block, blocks_of
from tests.docs.checks import complaints

BLOCKS = [block for page in PAGES for block in blocks_of(str(page.relative_to(ROOT)), page.read_text())]
RUN = [page for page in dict.fromkeys(block.page for block in BLOCKS if block.mode == "run")]
SECONDS = 300

# Neighboring Python blocks run in one process, which imports the libraries once; each has names of its own.
EACH = "import sys\nfor text in sys.argv[1:]: exec(compile(text, '<block>', 'exec'), {'__name__': '__main__'})"


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block(block: Block) -> None:
    wrong = complaints(block)
    assert not wrong, f"{block}: {'; '.join(wrong)}"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3 * SECONDS)
@pytest.mark.parametrize("page", RUN)
def test_the_blocks_of_a_page_run_in_order(page: str, tmp_path: Path) -> None:
    programs, folder = tmp_path / "bin", tmp_path / "page"
    programs.mkdir()
    folder.mkdir()
    (programs / "squall").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m squall "$@"\n')
    (programs / "squall").chmod(0o755)
    environment = {
        **{name: text for name, text in os.environ.items() if not name.startswith(("SQUALL_", "RAY_", "PYTEST_"))},
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "SQUALL_HOME": str(folder / "runs"),
    }
    own = [block for block in BLOCKS if block.page == page and block.mode == "run"]
    for shell, group in itertools.groupby(own, lambda block: block.language in SHELL):
        blocks = list(group)
        texts = [block.text for block in blocks]
        command = (
            ["bash", "-euo", "pipefail", "-c", "\n".join(texts)] if shell else [sys.executable, "-c", EACH, *texts]
        )
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, f"{blocks[0]} or one after it ended with {done.returncode}:\n{done.stdout[-4000:]}"


# The checks find what they are for.


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("squall train dqn CartPole-v1 --actor 2", "unrecognized arguments: --actor 2"),
        ("$ SQUALL_HOME=/srv nohup squall trian dqn CartPole-v1 &", "invalid choice: 'trian'"),
        ("squall runs --store redis://head:6379/0 | squall watch --events 3 mine  # both", "--events 3"),
        ("squall train dqnn CartPole-v1", "unknown algorithm 'dqnn'"),
        ("squall train dqn CartPole-v1 --set learning_rat=1", "unknown key 'learning_rat'"),
        ("squall submit -- train dqn CartPole-v1 --stepps 5", "--stepps 5"),
        ("ray job submit --working-dir . -- squall train dqn CartPole-v1 --stepps 5", "--stepps 5"),
        ("docker compose exec ray-head squall scale mine --actor 8", "--actors"),
        ("kubectl exec head -- squall stopp mine", "invalid choice: 'stopp'"),
        ("python -m squall statsu mine", "invalid choice: 'statsu'"),
        ("squall train dqn \\\n    CartPole-v1 \\\n    --typo", "--typo"),
        ("make trian", "no target trian"),
        ("make train SEDE=1", "does not use SEDE"),
        ('make train ARGS="--actor 4"', "--actor 4"),
        ("python -m tests.benchmark.act", "no module tests.benchmark.act"),
        ("pip install 'squall[clusters]'", "no extra clusters"),
        ("docker compose -f docker-compose.yml -f deploy/compose.cude.yml up", "no file deploy/compose.cude.yml"),
        ("cd deploy/example && ls", "no file deploy/example"),
    ],
)
def test_a_wrong_command_is_found(line: str, complaint: str) -> None:
    (block,) = blocks_of("page.md", f"<!-- test: check server -->\n```console\n{line}\n```\n")
    assert any(complaint in wrong for wrong in complaints(block)), complaints(block)


@pytest.mark.parametrize(
    "line",
    [
        "squall train dqn CartPole-v1 --set 'optimizer_options={\"eps\": 0.00015}' > log.txt 2>&1 &",
        "(cd runs && squall runs --json)",
        "squall --version; squall watch --help",
        "squall submit --address http://127.0.0.1:8265 -- train --resume mine --steps 1e6",
        'make train SEED=1 ARGS="--actors 4"',
        "set -a; . ./.env; set +a",
        "cat > my_module.py <<'EOF'\nimport nothing\nsquall typo\nEOF\nsquall runs",
        "$ squall runs\nrun        state\nsquall typo",
        "pip install -e '.[dev,cluster]'",
        "cd squall",
    ],
)
def test_a_right_command_is_let_pass(line: str) -> None:
    (block,) = blocks_of("page.md", f"<!-- test: check hours -->\n```sh\n{line}\n```\n")
    assert complaints(block) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```\nsquall runs\n```", "the language '' is none of"),
        ("```js\nlet a\n```", "the language 'js' is none of"),
        ("<!-- test: check later -->\n```sh\nls\n```", "the marker 'check later' is none of"),
        ("<!-- test: skip -->\n```sh\nls\n```", "the marker 'skip' is none of"),
        ("```yaml\na: [1\n```", "ParserError"),
        ("```python\nfrom squall import PPO\n```", "there is no PPO in squall"),
        ("```python\nimport services.clients\n```", "there is no module services.clients"),
        ("- a list\n\n    ```python\n    if:\n    ```\n", "SyntaxError"),
        ("```sh\necho 'no end\n```", "a quotation does not end"),
    ],
)
def test_a_wrong_block_is_found(text: str, complaint: str) -> None:
    (block,) = blocks_of("page.md", text + "\n")
    assert any(complaint in wrong for wrong in complaints(block)), complaints(block)


def test_modes_and_lines_of_blocks() -> None:
    page = (
        "# A\n\n```python\n1\n```\n\n<!-- test: output -->\n```js\nx\n```\n\n<!-- test: check gpu -->\n```sh\nls\n```\n"
    )
    page += "\n    ```yaml\n    a: 1\n    ```\n\n```text\nx\n```\n"
    found = [(block.line, block.language, block.mode, block.reason, block.problem) for block in blocks_of("a", page)]
    assert found == [
        (3, "python", "run", "", ""),
        (8, "js", "output", "", ""),
        (13, "sh", "check", "gpu", ""),
        (17, "yaml", "check", "", ""),
        (21, "text", "output", "", ""),
    ]
