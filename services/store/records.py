"""Records."""

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
from services.errors import RunIsLive, RunTakenOver, UnknownRun

LIVE_STATES = ("starting", "running", "stopping")


ENDED_STATES = ("finished", "failed")


LOST = "lost"


LOST_AFTER = 10.0
"""Seconds without a heartbeat after which a live run reads lost."""


# psutil reckons a process's start from the boot time, which is in whole seconds and may wander by one.
_START_TOLERANCE = 2.0


class ProcessIdentity(NamedTuple):
    """One process of one machine, so that neither a reused pid nor another host's is mistaken for it."""

    host: str
    pid: int
    pid_started: float


def this_process() -> ProcessIdentity:
    """Identify the calling process as `RunRecord` and `RunStore.adopt` want it."""
    return ProcessIdentity(socket.gethostname(), os.getpid(), psutil.Process().create_time())


@dataclass(frozen=True)
class RunRecord:
    """What is known of one run.

    Attributes:
        name: unique among all runs of a store, and a folder's name.
        created: Unix seconds.
        algorithm: such as `"dqn"`.
        environment: the environment's id.
        seed: the run's seed, from which all others come.
        host: name of the machine on which the coordinator runs.
        pid: the coordinator's process there.
        pid_started: that process's creation time in Unix seconds, as psutil gives it.
        state: `starting`, `running`, `stopping`, `finished` or `failed`; when read also `lost`.
        heartbeat: Unix seconds at which the coordinator last said that it is alive.
        stopped_because: why the run stopped, stops or reads lost; None while it goes on.
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
        """Whether a coordinator is at work on it."""
        return self.state in LIVE_STATES

    @property
    def owner(self) -> ProcessIdentity:
        """Its coordinator's process."""
        return ProcessIdentity(self.host, self.pid, self.pid_started)


@dataclass(frozen=True)
class Command:
    """A wish that somebody sent to a run.

    Attributes:
        id: 1, 2, 3, ... within the run.
        time: Unix seconds when it was sent.
        kind: such as `"stop"`.
        arguments: what the kind needs.
    """

    id: int
    time: float
    kind: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Event:
    """Something that happened to a run; `id` counts 1, 2, 3, ... in the run, `time` is in Unix seconds."""

    id: int
    time: float
    kind: str
    text: str


@dataclass(frozen=True)
class MetricsRow:
    """Metrics of one moment: `step` in environment steps, `time` in Unix seconds, `values` by metric name."""

    step: int
    time: float
    values: dict[str, float]


def check_run_name(name: str) -> None:
    """Raise `ConfigurationError` unless `name` can be a run's name, which is a folder's name too."""
    if not _can_be_named(name):
        raise ConfigurationError(
            "a run name has up to 100 letters, digits, dots, dashes and underscores"
            f" and starts with a letter or digit, got {name!r}"
        )


def _can_be_named(name: str) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) is not None


def check_state(state: str) -> None:
    """Raise `ConfigurationError` unless `state` may be written."""
    if state not in LIVE_STATES + ENDED_STATES:
        raise ConfigurationError(f"a run's state is one of {', '.join(LIVE_STATES + ENDED_STATES)}, got {state!r}")


def check_record(record: RunRecord) -> None:
    """Raise `ConfigurationError` unless `record` may be registered."""
    check_run_name(record.name)
    check_state(record.state)
    for field in ("created", "pid_started", "heartbeat"):
        check_time(field, getattr(record, field))
    check_whole("pid", record.pid, least=1)
    if not isinstance(record.seed, Integral):
        raise ConfigurationError(f"a run's seed must be a whole number, got {record.seed!r}")


def check_time(what: str, seconds: float) -> None:
    """Raise `ConfigurationError` unless `seconds` is a moment: finite, and not before 1970."""
    if not (isinstance(seconds, Real) and math.isfinite(seconds) and seconds >= 0):
        raise ConfigurationError(f"{what} must be Unix seconds, got {seconds!r}")


def check_whole(what: str, number: int, least: int) -> None:
    """Raise `ConfigurationError` unless `number` is a whole number of at least `least` that 64 bits hold."""
    if not isinstance(number, Integral) or not least <= number < 2**63:
        raise ConfigurationError(f"{what} must be a whole number of at least {least}, got {number!r}")


def unknown_run(name: str, known: list[str]) -> UnknownRun:
    """Make the error for a name that no run has; it may be anything that a caller sent."""
    if not _can_be_named(name):
        return UnknownRun(f"no run is named {str(name)[:100]!r}: a run's name cannot be that")
    if not known:
        return UnknownRun(f"no run is named {name!r}: there are no runs yet")
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if nearest:
        return UnknownRun(f"no run is named {name!r}; the nearest: {', '.join(nearest)}")
    return UnknownRun(f"no run is named {name!r} among the {len(known)} that `squall runs` lists")


def as_read(record: RunRecord) -> RunRecord:
    """Turn a record as written into one as read: a run that should live and does not is `lost`, and why."""
    if not record.live:
        return record
    silence = time.time() - record.heartbeat
    if record.host == socket.gethostname() and not _is_there(record.pid, record.pid_started):
        return replace(record, state=LOST, stopped_because=f"its process {record.pid} is gone")
    if silence > LOST_AFTER:
        return replace(record, state=LOST, stopped_because=f"no heartbeat for {silence:.0f} s")
    return record


def check_adoptable(record: RunRecord) -> None:
    """Raise `RunIsLive` if `record`, as written, may have a coordinator at work on it."""
    seen = as_read(record)
    if seen.live:
        raise RunIsLive(
            f"run {record.name!r} is {seen.state} (process {record.pid} on {record.host}); stop it before resuming it"
        )
    # Suspended or stuck is not dead: it would wake up and write into the same run.
    if seen.state == LOST and record.host == socket.gethostname() and _is_there(record.pid, record.pid_started):
        raise RunIsLive(
            f"run {record.name!r} has {seen.stopped_because}, but its process {record.pid} still exists;"
            " end that process before resuming the run"
        )


def check_owner(record: RunRecord, owner: ProcessIdentity | None) -> None:
    """Raise `RunTakenOver` if `record`, as written, is another coordinator's than `owner`; None stands for any."""
    if owner is not None and record.owner != owner:
        raise RunTakenOver(
            f"run {record.name!r} was resumed by process {record.pid} on {record.host}, because this one was not heard "
            f"of for {LOST_AFTER:.0f} s: it ends here and goes on there"
        )


def _is_there(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < _START_TOLERANCE and process.status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False
