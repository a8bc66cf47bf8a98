"""Arguments that several commands share, and how a command is added to the parser."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from services.rpc.auth import ServerConfig

Command = Callable[[argparse.Namespace, TextIO], int]
"""Function that runs a command with the parsed arguments and standard output, and returns the exit status."""


class CommandParser(argparse.ArgumentParser):
    """A parser that reports unknown arguments with its own command's usage; argparse shows that of all commands."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all arguments, or end the program with this command's usage."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown


class Commands:
    """The commands of the parser."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        """Add commands to `parser`."""
        self._subparsers = parser.add_subparsers(
            title="commands", required=True, metavar="COMMAND", parser_class=CommandParser
        )
        self._common = _common_arguments()

    def add(self, name: str, command: Command, summary: str, description: str) -> argparse.ArgumentParser:
        """Add a command and return its parser.

        Args:
            name: name of the command, as users type it.
            command: runs the command.
            summary: a few words for the list of commands.
            description: one or more sentences for the command's own help.
        """
        parser = self._subparsers.add_parser(
            name, help=summary, description=description, allow_abbrev=False, parents=[self._common]
        )
        parser.set_defaults(command=command)
        return parser


def _common_arguments() -> CommandParser:
    parser = CommandParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    parser.add_argument(
        "--store",
        metavar="URL",
        help="run store: redis://host:port/db, rediss://... (TLS), unix:///path/to/socket, or sqlite:///file.db; "
        "default: SQUALL_STORE, or a file in SQUALL_HOME. Set a password in SQUALL_STORE, because other users of the "
        "machine can read a command line",
    )
    return parser


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a gRPC server; `server_config` reads them."""
    parser.add_argument(
        "--address",
        default="127.0.0.1:50051",
        metavar="HOST:PORT",
        help="address to listen on; default: 127.0.0.1:50051. An address other than loopback needs a token. Port 0 "
        "selects a free port",
    )
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file with the token that callers must send; default: SQUALL_GRPC_TOKEN",
    )
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="PEM certificate chain; enables TLS")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM private key of the certificate")


def server_config(parsed: argparse.Namespace) -> ServerConfig:
    """Return the gRPC server's configuration from parsed arguments."""
    from services.rpc.auth import ServerConfig, read_token

    return ServerConfig(parsed.address, read_token(parsed.token_file), parsed.tls_cert, parsed.tls_key)


def count(text: str) -> int:
    """Return a whole number, which may be written 1e6 or 1_000_000."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number.is_integer():
        raise argparse.ArgumentTypeError(f"takes a whole number, got {text}")
    return int(number)


def count_or_auto(text: str) -> int | str:
    """Return a whole number, or `auto` unchanged."""
    return text if text == "auto" else count(text)
