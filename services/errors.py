"""The exceptions of the services; `replay.errors` defines their base class and all other exceptions of Squall.

SquallError
├── RunNameInUse, UnknownRun, UnknownCommand    name that is taken or unknown
├── RunIsLive, RunIsNotLive, RunTakenOver       run in another state than the call requires
├── CommandRefused                              command that the run refused
├── RunFailed, CrashLoop, RayUnavailable        run that cannot start or continue
├── StoreUnavailable, StoreIncompatible,
│   NotStorable                                 failure of the run store
├── DeadlineExceeded
│   └── StoreTimeout                            command that was not answered in time
├── Unauthenticated, Overloaded, ServesNothing,
│   OutOfOrder, NotReady, ServerUnavailable,
│   CallFailed                                  failure of a gRPC call
└── JobServerUnavailable                        failure of Ray's job server
"""

from __future__ import annotations

from replay.errors import DeadlineExceeded, SquallError


class RunNameInUse(SquallError):
    """Another run, live or ended, has this name: choose another name, or resume that run."""

    exit_status = 2
    grpc_code = "ALREADY_EXISTS"


class UnknownRun(SquallError, LookupError):
    """No run has this name; the message lists the most similar names."""

    exit_status = 2
    grpc_code = "NOT_FOUND"


class UnknownCommand(SquallError, LookupError):
    """The run has no command with this id: it was never sent, or it is so old that the store has dropped it."""

    exit_status = 2
    grpc_code = "NOT_FOUND"


class RunIsLive(SquallError):
    """The run already has a coordinator, which must be stopped first."""

    grpc_code = "FAILED_PRECONDITION"


class RunTakenOver(SquallError):
    """Another coordinator has resumed the run, so this coordinator must stop and write nothing more."""


class RunIsNotLive(SquallError):
    """The run has ended or is lost, so no coordinator would read the command."""

    grpc_code = "FAILED_PRECONDITION"


class CommandRefused(SquallError):
    """The run refused a command; the message states the reason."""

    grpc_code = "FAILED_PRECONDITION"


class RunFailed(SquallError):
    """The run could not continue; the message states the reason."""


class CrashLoop(SquallError):
    """A process exits repeatedly before it does any work; the message contains the reason of the last exit."""


class RayUnavailable(SquallError):
    """Ray could not be started or reached; the message states which of the two, and the address."""


class StoreUnavailable(SquallError):
    """The run store does not answer now (locked, deleted, disk full); the same call may succeed later."""

    grpc_code = "UNAVAILABLE"


class StoreIncompatible(SquallError):
    """The store was created by a newer version of Squall or by another program: upgrade, or use another store."""

    grpc_code = "FAILED_PRECONDITION"


class StoreTimeout(DeadlineExceeded):
    """A command was not acknowledged in time; it stays queued."""


class NotStorable(SquallError, TypeError):
    """A payload contains a value that JSON cannot represent; the message names its position in the payload."""


class Unauthenticated(SquallError):
    """A call has no token, or a wrong one."""

    grpc_code = "UNAUTHENTICATED"


class Overloaded(SquallError):
    """Too many concurrent calls, or too large a message; a later call or a smaller message may succeed."""

    grpc_code = "RESOURCE_EXHAUSTED"


class ServesNothing(SquallError):
    """The live run does not offer this service: it was started without `--serve`, or serves its own machine only."""

    grpc_code = "FAILED_PRECONDITION"


class OutOfOrder(SquallError):
    """A message is not allowed at this point of its stream; the error's text states which message is allowed."""

    grpc_code = "FAILED_PRECONDITION"


class NotReady(SquallError):
    """The service is starting or is being restarted; the same call may succeed later."""

    grpc_code = "UNAVAILABLE"


class ServerUnavailable(SquallError):
    """No server answers at this address, or the connection broke; the server may have carried out the call."""

    grpc_code = "UNAVAILABLE"


class CallFailed(SquallError):
    """The server failed unexpectedly; its log contains the reason."""


class JobServerUnavailable(SquallError):
    """Ray's job server cannot be reached, or refuses the token."""
