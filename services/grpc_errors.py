"""Errors on the wire: each has a status code by its type, and the type's name travels along for clients to raise."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import grpc

from replay.types import ConfigurationError, DeadlineExceeded, LayoutMismatch, NotEnoughMemory, SquallError
from services.control import CommandRefused
from services.store import (
    RunIsLive,
    RunIsNotLive,
    RunNameInUse,
    StoreIncompatible,
    StoreTimeout,
    StoreUnavailable,
    UnknownCommand,
    UnknownRun,
)

TRAILER = "squall-error"
_MOST_BYTES = (
    2_000  # a trailer of more than 8 KiB is refused by clients, and percent-encoding triples what is not ASCII
)
_log = logging.getLogger("squall.grpc")


class Unauthenticated(SquallError):
    """The call had no token, or a wrong one."""


class Overloaded(SquallError):
    """More than a server takes: too many calls at once, or too large a message; a smaller or later one may work."""


class ServesNothing(SquallError):
    """The run is live and offers no such service: it was started without `--serve`, or for another machine."""


class NotReady(SquallError):
    """What was asked for is not up yet, or is being recreated; the same call may work later."""


class ServerUnavailable(SquallError):
    """Nobody answers at that address, or the connection broke; whether the call had an effect is not known."""


class CallFailed(SquallError):
    """The server failed in a way that has no name here; its log says more."""


CODES: dict[type[SquallError], grpc.StatusCode] = {
    ConfigurationError: grpc.StatusCode.INVALID_ARGUMENT,
    LayoutMismatch: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownRun: grpc.StatusCode.NOT_FOUND,
    UnknownCommand: grpc.StatusCode.NOT_FOUND,
    RunNameInUse: grpc.StatusCode.ALREADY_EXISTS,
    RunIsLive: grpc.StatusCode.FAILED_PRECONDITION,
    RunIsNotLive: grpc.StatusCode.FAILED_PRECONDITION,
    CommandRefused: grpc.StatusCode.FAILED_PRECONDITION,
    ServesNothing: grpc.StatusCode.FAILED_PRECONDITION,
    StoreIncompatible: grpc.StatusCode.FAILED_PRECONDITION,
    StoreUnavailable: grpc.StatusCode.UNAVAILABLE,
    NotReady: grpc.StatusCode.UNAVAILABLE,
    ServerUnavailable: grpc.StatusCode.UNAVAILABLE,
    StoreTimeout: grpc.StatusCode.DEADLINE_EXCEEDED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NotEnoughMemory: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    CallFailed: grpc.StatusCode.INTERNAL,
    SquallError: grpc.StatusCode.INTERNAL,
}
_BY_NAME = {kind.__name__: kind for kind in CODES}
_BY_CODE: dict[grpc.StatusCode, type[SquallError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: ConfigurationError,
    grpc.StatusCode.UNAVAILABLE: ServerUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
}

Trailers = tuple[tuple[str, str], ...]


def to_status(error: Exception) -> tuple[grpc.StatusCode, str, Trailers]:
    """Return the status code, text and trailers that stand for an error; one without a name is logged, not told."""
    for kind in type(error).__mro__:
        if kind in CODES:
            text = str(error).encode("utf-8", "replace")[:_MOST_BYTES].decode("utf-8", "ignore")
            return CODES[kind], text, ((TRAILER, kind.__name__),)
    _log.error("a call failed unexpectedly", exc_info=error)
    return CODES[CallFailed], "the server failed unexpectedly; its log says why", ((TRAILER, CallFailed.__name__),)


def names_itself(error: grpc.aio.AioRpcError) -> bool:
    """Whether a failed call was answered by a server of Squall's, rather than by the way to it."""
    return any(key == TRAILER for key, _ in error.trailing_metadata() or ())


def from_status(
    code: grpc.StatusCode, text: str | None, trailers: Iterable[tuple[str, Any]] | None, where: str
) -> SquallError:
    """Return the error that a status stands for; `where` is the server's address."""
    named = next((value for key, value in trailers or () if key == TRAILER), None)
    if named in _BY_NAME:
        return _BY_NAME[named](text)
    return _BY_CODE.get(code, CallFailed)(f"{where} answered {code.name}: {text or 'no more'}")
