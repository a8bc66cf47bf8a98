"""Errors across gRPC: an error becomes its class's status code, and the class's name travels along as a trailer."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import grpc

import replay.errors
import services.errors
from replay.errors import ConfigurationError, DeadlineExceeded, SquallError
from services.errors import CallFailed, Overloaded, ServerUnavailable, Unauthenticated

TRAILER = "squall-error"
_MAX_BYTES = 2_000
"""Bytes of an error's text: clients refuse trailers of more than 8 KiB, and percent-encoding may triple the length."""

_log = logging.getLogger("squall.grpc")

# What a status without a trailer means: it comes from the way to the server, not from a service.
_BY_CODE: dict[grpc.StatusCode, type[SquallError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: ConfigurationError,
    grpc.StatusCode.UNAVAILABLE: ServerUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
}

CLASSES: dict[str, type[SquallError]] = {
    name: kind
    for module in (replay.errors, services.errors)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and issubclass(kind, SquallError)
}
"""The errors that a client may raise again, by name."""

Trailers = tuple[tuple[str, str], ...]


def to_status(error: Exception) -> tuple[grpc.StatusCode, str, Trailers]:
    """Return the status code, text, and trailers for an error; an error that is not Squall's is logged, not sent."""
    if isinstance(error, SquallError):
        # A class that is not Squall's own goes by its nearest base class that is.
        kind = next(CLASSES[base.__name__] for base in type(error).__mro__ if base in CLASSES.values())
        text = str(error).encode("utf-8", "replace")[:_MAX_BYTES].decode("utf-8", "ignore")
    else:
        _log.error("a call failed unexpectedly", exc_info=error)
        kind, text = CallFailed, "the server failed unexpectedly; its log says why"
    return grpc.StatusCode[kind.grpc_code], text, ((TRAILER, kind.__name__),)


def names_itself(error: grpc.aio.AioRpcError) -> bool:
    """Return whether a Squall server answered the call, rather than something on the way to it."""
    return any(key == TRAILER for key, _ in error.trailing_metadata() or ())


def from_status(
    code: grpc.StatusCode, text: str | None, trailers: Iterable[tuple[str, Any]] | None, where: str
) -> SquallError:
    """Return the error for a status; `where` is the server's address."""
    name = next((value for key, value in trailers or () if key == TRAILER), None)
    if name in CLASSES:
        return CLASSES[name](text)
    return _BY_CODE.get(code, CallFailed)(f"{where} answered {code.name}: {text or 'no more'}")
