"""Errors of the services; their base class and those of replay, rollout workers, and learner are in `replay.errors`.

SquallError
├── RunNameInUse, UnknownRun, UnknownCommand    a name that cannot be taken, or is not there
├── RunIsLive, RunIsNotLive, RunTakenOver       a run in another state than the call needs
├── CommandRefused                              a command that the run refuses
├── RunFailed, CrashLoop, RayUnavailable        a run that cannot start or go on
├── StoreUnavailable, StoreIncompatible,
│   NotStorable                                 the run store
├── DeadlineExceeded
│   └── StoreTimeout                            a command without an answer
├── Unauthenticated, Overloaded, ServesNothing,
│   OutOfOrder, NotReady, ServerUnavailable,
│   CallFailed                                  gRPC
└── JobServerUnavailable                        Ray's job server
"""

from __future__ import annotations

from replay.errors import DeadlineExceeded, SquallError


class RunNameInUse(SquallError):
    """Another run, alive or ended, has this name: choose another, or resume that run."""

    exit_status = 2
    grpc_code = "ALREADY_EXISTS"


class UnknownRun(SquallError, LookupError):
    """No run has this name; the text lists the nearest names."""

    exit_status = 2
    grpc_code = "NOT_FOUND"


class UnknownCommand(SquallError, LookupError):
    """The run was never sent this command, or so long ago that the store no longer has it."""

    exit_status = 2
    grpc_code = "NOT_FOUND"


class RunIsLive(SquallError):
    """The run already has a coordinator: stop that one first."""

    grpc_code = "FAILED_PRECONDITION"


class RunTakenOver(SquallError):
    """Another coordinator has resumed the run: this one must end and write nothing more."""


class RunIsNotLive(SquallError):
    """The run has ended or is lost, so no coordinator would read the command."""

    grpc_code = "FAILED_PRECONDITION"


class CommandRefused(SquallError):
    """The run refuses a command; the text says why."""

    grpc_code = "FAILED_PRECONDITION"


class RunFailed(SquallError):
    """A run that could not go on; the text says why."""


class CrashLoop(SquallError):
    """A process that exits again and again before it does any work; the text has the last reason."""


class RayUnavailable(SquallError):
    """Ray could not be started or reached; the text says which, and where."""


class StoreUnavailable(SquallError):
    """The store does not answer now (locked, deleted, disk full); the same call may work later."""

    grpc_code = "UNAVAILABLE"


class StoreIncompatible(SquallError):
    """The store was made by a newer Squall or by another program: upgrade, or use another store."""

    grpc_code = "FAILED_PRECONDITION"


class StoreTimeout(DeadlineExceeded):
    """A command that was not acknowledged in time; it stays queued."""


class NotStorable(SquallError, TypeError):
    """A payload with a value that JSON cannot hold; the text says where."""


class Unauthenticated(SquallError):
    """A call without a token, or with a wrong one."""

    grpc_code = "UNAUTHENTICATED"


class Overloaded(SquallError):
    """Too many calls at once, or too large a message; a later or smaller call may work."""

    grpc_code = "RESOURCE_EXHAUSTED"


class ServesNothing(SquallError):
    """The run is live and offers no such service: it was started without `--serve`, or for another machine."""

    grpc_code = "FAILED_PRECONDITION"


class OutOfOrder(SquallError):
    """A message that may not come now in its stream; the text says which may."""

    grpc_code = "FAILED_PRECONDITION"


class NotReady(SquallError):
    """The service is not up yet, or is being recreated; the same call may work later."""

    grpc_code = "UNAVAILABLE"


class ServerUnavailable(SquallError):
    """Nothing answers at that address, or the connection broke; the call may have had an effect."""

    grpc_code = "UNAVAILABLE"


class CallFailed(SquallError):
    """The server failed unexpectedly; its log says why."""


class JobServerUnavailable(SquallError):
    """Ray's job server cannot be reached, or refuses the token."""
