"""`squall serve`, `squall gateway`: serve a checkpoint's policy, or all runs of a store, over gRPC."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TextIO

from services.cli.arguments import Commands, add_server_arguments, server_config
from services.cli.output import print_result


def add_to(commands: Commands) -> None:
    """Add the commands and their arguments."""
    serve = commands.add(
        "serve",
        _serve,
        "serve a policy over gRPC",
        "Serve the policy of a checkpoint over gRPC until interrupted. To serve the newest weights of a live run, "
        "start the run with `squall train --serve`.",
    )
    serve.add_argument("run", help="name of a run, or path of a .ckpt file")
    serve.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="checkpoint of the run; default: best"
    )
    add_server_arguments(serve)

    gateway = commands.add(
        "gateway",
        _gateway,
        "serve all runs on one gRPC port",
        "Serve all runs of a store on one gRPC port: list, watch, scale, and stop runs, and use the policies and "
        "experience sessions of runs that were started with --serve.",
    )
    add_server_arguments(gateway)


def _serve(parsed: argparse.Namespace, out: TextIO) -> int:
    from services.cli.checkpoint_server import serve_checkpoint

    def announce(address: str, checkpoint: Path) -> None:
        payload = {"run": parsed.run, "address": address, "checkpoint": str(checkpoint)}
        print_result(out, parsed.json, payload, f"serving {checkpoint} on {address}")
        out.flush()

    serve_checkpoint(parsed.run, parsed.checkpoint, server_config(parsed), announce, parsed.store)
    return 0


def _gateway(parsed: argparse.Namespace, out: TextIO) -> int:
    from services.rpc.gateway import serve_gateway

    def announce(address: str) -> None:
        print_result(out, parsed.json, {"address": address}, f"gateway on {address}")
        out.flush()

    serve_gateway(server_config(parsed), announce, parsed.store)
    return 0
