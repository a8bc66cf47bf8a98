"""Records of the run store: runs, commands, events, and metrics, with the checks that every store applies to them."""

from __future__ import annotations

import difflib
import math
import os
import re
import socket
import time
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, NamedTuple

import psutil

from replay.errors import ConfigurationError
from services.errors import RunIsLive, RunIsNotLive, RunNameInUse, RunTakenOver, UnknownRun

LIVE_STATES = ("starting", "running", "stopping")
ENDED_STATES = ("finished", "failed")
LOST = "lost"

LOST_AFTER = 10.0
"""Seconds without a heartbeat after which a live run is reported as lost."""
UNREAD_COMMAND = {"error": "the run was resumed before it read this command"}
"""Answer to the commands that a run's previous coordinator has not read; see `RunStore.adopt`."""

# Seconds. psutil computes a process's start time from the boot time, which has whole seconds and may vary by one.
_START_TOLERANCE = 2.0


class ProcessIdentity(NamedTuple):
    """One process of one machine. The start time distinguishes it from a later process with the same pid."""

    host: str
    pid: int
    pid_started: float


def this_process() -> ProcessIdentity:
    """Return the identity of the calling process, as `RunRecord` and `RunStore.adopt` expect it."""
    return ProcessIdentity(socket.gethostname(), os.getpid(), psutil.Process().create_time())


@dataclass(frozen=True)
class RunRecord:
    """The record of one run.

    Attributes:
        name: name of the run, unique in its store; also the name of its folder.
        created: Unix seconds.
        algorithm: name of the algorithm, such as `"dqn"`.
        environment: id of the environment.
        seed: the run's seed, from which all other seeds are derived.
        host: name of the machine on which the coordinator runs.
        pid: the coordinator's process id on that machine.
        pid_started: creation time of that process in Unix seconds, as psutil reports it.
        state: `starting`, `running`, `stopping`, `finished`, or `failed`; for readers also `lost`.
        heartbeat: Unix seconds of the coordinator's last heartbeat.
        stopped_because: reason why the run stopped, is stopping, or is lost; None while it continues.
        config: the resolved configuration.
    """

    name: str
    created: float
    algorithm: str
    environment: str
    seed: int
    host: str
    pid: int
    pid_started: float
    state: str
    heartbeat: float
    stopped_because: str | None
    config: dict[str, Any]

    @property
    def live(self) -> bool:
        """Whether the run has a coordinator that is running it."""
        return self.state in LIVE_STATES

    @property
    def owner(self) -> ProcessIdentity:
        """The process of the run's coordinator."""
        return ProcessIdentity(self.host, self.pid, self.pid_started)


@dataclass(frozen=True)
class Command:
    """A request to a run.

    Attributes:
        id: 1, 2, 3, ... within the run.
        time: Unix seconds at which the command was sent.
        kind: kind of the command, such as `"stop"`.
        arguments: arguments of this kind of command.
    """

    id: int
    time: float
    kind: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Event:
    """An event of a run; `id` counts 1, 2, 3, ... within the run, `time` is in Unix seconds."""

    id: int
    time: float
    kind: str
    text: str


@dataclass(frozen=True)
class MetricsRow:
    """Metrics at one time: `step` in environment steps, `time` in Unix seconds, `values` by metric name."""

    step: int
    time: float
    values: dict[str, float]


# Checks of values.


def check_run_name(name: str) -> None:
    """Raise `ConfigurationError` unless `name` is a valid name of a run, and thus of its folder."""
    if not _is_valid_name(name):
        raise ConfigurationError(
            "a run name has up to 100 letters, digits, dots, dashes, and underscores,"
            f" and starts with a letter or digit, got {name!r}"
        )


def _is_valid_name(name: str) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) is not None


def check_state(state: str) -> None:
    """Raise `ConfigurationError` unless `state` is a state that can be written."""
    if state not in LIVE_STATES + ENDED_STATES:
        raise ConfigurationError(f"a run's state is one of {', '.join(LIVE_STATES + ENDED_STATES)}, got {state!r}")


def check_record(record: RunRecord) -> None:
    """Raise `ConfigurationError` unless `record` can be registered."""
    check_run_name(record.name)
    check_state(record.state)
    for field in ("created", "pid_started", "heartbeat"):
        check_time(field, getattr(record, field))
    check_integer("pid", record.pid, least=1)
    if not isinstance(record.seed, Integral):
        raise ConfigurationError(f"a run's seed must be a whole number, got {record.seed!r}")


def check_time(name: str, seconds: float) -> None:
    """Raise `ConfigurationError` unless `seconds` is a valid time: finite, and not before 1970."""
    if not (isinstance(seconds, Real) and math.isfinite(seconds) and seconds >= 0):
        raise ConfigurationError(f"{name} must be Unix seconds, got {seconds!r}")


def check_integer(name: str, number: int, least: int) -> None:
    """Raise `ConfigurationError` unless `number` is an integer of at least `least` that fits into 64 bits."""
    if not isinstance(number, Integral) or not least <= number < 2**63:
        raise ConfigurationError(f"{name} must be a whole number of at least {least}, got {number!r}")


# Checks of a run's state, and the errors of unknown and taken names.


def unknown_run(name: str, known: list[str]) -> UnknownRun:
    """Return the error for a name that no run has; `name` may be any text, because callers of a server send it."""
    if not _is_valid_name(name):
        return UnknownRun(f"no run is named {str(name)[:100]!r}: that is not a valid run name")
    if not known:
        return UnknownRun(f"no run is named {name!r}: there are no runs yet")
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if nearest:
        return UnknownRun(f"no run is named {name!r}; the nearest: {', '.join(nearest)}")
    return UnknownRun(f"no run is named {name!r} among the {len(known)} that `squall runs` lists")


def name_in_use(name: str) -> RunNameInUse:
    """Return the error for a name that another run has."""
    return RunNameInUse(f"a run named {name!r} exists already: choose another name, or resume it")


def as_read(record: RunRecord) -> RunRecord:
    """Return a stored record as readers see it: a live run without a process or a heartbeat is `lost`."""
    if not record.live:
        return record
    silence = time.time() - record.heartbeat
    if record.host == socket.gethostname() and not _process_exists(record.pid, record.pid_started):
        return replace(record, state=LOST, stopped_because=f"its process {record.pid} has exited")
    if silence > LOST_AFTER:
        return replace(record, state=LOST, stopped_because=f"no heartbeat for {silence:.0f} s")
    return record


def check_live(record: RunRecord, command: str) -> None:
    """Raise `RunIsNotLive` if a stored run has no coordinator that could read `command`, the kind of a command."""
    seen = as_read(record)
    if not seen.live:
        reason = f" ({seen.stopped_because})" if seen.stopped_because else ""
        raise RunIsNotLive(f"run {seen.name!r} is {seen.state}{reason} and has no coordinator to read {command!r}")


def check_adoptable(record: RunRecord) -> None:
    """Raise `RunIsLive` if a stored run may still have a running coordinator."""
    seen = as_read(record)
    if seen.live:
        raise RunIsLive(
            f"run {record.name!r} is {seen.state} (process {record.pid} on {record.host}); stop it before resuming it"
        )
    # A suspended or stuck process could continue later and write into the resumed run.
    if seen.state == LOST and record.host == socket.gethostname() and _process_exists(record.pid, record.pid_started):
        raise RunIsLive(
            f"run {record.name!r} is lost ({seen.stopped_because}), but its process {record.pid} still exists;"
            " end that process before resuming the run"
        )


def check_owner(record: RunRecord, owner: ProcessIdentity | None) -> None:
    """Raise `RunTakenOver` if a stored run has another owner than `owner`; None accepts every owner."""
    if owner is not None and record.owner != owner:
        raise RunTakenOver(
            f"run {record.name!r} was resumed by process {record.pid} on {record.host}, because the store received no "
            f"heartbeat from this process for {LOST_AFTER:.0f} s; this process ends, and process {record.pid} "
            f"continues the run"
        )


def _process_exists(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < _START_TOLERANCE and process.status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False
