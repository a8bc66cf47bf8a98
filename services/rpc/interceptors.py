"""The interceptor that turns errors into gRPC status codes, and the limits on messages, calls, and waits."""

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

MAX_MESSAGE_BYTES = 16 * 2**20
"""Maximum size of one message, in both directions."""
MAX_CALLS = 4_096
"""Maximum number of concurrent calls; further calls are rejected."""
FIRST_MESSAGE_SECONDS = 60.0
"""Deadline of a call's first message; gRPC's core alone would wait forever."""
IDLE_SECONDS = 300.0
"""Deadline for a client to receive an answer, and for the client of a session to send its next message."""

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"
_Result = TypeVar("_Result")


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns the errors of calls into status codes, including errors of decoding a message."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Handler | None:
        """Return the call's handler, wrapped so that its errors become status codes."""
        wrapped = self._handlers.get(details.method)
        if wrapped is None:
            handler = await continuation(details)
            if handler is None:
                return None
            wrapped = self._handlers[details.method] = _wrap(handler)
        return wrapped


def _wrap(handler: Any) -> Handler:
    """Return a handler that decodes its requests itself, to report invalid messages and to bound the waits.

    The handler takes a stream of requests even for a unary method: before it calls a handler of a unary request, gRPC's
    core waits for the request without a deadline.
    """
    requests, responses = (
        "stream" if streams else "unary" for streams in (handler.request_streaming, handler.response_streaming)
    )
    inner, decode = getattr(handler, f"{requests}_{responses}"), _decoder(handler.request_deserializer)

    async def decoded(raw: Any) -> Any:
        return _decode_each(raw, decode) if handler.request_streaming else decode(await _first_message(raw))

    async def answer(raw: Any, context: Any) -> Any:
        try:
            return await inner(await decoded(raw), context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await abort(context, error)

    async def answer_each(raw: Any, context: Any) -> None:
        try:
            # Closed here, so that the generator ends with the call, not when it is garbage-collected.
            async with contextlib.aclosing(inner(await decoded(raw), context)) as stream:
                async for response in stream:
                    await wait_at_most(IDLE_SECONDS, context.write(response), "the caller to receive an answer")
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await abort(context, error)

    make: Any = getattr(grpc, f"stream_{responses}_rpc_method_handler")
    behavior = answer_each if inspect.isasyncgenfunction(inner) else answer
    wrapped: Handler = make(behavior, response_serializer=handler.response_serializer)
    return wrapped


def _decoder(deserialize: Any) -> Callable[[bytes | None], Any]:
    name = getattr(getattr(deserialize, "__self__", None), "__name__", "message")

    def decode(raw: bytes | None) -> Any:
        if raw is None:
            raise ConfigurationError(f"the call ended without its {name}")
        try:
            return deserialize(raw)
        except DecodeError as error:
            raise ConfigurationError(f"received {len(raw)} bytes that are not a valid {name}") from error

    return decode


async def _decode_each(raw: AsyncIterator[bytes], decode: Callable[[bytes | None], Any]) -> AsyncIterator[Any]:
    message = await _first_message(raw)
    while message is not None:
        yield decode(message)
        message = await anext(raw, None)


async def _first_message(raw: AsyncIterator[bytes]) -> bytes | None:
    """Return the first message of a call, or None if the call has ended without one."""
    return await wait_at_most(FIRST_MESSAGE_SECONDS, anext(raw, None), "the call's first message")


async def wait_at_most(seconds: float, awaitable: Awaitable[_Result], name: str) -> _Result:
    """Wait for a client's action and return its result.

    Raises:
        DeadlineExceeded: no result within `seconds`; the message contains `name`.
    """
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await awaitable
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlineExceeded(f"waited {seconds:g} s for {name}") from error


async def abort(context: Any, error: Exception) -> None:
    """End a call with the status of an error."""
    if isinstance(error, grpc.aio.AioRpcError):
        # Forward the status of a server behind this one, such as an endpoint behind a gateway.
        trailers = tuple((key, value) for key, value in error.trailing_metadata() or () if key == TRAILER)
        await context.abort(error.code(), error.details() or "", trailers)
    if isinstance(error, NotImplementedError) and context.code() is grpc.StatusCode.UNIMPLEMENTED:
        # Set by gRPC's base class of a service, for a method that the service does not override.
        await context.abort(context.code(), context.details())
    code, text, trailers = to_status(error)
    await context.abort(code, text, trailers)
