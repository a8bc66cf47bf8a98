"""`squall scale`, `squall stop`: send commands to a live run through the store."""

from __future__ import annotations

import argparse
from typing import TextIO

from services.cli.arguments import Commands, count_or_auto
from services.cli.output import print_result


def add_to(commands: Commands) -> None:
    """Add the commands and their arguments."""
    scale = commands.add(
        "scale",
        _scale,
        "change the number of rollout workers",
        "Change the number of a live run's rollout workers. Before a worker leaves, it sends its unsent experience.",
    )
    scale.add_argument("run", help="name of the run")
    scale.add_argument(
        "--actors", type=count_or_auto, required=True, metavar="N", help="number of rollout workers, or auto"
    )

    stop = commands.add("stop", _stop, "end a run", "Write a checkpoint, and end the run.")
    stop.add_argument("run", help="name of the run")


def _scale(parsed: argparse.Namespace, out: TextIO) -> int:
    from replay.errors import ConfigurationError
    from services.store import remote_control
    from services.store.locate import open_default_store

    if parsed.actors != "auto" and parsed.actors < 0:
        raise ConfigurationError(f"actors must not be negative, got {parsed.actors}")
    with open_default_store(parsed.store) as store:
        answer = remote_control.command(store, parsed.run, "scale", {"actors": parsed.actors})
    now = "as many as the learner needs" if answer.get("auto") else answer["actors"]
    text = f"run {parsed.run}: {answer['before']} workers, now {now}"
    return print_result(out, parsed.json, {"run": parsed.run, **answer}, text)


def _stop(parsed: argparse.Namespace, out: TextIO) -> int:
    from services.store import remote_control
    from services.store.locate import open_default_store

    with open_default_store(parsed.store) as store:
        answer = remote_control.command(store, parsed.run, "stop")
    return print_result(out, parsed.json, {"run": parsed.run, **answer}, f"run {parsed.run} is stopping")
