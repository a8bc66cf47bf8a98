"""`squall doctor`: check this machine, the store, and the cluster."""

from __future__ import annotations

import argparse
from typing import TextIO

from services.cli.arguments import Commands
from services.cli.output import print_result


def add_to(commands: Commands) -> None:
    """Add the command."""
    commands.add(
        "doctor",
        _doctor,
        "check this machine and the cluster",
        "Check this machine, the run store, and every node of the cluster (RAY_ADDRESS, or a local Ray): installation, "
        "versions, processors, memory, /dev/shm, GPU, ALE, ports, and clocks. The exit status is 1 if a problem "
        "prevents Squall from working.",
    )


def _doctor(parsed: argparse.Namespace, out: TextIO) -> int:
    from services.supervision.ray_environment import set_ray_defaults

    set_ray_defaults()
    from dataclasses import asdict

    from services.cli import machine_checks
    from services.cli.display import render_findings

    findings = machine_checks.check_all(parsed.store)
    print_result(out, parsed.json, [asdict(finding) for finding in findings], render_findings(findings))
    return int(any(finding.verdict == machine_checks.PROBLEM for finding in findings))
