"""Runs on disk and in the store: naming, starting, resuming, evaluating. What the command line calls."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

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
from services.store.records import Command, ProcessIdentity, RunRecord, check_run_name, this_process
from services.supervision.coordinator import Coordinator
from services.supervision.progress import Progress, RunObserver
from services.supervision.ray_cluster import RayCluster
from services.supervision.signals import StopSignals, end_at_once
from services.supervision.topology import Topology, plan


def choose_name(config: RunConfig, store: RunStore) -> str:
    """Return the first free name such as `dqn-CartPole-v1-3`."""
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{config.algorithm}-{config.environment}").strip("-.")[:80]
    taken = {record.name for record in store.list_runs()}
    taken |= {path.name for path in runs_dir().iterdir()} if runs_dir().is_dir() else set()
    number = 1
    while f"{base}-{number}" in taken:
        number += 1
    return f"{base}-{number}"


class RunDisplay(Protocol):
    """Shows a run to a person, as a context manager; `services.cli.display.Display` does."""

    def __enter__(self) -> RunDisplay:
        """Begin to show."""
        ...

    def __exit__(self, *_: object) -> None:
        """Stop showing."""
        ...

    def snapshot(self, snapshot: dict[str, Any]) -> None:
        """Show the state of the run."""
        ...

    def event(self, kind: str, text: str) -> None:
        """Show an event."""
        ...


class NoDisplay:
    """A `RunDisplay` that shows nothing."""

    def __init__(self, run: str) -> None:
        """Take the run's name, as every display does."""

    def __enter__(self) -> NoDisplay:
        """Do nothing."""
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing."""

    def snapshot(self, snapshot: dict[str, Any]) -> None:
        """Do nothing."""

    def event(self, kind: str, text: str) -> None:
        """Do nothing."""


class _RunReporter(RunObserver):
    """Passes word on to the store, the display and TensorBoard, and commands back from the store."""

    def __init__(
        self, run: str, folder: Path, writer: BufferedWriter, display: RunDisplay, signals: StopSignals
    ) -> None:
        self._run, self._writer, self._display, self._signals = run, writer, display, signals
        self._folder = folder
        self._state = "starting"
        self._next_look = 0.0
        self._taken = 0
        self._last: dict[str, Any] = {"run": run, "state": "starting", "processes": []}

    @cached_property
    def _board(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # a quarter of a second, which the start does not wait for

        return SummaryWriter(str(self._folder / "tensorboard"))

    @contextmanager
    def still_alive(self) -> Iterator[None]:
        """Keep the run's heart beating in a `with` block that may take longer than a reader waits for a beat."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(1.0):
                self._writer.write_snapshot(self._last, time.time())

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def snapshot(self, snapshot: dict[str, Any]) -> None:
        state = {"starting": "starting", "stopping": "stopping"}.get(snapshot["state"], "running")
        if state != self._state:
            self._state = state
            self._writer.update_state(state)
        self._last = {"run": self._run, **snapshot}
        self._writer.write_snapshot(self._last, time.time())
        self._display.snapshot(snapshot)

    def event(self, kind: str, text: str) -> None:
        self._writer.add_event(kind, text, time.time())
        self._display.event(kind, text)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._writer.add_metrics(step, values, time.time())
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)
        self._board.flush()

    def stop_wanted(self) -> str | None:
        return self._signals.wanted

    def commands(self) -> list[Command]:
        if time.monotonic() < self._next_look:
            return []
        self._next_look = time.monotonic() + 0.5
        new = [command for command in self._writer.pending_commands() if command.id > self._taken]
        self._taken = max([self._taken, *(command.id for command in new)])
        return new

    def answer(self, command: Command, result: dict[str, Any]) -> None:
        self._writer.acknowledge(command.id, result)

    def close(self) -> None:
        if "_board" in vars(self):
            self._board.close()


def check(config: RunConfig) -> None:
    """Raise what `train` would raise before it starts anything."""
    plan(config, "unnamed", runs_dir())


def train(
    config: RunConfig,
    name: str | None = None,
    notes: Sequence[str] = (),
    store_url: str | None = None,
    make_display: Callable[[str], RunDisplay] = NoDisplay,
) -> dict[str, Any]:
    """Start a new run and see it to its end; return its summary.

    The run is registered in the store of `store_url`, which as everywhere here defaults to that of this home.

    Raises:
        ConfigurationError: something in the configuration cannot work; nothing was started.
        RunNameInUse: `name` is taken.
        RunFailed: the run could not go on.
        RunTakenOver: it was not heard of, so another process resumed it.
    """
    if name is not None:
        check_run_name(name)
    check(config)
    with open_default_store(store_url, create=True) as store:
        me = this_process()
        run = _register(config, name, store, me)
        folder = runs_dir() / run
        try:
            folder.mkdir(parents=True, exist_ok=True)
            config.save(folder / CONFIG)
            topology = plan(config, run, folder / "checkpoints")
        except BaseException as error:  # an interrupt too: the run is registered, and would read lost
            store.update_state(run, "failed", _why(error), owner=me)
            raise
        return _supervise(config, topology, folder, store, me, None, notes, make_display)


def _register(config: RunConfig, name: str | None, store: RunStore, me: ProcessIdentity) -> str:
    """Take a name for a run, the given one or the first free one, and return it."""
    while True:
        run = name or choose_name(config, store)
        folder = runs_dir() / run
        if folder.exists() and any(folder.iterdir()):
            raise RunNameInUse(f"there is a folder {folder} already: choose another --name, or --resume {run}")
        now = time.time()
        record = RunRecord(
            run,
            now,
            config.algorithm,
            config.environment,
            config.seed,
            *me,
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
    """Go on with a run that ended or was lost; return its summary.

    Raises:
        UnknownRun: there is no such run.
        RunIsLive: its coordinator is at work.
        RunTakenOver: this one was not heard of, so another process resumed it.
        ConfigurationError: it has all its steps or its return already, or its hyper-parameters are to change.
    """
    with open_default_store(store_url) as store:
        before = store.get(run).config["hyperparameters"]
        changed = [key for key, value in config.hyperparameters.items() if before.get(key, value) != value]
        if changed:
            raise ConfigurationError(
                f"a run keeps its hyper-parameters, but {', '.join(changed)} would change; start a new run for that"
            )
        folder = runs_dir() / run
        topology = plan(config, run, folder / "checkpoints")
        progress = Progress.resumed(folder / "checkpoints" / LAST)
        # A run that was ended while it was being scored has all its steps, and goes on with the scoring.
        if progress.counters.env_steps >= config.steps and _is_scored(folder):
            raise ConfigurationError(
                f"run {run!r} has its {progress.counters.env_steps:,} steps already; give it more with --steps"
            )
        goal, best = config.stop_at_return, progress.best_return
        if goal is not None and best is not None and best >= goal:
            raise ConfigurationError(
                f"run {run!r} has reached a mean return of {goal:g} already, its best is {best:g}; give it a higher "
                f"--stop-at-return, or none with --set stop_at_return=null"
            )
        me = this_process()
        store.adopt(run, *me)
        config.save(folder / CONFIG)
        return _supervise(config, topology, folder, store, me, progress, notes, make_display)


def _is_scored(folder: Path) -> bool:
    file = folder / SUMMARY
    return file.exists() and json.loads(file.read_text())["eval_return_mean"] is not None


def _supervise(
    config: RunConfig,
    topology: Topology,
    folder: Path,
    store: RunStore,
    me: ProcessIdentity,
    progress: Progress | None,
    notes: Sequence[str],
    make_display: Callable[[str], RunDisplay],
) -> dict[str, Any]:
    run = topology.run
    writer = BufferedWriter(store, run, owner=me)
    with StopSignals(end_at_once) as signals, make_display(run) as display:
        observer = _RunReporter(run, folder, writer, display, signals)
        try:
            observer.event("start" if progress is None else "resume", f"run {run} in {folder}")
            for note in [*notes, *_oversubscription(config)]:
                observer.event("note", note)
            with ExitStack() as stack:
                with observer.still_alive():
                    stack.enter_context(RayCluster(topology.object_store_bytes))
                    signals.take_over()
                coordinator = Coordinator(topology.placed(), config, folder, observer, progress)
                summary = {"run": run, **coordinator.run()}
            writer.check_owner()
            summary = plain_payload("summary", summary)
            (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
            observer.event("end", _last_line(run, summary["stopped_because"]))
            writer.update_state("finished", summary["stopped_because"])
        except BaseException as error:
            observer.event("failed", f"{type(error).__name__}: {error}")
            writer.update_state("failed", _why(error))
            raise
        finally:
            observer.close()
            signals.forget()
            writer.hand_in(lambda: signals.wanted is not None, partial(display.event, "store"))
        writer.check_owner()
    return summary


def _why(error: BaseException) -> str:
    return f"{error}".splitlines()[0] if f"{error}" else type(error).__name__


def _last_line(run: str, why: str) -> str:
    if why == "steps":
        return f"run {run} has all its steps"
    if why == "return":
        return f"run {run} has reached its return; a higher one: squall train --resume {run} --stop-at-return ..."
    return f"run {run} {why}; go on with: squall train --resume {run}"


def _oversubscription(config: RunConfig) -> list[str]:
    cpus = os.cpu_count() or 1
    if "RAY_ADDRESS" in os.environ or config.first_actors <= cpus:
        return []
    return [f"{config.first_actors} actors share {cpus} CPUs: it works, each is slower"]


def folder_of(run: str, store_url: str | None = None) -> Path:
    """Return a run's folder.

    Raises:
        UnknownRun: there is no such run.
    """
    with open_default_store(store_url) as store:
        store.get(run)
    return runs_dir() / run


def find_checkpoint(what: str, which: str, store_url: str | None = None) -> Path:
    """Return the checkpoint of a run, by name, or of a path.

    Raises:
        ConfigurationError: there is none.
    """
    path = Path(what)
    if path.suffix == ".ckpt":
        if not path.is_file():
            raise ConfigurationError(f"there is no checkpoint {path}")
        return path
    checkpoints = folder_of(what, store_url) / "checkpoints"
    for name in (BEST, LAST) if which == "best" else (LAST,):
        if (checkpoints / name).is_file():
            return checkpoints / name
    raise ConfigurationError(f"run {what!r} has no checkpoint in {checkpoints}")


def evaluate(
    what: str, *, episodes: int, which: str, seed: int, video: Path | None = None, store_url: str | None = None
) -> dict[str, Any]:
    """Play greedy episodes with a run's checkpoint, recorded to `video` if that is named; return the figures.

    Raises:
        ConfigurationError: there is no checkpoint, or no video can be made; nothing was played.
        VideoFailed: the video could not be written to its end.
    """
    if seed < 0:
        raise ConfigurationError(f"seed must not be negative, got {seed}")
    path = find_checkpoint(what, which, store_url)
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
