"""How one process calls another: named Ray actors that may be replaced, and waits that end.

An actor that died is made anew by the coordinator under the same name. A caller holds a `RemoteActor`, which
looks the name up again when the actor it knew is gone.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, OwnerDiedError, RayTaskError

from replay.errors import DeadlineExceeded
from replay.messages import Push

NAMESPACE = "squall"
GONE = (ActorDiedError, ActorUnavailableError, OwnerDiedError)
_LOOK_AT_STOP_EVERY = 0.2
_ASK_AGAIN_AFTER = 0.2
_MOST_BYTES_IN_A_CALL = 64 * 1024
_NICE = 15


class RemoteActor:
    """A named Ray actor; safe to pickle, and to use from several threads."""

    def __init__(self, name: str) -> None:
        """Name the actor; it is looked up at the first call."""
        self.name = name
        self.when_gone: Callable[[], None] | None = None  # called when the actor is found to be gone
        self._handle: Any = None

    def __reduce__(self) -> tuple[type[RemoteActor], tuple[str]]:
        """Pickle the name alone."""
        return RemoteActor, (self.name,)

    def later(self, method: str, *arguments: Any) -> Any:
        """Call without waiting and return the reference to the answer.

        Raises:
            ValueError: no actor of this name lives now.
        """
        handle = self._handle
        if handle is None:
            handle = self._handle = ray.get_actor(self.name, namespace=NAMESPACE)
        return getattr(handle, method).remote(*arguments)

    def forget(self) -> None:
        """Look the name up again at the next call, because the actor is gone."""
        self._handle = None
        if self.when_gone is not None:
            self.when_gone()

    def call(
        self, method: str, *arguments: Any, seconds: float, stop: threading.Event | None = None, asked: Any = None
    ) -> Any:
        """Call and wait for the answer, through deaths and replacements of the actor.

        Args:
            method: name of the actor's method; it may run twice if the actor dies meanwhile.
            arguments: its arguments.
            seconds: deadline.
            stop: an event that ends the wait; the answer is then None.
            asked: reference to the answer, if this very call was made before by `later`.

        Raises:
            DeadlineExceeded: no answer in time; says whether the actor was alive.
            Exception: what the method raised, as itself.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                reference = self.later(method, *arguments) if asked is None else asked
                asked = None
            except ValueError:
                reason = "no process of that name is up"
            else:
                try:
                    return fetch(reference, end - time.monotonic(), stop)
                except GONE as error:
                    reason = f"it is gone ({type(error).__name__})"
                except GetTimeoutError:
                    reason = "it did not answer"
            if time.monotonic() >= end:
                raise DeadlineExceeded(f"waited {seconds:.0f} s for {self.name} to answer {method}: {reason}")
            self.forget()
            if stop is None:
                time.sleep(_ASK_AGAIN_AFTER)
            elif stop.wait(_ASK_AGAIN_AFTER):
                return None


def actor_class(cls: type, *, max_concurrency: int = 1) -> Any:
    """Return `cls` as a Ray actor that takes no CPU slot, and that the coordinator, not Ray, recreates.

    Ray keeps no record of its calls, of which there may be a thousand a second.
    """
    remote: Any = ray.remote
    options = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0, "enable_task_events": False}
    return remote(**options, max_concurrency=max_concurrency)(cls)


def lower_priority(handle: Any) -> Any:
    """Let the learner go before an actor's process where both want a core; return the actor's handle.

    Its threads get the niceness that Ray gives its workers by itself, once the actor is made. Where there are cores
    enough that changes nothing.
    """
    handle.__ray_call__.remote(_lower_thread_priorities)
    return handle


def _lower_thread_priorities(_: Any) -> None:
    # Linux keeps a niceness for each thread; a new thread has that of the one that starts it, which may be of those yet
    # to be told, so look again until none is new.
    told: set[str] = set()
    while new := set(os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else ["0"]) - told:
        for thread in new:
            with suppress(OSError):  # it has ended meanwhile
                nice = max(os.getpriority(os.PRIO_PROCESS, int(thread)), _NICE)
                os.setpriority(os.PRIO_PROCESS, int(thread), nice)
        told |= new


def argument(push: Push) -> Any:
    """Return what to send for a push: itself up to 64 KB, else a reference to its one copy in the object store.

    A reference costs the node's raylet a look at it in every call; a copy in every call is more only for large ones.
    """
    return push if push.bytes <= _MOST_BYTES_IN_A_CALL else ray.put(push)


def fetch(reference: Any, seconds: float, stop: threading.Event | None = None) -> Any:
    """Return the value behind a reference, looking at `stop` meanwhile; None if it was set.

    Raises:
        GetTimeoutError: nothing came within `seconds`.
        Exception: what the remote method raised, as itself rather than wrapped.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            left = max(end - time.monotonic(), 0.0)
            return ray.get(reference, timeout=left if stop is None else min(left, _LOOK_AT_STOP_EVERY))
        except GetTimeoutError:
            if stop is not None and stop.is_set():
                return None
            if time.monotonic() >= end:
                raise
        except RayTaskError as error:
            raise error.cause from error


def is_ready(reference: Any) -> bool:
    """Return whether the value behind a reference can be fetched without waiting."""
    return bool(ray.wait([reference], timeout=0)[0])
