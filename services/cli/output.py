"""Output of commands: standard output belongs to the result, everything else goes to standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

_PIPE_WIDTH = 200


@contextmanager
def clean_stdout() -> Iterator[TextIO]:
    """Yield the real standard output, and send whatever else is printed there to standard error.

    Ray's own processes print on standard output too, so the file descriptor itself is redirected.
    """
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    out = os.fdopen(saved, "w")
    try:
        yield out
    finally:
        out.flush()
        sys.stdout.flush()
        os.dup2(saved, 1)
        out.close()


def print_result(out: TextIO, as_json: bool, payload: Any, renderable: Any) -> int:
    """Print a command's result, as JSON or for people, and return exit status 0.

    Args:
        out: standard output.
        as_json: whether to print `payload` as one line of JSON, or `renderable` as Rich renders it.
        payload: plain values; NaN and infinities become null.
        renderable: text, or a Rich renderable.
    """
    if as_json:
        from services.store.payloads import plain_payload

        print(json.dumps(plain_payload("answer", {"": payload})[""], allow_nan=False), file=out)
    else:
        from rich.console import Console

        width = None if out.isatty() else _PIPE_WIDTH  # wide, because the next command cannot use a truncated name
        Console(file=out, highlight=False, markup=False, width=width).print(renderable)
    return 0
