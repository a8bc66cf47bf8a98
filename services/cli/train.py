"""`squall train`: start a run, or resume one."""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any, TextIO

from services.cli.arguments import Commands, count, count_or_auto
from services.cli.output import print_result

_RUN_KEYS = (
    "actors", "num_envs", "steps", "stop_at_return", "seed", "serve", "replay_shards", "learner_gpus", "cpus_per_actor",
)  # fmt: skip
"""Arguments that set the run configuration's key of the same name."""


def add_to(commands: Commands) -> None:
    """Add the command and its arguments."""
    parser = commands.add("train", _train, "train an agent", "Train an agent, or resume a run.")
    parser.add_argument("algorithm", nargs="?", help="algorithm, such as dqn")
    parser.add_argument(
        "environment", nargs="?", help="Gymnasium id, or module:EnvId-v0 for an environment of your own"
    )
    parser.add_argument(
        "--actors",
        type=count_or_auto,
        metavar="N",
        help="number of rollout workers; default: the preset's, or 2. auto adds workers while the learner waits for "
        "experience, and removes workers that mostly wait. With 0, which needs --serve, all experience comes from "
        "external simulators",
    )
    parser.add_argument(
        "--replay-shards", type=count, metavar="N", help="number of processes that divide the replay; default: 1"
    )
    parser.add_argument(
        "--learner-gpus",
        type=count_or_auto,
        metavar="N",
        help="GPUs of the learner: 0, 1, or auto; default: auto, which uses one GPU if there is one",
    )
    parser.add_argument(
        "--cpus-per-actor",
        type=float,
        metavar="X",
        help="CPUs that Ray reserves for each worker; with more than 0 an autoscaled cluster grows; default: 0",
    )
    parser.add_argument(
        "--envs-per-actor", type=count, metavar="N", dest="num_envs", help="environments in each worker (num_envs)"
    )
    parser.add_argument(
        "--steps", type=count, metavar="N", help="environment steps of the run, over all workers, such as 1e6"
    )
    parser.add_argument(
        "--stop-at-return",
        type=float,
        metavar="X",
        help="end and score the run as soon as the mean return of a periodic evaluation is at least X",
    )
    parser.add_argument(
        "--seed", type=count, metavar="N", help="seed from which all other seeds are derived; default: 0"
    )
    parser.add_argument("--name", help="name of the run; default: an unused name, such as dqn-CartPole-v1-3")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file with the configuration, such as the config.yaml of a run"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set any key of the configuration; may be repeated",
    )
    parser.add_argument("--resume", metavar="RUN", help="continue a run from its last checkpoint")
    parser.add_argument(
        "--serve",
        nargs="?",
        const="auto",
        metavar="HOST:PORT",
        help="serve the policy and accept experience over gRPC during the run; default: a free port of the loopback "
        "address. In a Ray cluster (RAY_ADDRESS) the default is a free port of the node's own address, which needs a "
        "token in SQUALL_GRPC_TOKEN",
    )
    parser.add_argument(
        "--show-config", action="store_true", help="check the configuration, print all its keys, and exit"
    )


def _train(parsed: argparse.Namespace, out: TextIO) -> int:
    from services.supervision.ray_environment import set_ray_defaults

    set_ray_defaults()
    from replay.imports import no_collections

    with no_collections():
        from services import runs
    gc.freeze()  # the modules stay loaded for the whole run, so the garbage collector need not traverse them
    from services.cli.display import Display, render_summary

    config, notes = _configuration(parsed)
    if parsed.show_config:
        runs.check(config)
        return print_result(out, parsed.json, config.model_dump(), config.as_yaml())
    if parsed.resume:
        summary = runs.resume(config, parsed.resume, notes, parsed.store, Display)
    else:
        summary = runs.train(config, parsed.name, notes, parsed.store, Display)
    print_result(out, parsed.json, summary, render_summary(summary))
    return {"interrupted": 130, "terminated": 143}.get(summary["stopped_because"], 0)


def _configuration(parsed: argparse.Namespace) -> tuple[Any, list[str]]:
    """Return the run's configuration, and notes about it for the user."""
    from replay.errors import ConfigurationError
    from services import runs
    from services.config import parse_assignment, resolve
    from services.store.locate import CONFIG

    flags = {key: getattr(parsed, key) for key in _RUN_KEYS}
    overrides = {key: value for key, value in flags.items() if value is not None}
    overrides |= dict(parse_assignment(text) for text in parsed.set)
    file = parsed.config
    if parsed.resume:
        if parsed.algorithm or parsed.config or parsed.name:
            raise ConfigurationError(
                "--resume RUN uses the run's own algorithm, environment, configuration, and name: leave them out"
            )
        file = runs.folder_of(parsed.resume, parsed.store) / CONFIG
    config, preset = resolve(parsed.algorithm, parsed.environment, file=file, overrides=overrides)
    notes = []
    if preset is None and file is None:
        note = f"no preset of {config.algorithm} for {config.environment}: the algorithm's defaults are used"
        if "eps_last_frame" in config.hyperparameters:
            note += ", which are tuned for Pong; a small task needs a smaller warm_start_size and eps_last_frame"
        notes.append(f"{note} (--show-config lists all keys)")
    return config, notes
