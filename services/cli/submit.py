"""`squall submit`: run a command as a job on a Ray cluster."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TextIO

from services.cli.arguments import Commands
from services.cli.output import print_result


def add_to(commands: Commands) -> None:
    """Add the command and its arguments."""
    parser = commands.add(
        "submit",
        _submit,
        "run a command on a cluster",
        "Upload a folder to a cluster's job server, run a squall command in this folder on the cluster, and follow the "
        "log. The exit status is that of the command. The token comes from RAY_AUTH_MODE and RAY_AUTH_TOKEN, or from "
        ".env in the current folder.",
    )
    parser.add_argument(
        "--address", metavar="URL", help="job server; default: RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265"
    )
    parser.add_argument(
        "--working-dir", type=Path, default=Path(), metavar="DIR", help="folder to upload; default: the current folder"
    )
    parser.add_argument("--env-file", type=Path, metavar="FILE", help="file with the token; default: .env")
    parser.add_argument(
        "--follow",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="follow the log until the job ends; default: --follow",
    )
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="-- ...",
        help="squall command, such as: -- train dqn CartPole-v1",
    )


def _submit(parsed: argparse.Namespace, out: TextIO) -> int:
    from dataclasses import asdict

    from replay.errors import ConfigurationError
    from services.cli.job_server import JobServer
    from services.cli.main import build_parser

    command = parsed.arguments[1:] if parsed.arguments[:1] == ["--"] else parsed.arguments
    if not command or command[0] == "submit":
        raise ConfigurationError("name the command to run, such as: squall submit -- train dqn CartPole-v1")
    build_parser().parse_args(command)  # reports bad arguments before anything is submitted
    server = JobServer(parsed.address, parsed.env_file)
    job = server.submit(command, parsed.working_dir)
    print(f"submitted job {job.id} to {job.address}\n{job.advice}", file=sys.stderr, flush=True)
    if parsed.follow:
        log = sys.stderr if parsed.json else out
        try:
            job = server.follow(job, lambda text: print(text, end="", file=log, flush=True))
        except KeyboardInterrupt:
            print(
                f"squall: job {job.id} still runs; export the variables in {server.env_file}, then\n{job.advice}",
                file=sys.stderr,
            )
            return 130
        print(f"job {job.id}: {job.status}, exit status {job.exit_status}: {job.message}", file=sys.stderr)
    if parsed.json:
        print_result(out, True, asdict(job), "")
    return job.exit_status or 0
