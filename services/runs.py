"""Operations on runs that the command line calls: start, resume, and evaluate a run, and find its files."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from actors.evaluation import run_episodes
from actors.video import Video
from learner.checkpoints import BEST, LAST, load_algorithm
from replay.errors import ConfigurationError
from replay.seeds import spawn_seed
from services.config import RunConfig
from services.errors import RunNameInUse
from services.store.base import RunStore
from services.store.buffered import BufferedWriter
from services.store.locate import CONFIG, SUMMARY, open_default_store, runs_dir
from services.store.payloads import plain_payload
from services.store.records import ProcessIdentity, RunRecord, check_run_name, this_process
from services.supervision.coordinator import Coordinator
from services.supervision.progress import Progress
from services.supervision.ray_cluster import RayCluster
from services.supervision.reporting import NoDisplay, RunDisplay, RunReporter
from services.supervision.signals import StopSignals, kill_and_exit
from services.supervision.topology import Topology, plan


def choose_name(config: RunConfig, store: RunStore) -> str:
    """Return the first free run name, such as `dqn-CartPole-v1-3`."""
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{config.algorithm}-{config.environment}").strip("-.")[:80]
    taken = {record.name for record in store.list_runs()}
    taken |= {path.name for path in runs_dir().iterdir()} if runs_dir().is_dir() else set()
    number = 1
    while f"{base}-{number}" in taken:
        number += 1
    return f"{base}-{number}"


def check(config: RunConfig) -> None:
    """Check a configuration; raise the errors that `train` would raise before it starts a process."""
    plan(config, "unnamed", runs_dir())


def train(
    config: RunConfig,
    name: str | None = None,
    notes: Sequence[str] = (),
    store_url: str | None = None,
    make_display: Callable[[str], RunDisplay] = NoDisplay,
) -> dict[str, Any]:
    """Train a new run to its end; return its summary.

    Args:
        config: the run's configuration.
        name: name of the run; None chooses a free one.
        notes: texts for the user, reported as events.
        store_url: URL of the run store; None takes SQUALL_STORE, or the file in SQUALL_HOME.
        make_display: takes the run's name and returns a display.

    Raises:
        ConfigurationError: the configuration cannot work; nothing was started.
        RunNameInUse: another run has this name.
        RunFailed: the run could not continue.
        RunTakenOver: another process resumed the run, because its heartbeats did not reach the store.
    """
    if name is not None:
        check_run_name(name)
    check(config)
    with open_default_store(store_url, create=True) as store:
        owner = this_process()
        run = _register(config, name, store, owner)
        folder = runs_dir() / run
        try:
            folder.mkdir(parents=True, exist_ok=True)
            config.save(folder / CONFIG)
            topology = plan(config, run, folder / "checkpoints")
        except BaseException as error:  # also an interrupt; otherwise the registered run would be shown as lost
            store.update_state(run, "failed", _first_line(error), owner=owner)
            raise
        return _supervise(config, topology, folder, store, owner, None, notes, make_display)


def _register(config: RunConfig, name: str | None, store: RunStore, owner: ProcessIdentity) -> str:
    """Register a run under the given name, or under the first free one; return the name."""
    while True:
        run = name or choose_name(config, store)
        folder = runs_dir() / run
        if folder.exists() and any(folder.iterdir()):
            raise RunNameInUse(f"the folder {folder} exists already: choose another --name, or --resume {run}")
        now = time.time()
        record = RunRecord(
            run,
            now,
            config.algorithm,
            config.environment,
            config.seed,
            *owner,
            state="starting",
            heartbeat=now,
            stopped_because=None,
            config=config.model_dump(),
        )
        try:
            store.register(record)
            return run
        except RunNameInUse:
            if name is not None:
                raise


def resume(
    config: RunConfig,
    run: str,
    notes: Sequence[str] = (),
    store_url: str | None = None,
    make_display: Callable[[str], RunDisplay] = NoDisplay,
) -> dict[str, Any]:
    """Continue a run that ended or was lost, from its last checkpoint; return its summary.

    Args:
        config: the run's configuration; its hyper-parameters must be those of the stored configuration.
        run: name of the run.
        notes: see `train`.
        store_url: see `train`.
        make_display: see `train`.

    Raises:
        UnknownRun: there is no such run.
        RunIsLive: the run has a live coordinator.
        RunTakenOver: another process resumed the run meanwhile.
        ConfigurationError: the run has reached its steps or its return already, or a hyper-parameter would change.
    """
    with open_default_store(store_url) as store:
        before = store.get(run).config["hyperparameters"]
        changed = [key for key, value in config.hyperparameters.items() if before.get(key, value) != value]
        if changed:
            raise ConfigurationError(
                f"a resumed run keeps its hyper-parameters, but {', '.join(changed)} would change; start a new run"
            )
        folder = runs_dir() / run
        topology = plan(config, run, folder / "checkpoints")
        progress = Progress.resumed(folder / "checkpoints" / LAST)
        # A run that was interrupted during its final evaluation has all its steps; a resume repeats the evaluation.
        if progress.counters.env_steps >= config.steps and _is_scored(folder):
            raise ConfigurationError(
                f"run {run!r} has {progress.counters.env_steps:,} steps already; raise --steps above that"
            )
        goal, best = config.stop_at_return, progress.best_return
        if goal is not None and best is not None and best >= goal:
            raise ConfigurationError(
                f"run {run!r} has reached a mean return of {goal:g} already, its best is {best:g}; raise "
                f"--stop-at-return, or remove it with --set stop_at_return=null"
            )
        owner = this_process()
        store.adopt(run, *owner)
        config.save(folder / CONFIG)
        return _supervise(config, topology, folder, store, owner, progress, notes, make_display)


def _is_scored(folder: Path) -> bool:
    file = folder / SUMMARY
    return file.exists() and json.loads(file.read_text())["eval_return_mean"] is not None


def _supervise(
    config: RunConfig,
    topology: Topology,
    folder: Path,
    store: RunStore,
    owner: ProcessIdentity,
    progress: Progress | None,
    notes: Sequence[str],
    make_display: Callable[[str], RunDisplay],
) -> dict[str, Any]:
    run = topology.run
    writer = BufferedWriter(store, run, owner=owner)
    with StopSignals(kill_and_exit) as signals, make_display(run) as display:
        observer = RunReporter(run, folder, writer, display, signals)
        try:
            observer.event("start" if progress is None else "resume", f"run {run} in {folder}")
            for note in [*notes, *_oversubscription(config)]:
                observer.event("note", note)
            with ExitStack() as stack:
                with observer.heartbeats():
                    stack.enter_context(RayCluster(topology.object_store_bytes))
                    signals.install()
                coordinator = Coordinator(topology.placed(), config, folder, observer, progress)
                summary = {"run": run, **coordinator.run()}
            writer.check_owner()
            summary = plain_payload("summary", summary)
            (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
            observer.event("end", _end_message(run, summary["stopped_because"]))
            writer.update_state("finished", summary["stopped_because"])
        except BaseException as error:
            observer.event("failed", f"{type(error).__name__}: {error}")
            writer.update_state("failed", _first_line(error))
            raise
        finally:
            observer.close()
            signals.forget()
            writer.finish(lambda: signals.wanted is not None, partial(display.event, "store"))
        writer.check_owner()
    return summary


def _first_line(error: BaseException) -> str:
    return f"{error}".splitlines()[0] if f"{error}" else type(error).__name__


def _end_message(run: str, why: str) -> str:
    if why == "steps":
        return f"run {run} has all its steps"
    if why == "return":
        return f"run {run} has reached its return; to raise it: squall train --resume {run} --stop-at-return ..."
    return f"run {run} was {why}; to continue: squall train --resume {run}"


def _oversubscription(config: RunConfig) -> list[str]:
    cpus = os.cpu_count() or 1
    if "RAY_ADDRESS" in os.environ or config.first_actors <= cpus:
        return []
    return [f"{config.first_actors} actors share {cpus} CPUs, so each of them is slower"]


def folder_of(run: str, store_url: str | None = None) -> Path:
    """Return a run's folder.

    Raises:
        UnknownRun: there is no such run.
    """
    with open_default_store(store_url) as store:
        store.get(run)
    return runs_dir() / run


def find_checkpoint(run_or_path: str, which: str, store_url: str | None = None) -> Path:
    """Return the path of a checkpoint.

    Args:
        run_or_path: name of a run, or path of a `.ckpt` file.
        which: checkpoint of the run: `best`, which is the last one if there is no best one, or `last`.
        store_url: see `train`.

    Raises:
        UnknownRun: there is no such run.
        ConfigurationError: there is no such checkpoint.
    """
    path = Path(run_or_path)
    if path.suffix == ".ckpt":
        if not path.is_file():
            raise ConfigurationError(f"there is no checkpoint {path}")
        return path
    checkpoints = folder_of(run_or_path, store_url) / "checkpoints"
    for name in (BEST, LAST) if which == "best" else (LAST,):
        if (checkpoints / name).is_file():
            return checkpoints / name
    raise ConfigurationError(f"run {run_or_path!r} has no checkpoint in {checkpoints}")


def evaluate(
    run_or_path: str, *, episodes: int, which: str, seed: int, video: Path | None = None, store_url: str | None = None
) -> dict[str, Any]:
    """Play greedy episodes with a checkpoint and return their statistics.

    Args:
        run_or_path: see `find_checkpoint`.
        episodes: number of episodes.
        which: see `find_checkpoint`.
        seed: seed of the episodes.
        video: file to record the episodes to; None for no recording.
        store_url: see `train`.

    Raises:
        ConfigurationError: there is no checkpoint, or no video can be recorded; nothing was played.
        VideoFailed: the video could not be completed.
    """
    if seed < 0:
        raise ConfigurationError(f"seed must not be negative, got {seed}")
    path = find_checkpoint(run_or_path, which, store_url)
    algorithm = load_algorithm(path)
    with nullcontext() if video is None else Video(video) as recording:
        results = run_episodes(algorithm.policy, episodes, spawn_seed(seed, "evaluate"), video=recording)
    recorded = {} if recording is None else {
        "video": str(recording.path.absolute()), "frames": recording.frames, "frames_left_out": recording.left_out,
    }  # fmt: skip
    returns = [result.episode_return for result in results]
    mean = sum(returns) / len(returns)
    return {
        "checkpoint": str(path),
        "algorithm": algorithm.name,
        "environment": algorithm.environment.id,
        "episodes": len(returns),
        "return_mean": mean,
        "return_std": (sum((value - mean) ** 2 for value in returns) / len(returns)) ** 0.5,
        "return_min": min(returns),
        "return_max": max(returns),
        "length_mean": sum(result.length for result in results) / len(results),
        **recorded,
    }
