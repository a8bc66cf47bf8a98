"""The command line. Imports what a command needs only when that command runs, so that help is quick."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

DESCRIPTION = """\
Train reinforcement-learning agents with many rollout workers, a replay server and one learner.

  squall train dqn CartPole-v1                 train, with the preset for that environment
  squall train dqn PongNoFrameskip-v4 --actors 8 --envs-per-actor 4
  squall train dqn CartPole-v1 --set learning_rate=0.001 --set hidden_sizes=[64,64]
  squall train dqn CartPole-v1 --stop-at-return 475  end as soon as an evaluation is that good
  squall train --resume dqn-CartPole-v1-1      go on where a run ended or was lost
  squall runs                                  list runs
  squall status dqn-CartPole-v1-1              what a run does, process by process
  squall watch dqn-CartPole-v1-1               the same, live
  squall scale dqn-CartPole-v1-1 --actors 8    more or fewer rollout workers, while it runs
  squall stop dqn-CartPole-v1-1                end it in order, with a checkpoint
  squall evaluate dqn-CartPole-v1-1            play greedy episodes with its best weights
  squall plot dqn-CartPole-v1-1                draw its learning curve
  squall evaluate dqn-CartPole-v1-1 --video play.mp4  and record them
  squall serve dqn-CartPole-v1-1               answer with its policy over gRPC
  squall gateway --address 127.0.0.1:50051     one gRPC port for all runs: control, and the policies of live ones
  squall doctor                                what is wrong with this machine, the store, the cluster
  squall submit -- train dqn CartPole-v1       run that on a cluster, and follow its log

Everything lies under SQUALL_HOME (default ./runs); --store or SQUALL_STORE names a Redis server that knows the runs
of several machines. With --json a command prints one JSON document on
standard output and nothing else; progress goes to standard error."""

_Command = Callable[[argparse.Namespace, TextIO], int]
_WIDTH_OF_A_PIPE = 200
_TRAIN_FLAGS = (
    "actors", "num_envs", "steps", "stop_at_return", "seed", "serve", "replay_shards", "learner_gpus", "cpus_per_actor",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    from services.rooms import hidden_rooms

    if hidden := hidden_rooms():
        print(f"squall: {hidden}", file=sys.stderr)
        return 2
    parsed = _parser().parse_args(arguments)
    with _clean_stdout() as out:
        try:
            status: int = parsed.command(parsed, out)
            return status
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            from replay.types import ConfigurationError, NotEnoughMemory, SquallError

            if not isinstance(error, SquallError):
                raise
            print(f"squall: {error}", file=sys.stderr)
            bad_input = (
                isinstance(error, ConfigurationError | NotEnoughMemory | LookupError) or "InUse" in type(error).__name__
            )
            return 2 if bad_input else 1


@contextmanager
def _clean_stdout() -> Iterator[TextIO]:
    """Yield the real standard output, and send whatever else is printed there to standard error.

    Ray prints on standard output, from its own processes too, so the file descriptor itself is moved.
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


class _CommandParser(argparse.ArgumentParser):
    """Says itself what it does not know, which argparse leaves to the parser of all commands and its usage."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all arguments, or end the program with this command's usage."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="squall",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"squall {version('squall')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_CommandParser)
    common = _common()

    def add(name: str, command: _Command, summary: str, description: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=summary, description=description, allow_abbrev=False, parents=[common])
        made.set_defaults(command=command)
        return made

    train = add("train", _train, "train an agent", "Train an agent, or resume a run.")
    train.add_argument("algorithm", nargs="?", help="such as dqn")
    train.add_argument("environment", nargs="?", help="Gymnasium id, or module:EnvId-v0 for one of your own")
    train.add_argument(
        "--actors",
        type=_count_or_auto,
        metavar="N",
        help="rollout workers; default the preset's, or 2; auto adds some while the learner waits for experience; 0 "
        "with --serve: all experience comes from outside",
    )
    train.add_argument("--replay-shards", type=_count, metavar="N", help="divide the replay among N processes; 1")
    train.add_argument(
        "--learner-gpus", type=_count_or_auto, metavar="N", help="0, 1, or auto: 1 where there is one; auto"
    )
    train.add_argument(
        "--cpus-per-actor",
        type=float,
        metavar="X",
        help="CPUs that Ray keeps for each worker, so that an autoscaled cluster grows; default 0: none",
    )
    train.add_argument(
        "--envs-per-actor", type=_count, metavar="N", dest="num_envs", help="environments in each worker (num_envs)"
    )
    train.add_argument("--steps", type=_count, metavar="N", help="environment steps, over all workers, such as 1e6")
    train.add_argument(
        "--stop-at-return",
        type=float,
        metavar="X",
        help="end early, in order and scored, as soon as a periodic evaluation's mean return is X or more",
    )
    train.add_argument("--seed", type=_count, metavar="N", help="from which all others are spawned; default 0")
    train.add_argument("--name", help="name of the run; chosen if left out")
    train.add_argument("--config", type=Path, metavar="FILE", help="YAML of run keys, as saved in every run's folder")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key; may be repeated")
    train.add_argument("--resume", metavar="RUN", help="go on from a run's last checkpoint")
    train.add_argument(
        "--serve",
        nargs="?",
        const="auto",
        metavar="HOST:PORT",
        help="serve the policy over gRPC while it trains; default a free port, of this machine's loopback, or in a Ray "
        "cluster (RAY_ADDRESS) of the node's own address, which needs a token in SQUALL_GRPC_TOKEN",
    )
    train.add_argument(
        "--show-config",
        action="store_true",
        help="check and print the resolved configuration, all keys of it, and stop",
    )

    evaluate = add("evaluate", _evaluate, "play greedy episodes", "Play greedy episodes.")
    evaluate.add_argument("run", help="a run's name, or the path of a .ckpt file")
    evaluate.add_argument("--episodes", type=int, default=20, metavar="N", help="default 20")
    evaluate.add_argument("--checkpoint", choices=("best", "last"), default="best", help="default best")
    evaluate.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, other episodes")
    evaluate.add_argument(
        "--video",
        type=Path,
        metavar="FILE.mp4",
        help="record these very episodes to one H.264 file, one after the other; a file that is there is replaced. "
        "At most 20,000 frames, shared evenly by the environments played at once (8, or as many as there are "
        "episodes); what goes beyond is played and scored, not recorded, and the command says so",
    )

    add("runs", _runs, "list runs", "List runs, newest first.")

    status = add("status", _status, "show what a run does", "Show what a run does.")
    status.add_argument("run", help="a run's name")
    status.add_argument("--events", type=int, default=10, metavar="N", help="how many of its last events; default 10")

    watch = add(
        "watch",
        _watch,
        "follow a run live",
        "Follow a run live, from any terminal. With --json: a document a line, one a second.",
    )
    watch.add_argument("run", help="a run's name")

    scale = add(
        "scale",
        _scale,
        "change the number of rollout workers",
        "Change the number of rollout workers of a run that is on. Who leaves sends what it has first.",
    )
    scale.add_argument("run", help="a run's name")
    scale.add_argument(
        "--actors", type=_count_or_auto, required=True, metavar="N", help="rollout workers there shall be, or auto"
    )

    stop = add("stop", _stop, "end a run in order", "End a run in order, with a checkpoint.")
    stop.add_argument("run", help="a run's name")

    serve = add(
        "serve",
        _serve,
        "answer with a policy over gRPC",
        "Serve the policy of a run's checkpoint, or of a file, over gRPC, until a signal. A live run serves its newest "
        "weights with `squall train --serve`.",
    )
    serve.add_argument("run", help="a run's name, or the path of a .ckpt file")
    serve.add_argument("--checkpoint", choices=("best", "last"), default="best", help="default best")
    _add_listening(serve)

    gateway = add(
        "gateway",
        _gateway,
        "one gRPC port for all runs",
        "Be the one gRPC port for all runs of a store: list, watch, scale and stop them, and reach the policies and "
        "sessions of those that train with --serve.",
    )
    _add_listening(gateway)

    plot = add(
        "plot",
        _plot,
        "draw learning curves",
        "Draw learning curves over environment steps. Runs that differ in nothing but the seed are one "
        "curve: the line is the mean of the seeds, the band goes from the lowest to the highest seed.",
    )
    plot.add_argument("runs", nargs="+", metavar="RUN", help="a run's name; 'LABEL=RUN' puts it under a label of yours")
    plot.add_argument(
        "-o", "--output", type=Path, default=Path("curves.png"), metavar="FILE", help=".png, .pdf or .svg; curves.png"
    )
    plot.add_argument("--metric", default="eval/mean_reward", help="such as rollout/ep_rew_mean; eval/mean_reward")
    plot.add_argument(
        "--smooth", type=_count, default=1, metavar="N", help="mean of each run's last N points; default 1: as they are"
    )

    add(
        "doctor",
        _doctor,
        "look for what is wrong with this machine and the cluster",
        "Look at this machine, the store, and from inside a worker at every node of the cluster (RAY_ADDRESS, or a "
        "local Ray): versions, processors, memory, /dev/shm, GPU, ALE, ports, clocks. Exit status 1 if something "
        "cannot work.",
    )

    submit = add(
        "submit",
        _submit,
        "run a command on a cluster, and follow its log",
        "Upload a folder to a cluster's job server, run a squall command in it there, and follow its log; the exit "
        "status is the command's. The token comes from RAY_AUTH_MODE and RAY_AUTH_TOKEN, or else from .env here.",
    )
    submit.add_argument("--address", metavar="URL", help="default RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265")
    submit.add_argument("--working-dir", type=Path, default=Path(), metavar="DIR", help="what is uploaded; default .")
    submit.add_argument("--env-file", type=Path, metavar="FILE", help="where the token is; default .env")
    submit.add_argument(
        "--follow", action=argparse.BooleanOptionalAction, default=True, help="follow the log to the end; the default"
    )
    submit.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="-- ...", help="such as: -- train dqn CartPole-v1"
    )
    return parser


def _add_listening(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        default="127.0.0.1:50051",
        metavar="HOST:PORT",
        help="default 127.0.0.1:50051; beyond loopback a token is needed; port 0 takes a free one",
    )
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="whose token callers must show; default SQUALL_GRPC_TOKEN"
    )
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="PEM certificate with its chain; TLS")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="its PEM key")


def _count(text: str) -> int:
    """Read a whole number, also one written 1e6 or 1_000_000."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number.is_integer():
        raise argparse.ArgumentTypeError(f"takes a whole number, got {text}")
    return int(number)


def _count_or_auto(text: str) -> int | str:
    return text if text == "auto" else _count(text)


def _common() -> _CommandParser:
    """Return the parent of all commands, with what each of them takes."""
    parser = _CommandParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    parser.add_argument(
        "--store",
        metavar="URL",
        help="where runs are registered: redis://host:port/db, rediss://... (TLS), unix:///path/to/socket or "
        "sqlite:///file.db; default SQUALL_STORE, or a file in SQUALL_HOME. A password belongs into SQUALL_STORE: "
        "others can read a command line",
    )
    return parser


def _answer(out: TextIO, as_json: bool, payload: Any, renderable: Any) -> int:
    if as_json:
        from services.store import plain_payload

        print(json.dumps(plain_payload("answer", {"": payload})[""], allow_nan=False), file=out)
    else:
        from rich.console import Console

        wide = None if out.isatty() else _WIDTH_OF_A_PIPE  # a name cut short is of no use to the next command
        Console(file=out, highlight=False, markup=False, width=wide).print(renderable)
    return 0


def _train(parsed: argparse.Namespace, out: TextIO) -> int:
    from services.ray_environment import settle

    settle()
    from replay.imports import no_collections
    from replay.types import ConfigurationError

    with no_collections():
        from services import runs
    gc.freeze()  # nor is it looked through while the run goes on
    from services.config import parse_assignment, resolve
    from services.display import render_summary
    from services.home import CONFIG

    flags = {key: getattr(parsed, key) for key in _TRAIN_FLAGS}
    overrides = {key: value for key, value in flags.items() if value is not None}
    overrides |= dict(parse_assignment(text) for text in parsed.set)
    file = parsed.config
    if parsed.resume:
        if parsed.algorithm or parsed.config or parsed.name:
            raise ConfigurationError(
                "--resume RUN goes on with the run's own algorithm, environment, configuration and name: leave them out"
            )
        file = runs.folder_of(parsed.resume, parsed.store) / CONFIG
    config, preset = resolve(parsed.algorithm, parsed.environment, file=file, overrides=overrides)
    if parsed.show_config:
        runs.check(config)
        return _answer(out, parsed.json, config.model_dump(), config.as_yaml())
    notes = []
    if preset is None and file is None:
        note = f"no preset of {config.algorithm} for {config.environment}: the algorithm's defaults are used"
        if "eps_last_frame" in config.hyperparameters:
            note += ", which are for Pong; a small task wants other warm_start_size and eps_last_frame"
        notes.append(f"{note} (--show-config lists all keys)")
    if parsed.resume:
        summary = runs.resume(config, parsed.resume, notes, parsed.store)
    else:
        summary = runs.train(config, parsed.name, notes, parsed.store)
    _answer(out, parsed.json, summary, render_summary(summary))
    return {"interrupted": 130, "terminated": 143}.get(summary["stopped_because"], 0)


def _evaluate(parsed: argparse.Namespace, out: TextIO) -> int:
    from replay.imports import no_collections

    with no_collections():
        from services import runs
    from services.display import render_summary

    figures = runs.evaluate(
        parsed.run,
        episodes=parsed.episodes,
        which=parsed.checkpoint,
        seed=parsed.seed,
        video=parsed.video,
        store_url=parsed.store,
    )
    if left_out := figures.get("frames_left_out"):
        print(
            f"squall: the video is full: it has {figures['frames']:,} frames, and {left_out:,} more were played; "
            f"fewer --episodes fit",
            file=sys.stderr,
        )
    return _answer(out, parsed.json, figures, render_summary(figures))


def _runs(parsed: argparse.Namespace, out: TextIO) -> int:
    from services.display import render_runs
    from services.home import open_home_store

    with open_home_store(parsed.store) as store:
        records = store.list_runs()
    keys = ("name", "algorithm", "environment", "seed", "state", "created", "stopped_because")
    return _answer(out, parsed.json, [{key: getattr(r, key) for key in keys} for r in records], render_runs(records))


def _status(parsed: argparse.Namespace, out: TextIO) -> int:
    from services import control
    from services.display import render_status
    from services.home import open_home_store

    with open_home_store(parsed.store) as store:
        payload = control.status(store, parsed.run, events=parsed.events)
    return _answer(out, parsed.json, payload, render_status(payload))


def _watch(parsed: argparse.Namespace, out: TextIO) -> int:
    from services import control
    from services.display import Display, render_status
    from services.home import open_home_store

    with open_home_store(parsed.store) as store, Display(parsed.run) as display:
        for news in control.follow(store, parsed.run):
            if parsed.json:
                _answer(out, True, news.plain(), "")
                out.flush()
                continue
            for event in news.events:
                display.event(event.kind, event.text, event.time)
            if "env_steps" in news.status:
                display.snapshot(news.status)
    return 0 if parsed.json else _answer(out, False, {}, render_status(news.status))


def _scale(parsed: argparse.Namespace, out: TextIO) -> int:
    from replay.types import ConfigurationError
    from services import control
    from services.home import open_home_store

    if parsed.actors != "auto" and parsed.actors < 0:
        raise ConfigurationError(f"actors must not be negative, got {parsed.actors}")
    with open_home_store(parsed.store) as store:
        answer = control.command(store, parsed.run, "scale", {"actors": parsed.actors})
    now = "as many as the learner needs" if answer.get("auto") else answer["actors"]
    text = f"run {parsed.run}: {answer['before']} workers, now {now}"
    return _answer(out, parsed.json, {"run": parsed.run, **answer}, text)


def _stop(parsed: argparse.Namespace, out: TextIO) -> int:
    from services import control
    from services.home import open_home_store

    with open_home_store(parsed.store) as store:
        answer = control.command(store, parsed.run, "stop")
    return _answer(out, parsed.json, {"run": parsed.run, **answer}, f"run {parsed.run} is stopping")


def _serve(parsed: argparse.Namespace, out: TextIO) -> int:
    from services.serving import serve_checkpoint

    def announce(address: str, checkpoint: Path) -> None:
        payload = {"run": parsed.run, "address": address, "checkpoint": str(checkpoint)}
        _answer(out, parsed.json, payload, f"serving {checkpoint} on {address}")
        out.flush()

    serve_checkpoint(parsed.run, parsed.checkpoint, _listening(parsed), announce, parsed.store)
    return 0


def _gateway(parsed: argparse.Namespace, out: TextIO) -> int:
    from services.gateway import serve_gateway

    def announce(address: str) -> None:
        _answer(out, parsed.json, {"address": address}, f"gateway on {address}")
        out.flush()

    serve_gateway(_listening(parsed), announce, parsed.store)
    return 0


def _listening(parsed: argparse.Namespace) -> Any:
    from services.grpc_server import Listening, read_token

    return Listening(parsed.address, read_token(parsed.token_file), parsed.tls_cert, parsed.tls_key)


def _plot(parsed: argparse.Namespace, out: TextIO) -> int:
    from services.home import open_home_store
    from services.plotting import plot_runs

    with open_home_store(parsed.store) as store:
        curves = plot_runs(store, parsed.runs, parsed.output, metric=parsed.metric, smooth=parsed.smooth)
    for curve in curves:
        if curve.left_out:
            print(f"{curve.label}: {curve.left_out} points that are not finite are left out", file=sys.stderr)
    payload = {
        "output": str(parsed.output.absolute()),
        "metric": parsed.metric,
        "smooth": parsed.smooth,
        "curves": [{"label": c.label, "seeds": c.seeds, "points": len(c.steps)} for c in curves],
    }
    return _answer(out, parsed.json, payload, f"{parsed.output}: {', '.join(curve.label for curve in curves)}")


def _doctor(parsed: argparse.Namespace, out: TextIO) -> int:
    from services.ray_environment import settle

    settle()
    from dataclasses import asdict

    from services import doctor
    from services.display import render_findings

    findings = doctor.examine(parsed.store)
    _answer(out, parsed.json, [asdict(finding) for finding in findings], render_findings(findings))
    return int(any(finding.verdict == doctor.PROBLEM for finding in findings))


def _submit(parsed: argparse.Namespace, out: TextIO) -> int:
    from dataclasses import asdict

    from replay.types import ConfigurationError
    from services.submission import JobServer

    command = parsed.arguments[1:] if parsed.arguments[:1] == ["--"] else parsed.arguments
    if not command or command[0] == "submit":
        raise ConfigurationError("name what to run, such as: squall submit -- train dqn CartPole-v1")
    _parser().parse_args(command)  # what it cannot read, no cluster needs to be asked about
    server = JobServer(parsed.address, parsed.env_file)
    job = server.submit(command, parsed.working_dir)
    print(f"job {job.id} is submitted to {job.address}\n{job.advice}", file=sys.stderr, flush=True)
    if parsed.follow:
        log = sys.stderr if parsed.json else out
        try:
            job = server.follow(job, lambda text: print(text, end="", file=log, flush=True))
        except KeyboardInterrupt:
            print(f"squall: job {job.id} goes on; with {server.env_file} exported\n{job.advice}", file=sys.stderr)
            return 130
        print(f"job {job.id} {job.status}, exit status {job.exit_status}: {job.message}", file=sys.stderr)
    if parsed.json:
        _answer(out, True, asdict(job), "")
    return job.exit_status or 0


if __name__ == "__main__":
    sys.exit(main())
