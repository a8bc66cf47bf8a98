"""Calls between processes: named Ray actors that the coordinator may recreate, and waits with a deadline.

The coordinator recreates a dead actor under the same name. A caller holds a `RemoteActor`, which looks the name up
again once the previous actor has died.
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
"""Errors of a call to an actor that has died or cannot be reached."""
_STOP_POLL_SECONDS = 0.2
_RETRY_SECONDS = 0.2
_MAX_INLINE_BYTES = 64 * 1024
_NICENESS = 15


class RemoteActor:
    """A named Ray actor; can be pickled, and used from several threads.

    Attributes:
        name: the actor's name.
        on_forget: function that `forget` calls, or None; not pickled.
    """

    def __init__(self, name: str) -> None:
        """Store the actor's name; the first call looks the name up."""
        self.name = name
        self.on_forget: Callable[[], None] | None = None
        self._handle: Any = None

    def __reduce__(self) -> tuple[type[RemoteActor], tuple[str]]:
        """Pickle only the name."""
        return RemoteActor, (self.name,)

    def later(self, method: str, *arguments: Any) -> Any:
        """Call a method without waiting and return the reference to its result.

        Raises:
            ValueError: no actor with this name exists now.
        """
        handle = self._handle
        if handle is None:
            handle = self._handle = ray.get_actor(self.name, namespace=NAMESPACE)
        return getattr(handle, method).remote(*arguments)

    def forget(self) -> None:
        """Drop the handle of an actor that has died or does not answer; the next call looks the name up again."""
        self._handle = None
        if self.on_forget is not None:
            self.on_forget()

    def call(
        self, method: str, *arguments: Any, seconds: float, stop: threading.Event | None = None, pending: Any = None
    ) -> Any:
        """Call a method and return its result; repeat the call if the actor dies and is recreated.

        Args:
            method: name of the actor's method; it may run twice if the actor dies during the call.
            arguments: arguments of the method.
            seconds: deadline of the call.
            stop: event that ends the wait; `call` then returns None.
            pending: reference to the result of the same call if `later` has already made it.

        Raises:
            DeadlineExceeded: the deadline passed; the message states whether the actor was alive.
            Exception: the exception that the method raised.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                reference = self.later(method, *arguments) if pending is None else pending
                pending = None
            except ValueError:
                reason = "no process with that name is running"
            else:
                try:
                    return fetch(reference, end - time.monotonic(), stop)
                except GONE as error:
                    reason = f"the process died or cannot be reached ({type(error).__name__})"
                except GetTimeoutError:
                    reason = "the process did not answer"
            if time.monotonic() >= end:
                raise DeadlineExceeded(f"waited {seconds:.0f} s for {self.name} to answer {method}: {reason}")
            self.forget()
            if stop is None:
                time.sleep(_RETRY_SECONDS)
            elif stop.wait(_RETRY_SECONDS):
                return None


def actor_class(cls: type, *, max_concurrency: int = 1) -> Any:
    """Return `cls` as a Ray actor that occupies no CPU slot and that the coordinator, not Ray, recreates.

    Ray records no task events for the actor, because there may be a thousand calls per second.
    """
    remote: Any = ray.remote
    options = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0, "enable_task_events": False}
    return remote(**options, max_concurrency=max_concurrency)(cls)


def lower_priority(handle: Any) -> Any:
    """Lower the CPU priority of an actor's process below the learner's, and return the actor's handle.

    Once the actor has started, its threads get a niceness of 15, the default of Ray's workers. On a machine with enough
    cores for all processes, the priority makes no difference.
    """
    handle.__ray_call__.remote(_lower_thread_priorities)
    return handle


def _lower_thread_priorities(_: Any) -> None:
    # On Linux each thread has its own niceness, which a new thread inherits from the thread that starts it. A thread
    # whose niceness is not yet raised may start another one meanwhile, so list the threads until none is new.
    done: set[str] = set()
    while new := set(os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else ["0"]) - done:
        for thread in new:
            with suppress(OSError):  # the thread has ended
                niceness = max(os.getpriority(os.PRIO_PROCESS, int(thread)), _NICENESS)
                os.setpriority(os.PRIO_PROCESS, int(thread), niceness)
        done |= new


def argument(push: Push) -> Any:
    """Return the call argument for a push: the push itself up to 64 KiB, else a reference to it in the object store.

    The node's raylet handles each reference in each call, which costs more than a copy of a small push. A large push is
    stored once, so that repeated calls do not copy it again.
    """
    return push if push.bytes <= _MAX_INLINE_BYTES else ray.put(push)


def fetch(reference: Any, seconds: float, stop: threading.Event | None = None) -> Any:
    """Block until the value of a reference is ready and return it; return None if `stop` is set first.

    Raises:
        GetTimeoutError: the value was not ready within `seconds`.
        Exception: the exception that the remote method raised, without Ray's wrapper.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            remaining = max(end - time.monotonic(), 0.0)
            return ray.get(reference, timeout=remaining if stop is None else min(remaining, _STOP_POLL_SECONDS))
        except GetTimeoutError:
            if stop is not None and stop.is_set():
                return None
            if time.monotonic() >= end:
                raise
        except RayTaskError as error:
            raise error.cause from error


def is_ready(reference: Any) -> bool:
    """Return whether the value of a reference can be fetched without waiting."""
    return bool(ray.wait([reference], timeout=0)[0])
