"""Errors over gRPC: an error is sent as the status code of its class, with the name of the class in a trailer."""

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
_MAX_TEXT_BYTES = 2_000
"""Maximum length of an error's text: clients reject trailers over 8 KiB, and percent-encoding may triple the length."""

_log = logging.getLogger("squall.grpc")

# Meaning of a status without a trailer: it comes from the connection or from a proxy, not from a service of Squall.
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
"""The errors that a client can raise again, by name."""

Trailers = tuple[tuple[str, str], ...]


def to_status(error: Exception) -> tuple[grpc.StatusCode, str, Trailers]:
    """Return the status code, text, and trailers of an error. An error of another library is logged, and not sent."""
    if isinstance(error, SquallError):
        # A subclass that is not in `CLASSES` is sent as its nearest base class that is.
        kind = next(CLASSES[base.__name__] for base in type(error).__mro__ if base in CLASSES.values())
        text = str(error).encode("utf-8", "replace")[:_MAX_TEXT_BYTES].decode("utf-8", "ignore")
    else:
        _log.error("a call failed unexpectedly", exc_info=error)
        kind, text = CallFailed, "the server failed unexpectedly; see its log"
    return grpc.StatusCode[kind.grpc_code], text, ((TRAILER, kind.__name__),)


def is_from_squall(error: grpc.aio.AioRpcError) -> bool:
    """Return whether a Squall server sent this status, rather than the connection or a proxy."""
    return any(key == TRAILER for key, _ in error.trailing_metadata() or ())


def from_status(
    code: grpc.StatusCode, text: str | None, trailers: Iterable[tuple[str, Any]] | None, address: str
) -> SquallError:
    """Return the error for a status; `address` is the server's address."""
    name = next((value for key, value in trailers or () if key == TRAILER), None)
    if name in CLASSES:
        return CLASSES[name](text)
    return _BY_CODE.get(code, CallFailed)(f"{address} answered {code.name}: {text or 'no details'}")
