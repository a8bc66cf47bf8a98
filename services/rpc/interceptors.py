"""Interceptors."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError

from replay.errors import ConfigurationError, DeadlineExceeded
from services.rpc.errors import TRAILER, to_status

MOST_BYTES = 16 * 2**20
"""Bytes in one message, either way."""


MOST_CALLS = 4_096
"""Calls under way at once; more are turned away."""


FIRST_MESSAGE_SECONDS = 60.0
"""A call whose first message takes longer is ended: core alone would wait for it for ever."""


IDLE_SECONDS = 300.0
"""A call whose peer takes no answer for so long is ended, and a session whose client says nothing."""


Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"
_Result = TypeVar("_Result")


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns errors into status codes, those of reading a message too."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Handler | None:
        """Wrap the handler of a call, so that its errors become statuses."""
        known = self._handlers.get(details.method)
        if known is None:
            handler = await continuation(details)
            if handler is None:
                return None
            known = self._handlers[details.method] = _translating(handler)
        return known


def _translating(handler: Any) -> Handler:
    """Return a handler like the given one that reads its requests itself, to say what was wrong and not to wait long.

    It takes a stream of them in any case, because before a handler of a single one is called core waits for that one.
    """
    asks, answers = (
        "stream" if streams else "unary" for streams in (handler.request_streaming, handler.response_streaming)
    )
    inner, read = getattr(handler, f"{asks}_{answers}"), _reader(handler.request_deserializer)

    async def requests_of(raw: Any) -> Any:
        return _read_each(raw, read) if handler.request_streaming else read(await _first_of(raw))

    async def answer(raw: Any, context: Any) -> Any:
        try:
            return await inner(await requests_of(raw), context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await abort(context, error)

    async def answer_each(raw: Any, context: Any) -> None:
        try:
            # Closed here, so that it ends with the call, not when it is collected.
            async with contextlib.aclosing(inner(await requests_of(raw), context)) as responses:
                async for response in responses:
                    await in_time(context.write(response), IDLE_SECONDS, "the caller to take an answer")
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await abort(context, error)

    make: Any = getattr(grpc, f"stream_{answers}_rpc_method_handler")
    behaviour = answer_each if inspect.isasyncgenfunction(inner) else answer
    made: Handler = make(behaviour, response_serializer=handler.response_serializer)
    return made


def _reader(deserialize: Any) -> Callable[[bytes | None], Any]:
    name = getattr(getattr(deserialize, "__self__", None), "__name__", "message")

    def read(raw: bytes | None) -> Any:
        if raw is None:
            raise ConfigurationError(f"the call ended without its {name}")
        try:
            return deserialize(raw)
        except DecodeError as error:
            raise ConfigurationError(f"{len(raw)} bytes came that are no {name}") from error

    return read


async def _read_each(raw: AsyncIterator[bytes], read: Callable[[bytes | None], Any]) -> AsyncIterator[Any]:
    message = await _first_of(raw)
    while message is not None:
        yield read(message)
        message = await anext(raw, None)


async def _first_of(raw: AsyncIterator[bytes]) -> bytes | None:
    """Return the first message of a call, or None if it has none."""
    return await in_time(anext(raw, None), FIRST_MESSAGE_SECONDS, "the call's first message")


async def in_time(waited_for: Awaitable[_Result], seconds: float, what: str) -> _Result:
    """Wait for something that a caller must do.

    Raises:
        DeadlineExceeded: it was not done within `seconds`.
    """
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await waited_for
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlineExceeded(f"waited {seconds:g} s for {what}") from error


async def abort(context: Any, error: Exception) -> None:
    """End a call with an error's status."""
    if isinstance(error, grpc.aio.AioRpcError):
        # A server behind this one said so.
        trailers = tuple((key, value) for key, value in error.trailing_metadata() or () if key == TRAILER)
        await context.abort(error.code(), error.details() or "", trailers)
    if isinstance(error, NotImplementedError) and context.code() is grpc.StatusCode.UNIMPLEMENTED:
        # So says gRPC's own base class of a service for a method that is not overridden.
        await context.abort(context.code(), context.details())
    code, text, named = to_status(error)
    await context.abort(code, text, named)
