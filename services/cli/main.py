"""Entry point of the command line: parses arguments, runs a command, and turns its errors into exit statuses."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from services.cli import control, doctor, evaluate, inspect, plot, serve, submit, train
from services.cli.arguments import Commands
from services.cli.installation import hidden_packages
from services.cli.output import clean_stdout

DESCRIPTION = """\
Train reinforcement-learning agents with many rollout workers, a replay server, and one learner.

  squall train dqn CartPole-v1                       train with the preset for that environment
  squall train dqn PongNoFrameskip-v4 --actors 8 --envs-per-actor 4
  squall train dqn CartPole-v1 --set learning_rate=0.001 --set hidden_sizes=[64,64]
  squall train dqn CartPole-v1 --stop-at-return 475  end as soon as an evaluation reaches that return
  squall train --resume dqn-CartPole-v1-1            continue a run that ended or was lost
  squall runs                                        list runs
  squall status dqn-CartPole-v1-1                    show a run, process by process
  squall watch dqn-CartPole-v1-1                     show a live run continuously
  squall scale dqn-CartPole-v1-1 --actors 8          change the number of rollout workers while it runs
  squall stop dqn-CartPole-v1-1                      write a checkpoint, and end the run
  squall evaluate dqn-CartPole-v1-1                  play greedy episodes with its best weights
  squall evaluate dqn-CartPole-v1-1 --video play.mp4 record the episodes as a video
  squall plot dqn-CartPole-v1-1                      draw its learning curve
  squall serve dqn-CartPole-v1-1                     serve its policy over gRPC
  squall gateway --address 127.0.0.1:50051           serve all runs of a store on one gRPC port
  squall doctor                                      check this machine, the store, and the cluster
  squall submit -- train dqn CartPole-v1             run a command on a cluster, and follow its log

Runs are stored in SQUALL_HOME (default: ./runs). To see runs from several machines, set --store or SQUALL_STORE to the
URL of a Redis server. With --json a command prints one JSON document on standard output and nothing else. Progress is
printed on standard error."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    if hidden := hidden_packages():
        print(f"squall: {hidden}", file=sys.stderr)
        return 2
    parsed = build_parser().parse_args(arguments)
    with clean_stdout() as out:
        try:
            status: int = parsed.command(parsed, out)
            return status
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            from replay.errors import SquallError

            if not isinstance(error, SquallError):
                raise
            print(f"squall: {error}", file=sys.stderr)
            return error.exit_status


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="squall",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"squall {version('squall')}")
    commands = Commands(parser)
    for module in (train, evaluate, inspect, control, serve, plot, doctor, submit):
        module.add_to(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
