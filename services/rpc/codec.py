"""Conversion of arrays and spaces to and from messages of squall.proto, for servers and clients.

Decoding checks each message completely before it uses any of its values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from actors.environments import DiscreteActions, EnvironmentSpec
from replay.errors import ConfigurationError
from replay.types import Array
from services.rpc import squall_pb2 as pb

DTYPES: dict[pb.DType, np.dtype[Any]] = {
    pb.DTYPE_BOOL: np.dtype("bool"),
    pb.DTYPE_UINT8: np.dtype("uint8"),
    pb.DTYPE_INT32: np.dtype("<i4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_FLOAT64: np.dtype("<f8"),
}
MAX_AXES = 8
MAX_BOX_BYTES = 2**24
"""Maximum size of one value of a Box space; a larger value fits into no message."""

Shape = Sequence[int | None]


def encode_array(array: Array) -> pb.Array:
    """Return an array as a message.

    Raises:
        ConfigurationError: a dtype that the protocol does not support.
    """
    dtype = encode_dtype(array.dtype)
    return pb.Array(dtype=dtype, shape=array.shape, data=np.ascontiguousarray(array, DTYPES[dtype]).tobytes())


def decode_array(message: pb.Array, name: str, *, dtype: str, shape: Shape) -> Array:
    """Return the array of a message as a read-only view of its bytes, without a copy.

    Args:
        message: the received message.
        name: name of the array, for error messages.
        dtype: NumPy name of the required dtype.
        shape: the required shape; None for an axis of any length.

    Raises:
        ConfigurationError: another dtype, shape, or size of the data; the error names both.
    """
    own = tuple(message.shape)
    fits = len(own) == len(shape) and all(required in (None, size) for size, required in zip(own, shape, strict=True))
    if not fits or DTYPES.get(message.dtype) != np.dtype(dtype):
        raise ConfigurationError(
            f"{name} must be {dtype} of shape {_format_shape(shape)}, "
            f"got {_dtype_name(message.dtype)} of shape {_format_shape(own)}"
        )
    array_bytes = _count(own, name) * np.dtype(dtype).itemsize
    if len(message.data) != array_bytes:
        raise ConfigurationError(
            f"{name}: {dtype} of shape {_format_shape(own)} takes {array_bytes} bytes, got {len(message.data)}"
        )
    if message.dtype == pb.DTYPE_BOOL and np.any(np.frombuffer(message.data, np.uint8) > 1):
        raise ConfigurationError(f"{name}: a bool is a byte of 0 or 1, got other bytes")
    return np.frombuffer(message.data, DTYPES[message.dtype]).reshape(own)


def encode_dtype(dtype: np.dtype[Any] | str) -> pb.DType:
    """Return the protocol's number of a dtype.

    Raises:
        ConfigurationError: a dtype that the protocol does not support.
    """
    for number, known in DTYPES.items():
        if known == np.dtype(dtype).newbyteorder("<"):
            return number
    raise ConfigurationError(
        f"arrays over gRPC are {', '.join(known.name for known in DTYPES.values())}, got {np.dtype(dtype)}"
    )


def encode_space(space: spaces.Space[Any]) -> pb.Space:
    """Return a Gymnasium space as a message; bounds that are equal for all elements are written once.

    Raises:
        ConfigurationError: the space is neither a Discrete that starts at 0 nor a Box with a dtype of the protocol.
    """
    if isinstance(space, spaces.Discrete) and space.start == 0:
        return pb.Space(discrete=pb.Discrete(n=int(space.n)))
    if isinstance(space, spaces.Box):
        dtype = encode_dtype(space.dtype)
        return pb.Space(box=pb.Box(dtype=dtype, shape=space.shape, low=_bounds(space.low), high=_bounds(space.high)))
    raise ConfigurationError(f"spaces over gRPC are Box, and Discrete from 0, got {space}")


def describe_space(message: pb.Space) -> str:
    """Return a text that describes the space of a message without its bounds."""
    kind = message.WhichOneof("kind")
    if kind == "discrete":
        return f"Discrete({message.discrete.n})"
    if kind == "box":
        return f"a Box of {_dtype_name(message.box.dtype)} of shape {_format_shape(message.box.shape)}"
    return "neither a Discrete nor a Box space"


def _bounds(values: Array) -> list[float]:
    flat = [float(value) for value in np.ravel(values)]
    return flat[:1] if len(set(flat)) == 1 else flat


def decode_space(message: pb.Space, name: str) -> spaces.Space[Any]:
    """Return the Gymnasium space of a message.

    Raises:
        ConfigurationError: a missing or invalid space; the error starts with `name`.
    """
    kind = message.WhichOneof("kind")
    if kind == "discrete":
        if message.discrete.n < 1:
            raise ConfigurationError(f"{name}: n of a Discrete space must be positive, got {message.discrete.n}")
        return spaces.Discrete(message.discrete.n)
    if kind != "box":
        raise ConfigurationError(f"{name} must be a Discrete or a Box space, got neither")
    box = message.box
    if box.dtype not in DTYPES:
        raise ConfigurationError(f"{name}: the dtype of a Box must be set, got {_dtype_name(box.dtype)}")
    shape = tuple(box.shape)
    elements = _count(shape, name)
    if elements * DTYPES[box.dtype].itemsize > MAX_BOX_BYTES:
        raise ConfigurationError(f"{name}: a Box takes at most {MAX_BOX_BYTES:,} bytes, got {describe_space(message)}")
    low, high = (
        _decode_bounds(bounds, elements, shape, DTYPES[box.dtype], f"{name}: {bound}")
        for bound, bounds in (("low", box.low), ("high", box.high))
    )
    if not np.all(low <= high):
        raise ConfigurationError(f"{name}: low must not be above high")
    return spaces.Box(low, high, dtype=DTYPES[box.dtype].type)


def _decode_bounds(
    bounds: Sequence[float], elements: int, shape: tuple[int, ...], dtype: np.dtype[Any], name: str
) -> Array:
    if len(bounds) not in (1, elements):
        raise ConfigurationError(f"{name} must have 1 or {elements} numbers, got {len(bounds)}")
    if any(math.isnan(bound) for bound in bounds):
        raise ConfigurationError(f"{name} must contain numbers, got NaN")
    values: Sequence[float] = bounds
    if dtype.kind != "f":
        # The limits of int64 are not representable as doubles: the nearest double lies outside.
        least, most = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        values = [most if bound >= most else least if bound <= least else int(bound) for bound in bounds]
    with np.errstate(over="ignore"):
        flat = np.asarray(values, dtype)
    return np.broadcast_to(flat, elements).reshape(shape).copy()


def spaces_of(environment: EnvironmentSpec) -> tuple[pb.Space, pb.Space]:
    """Return the observation space and the action space of an environment, as its policy sees them.

    Discrete actions are numbered from 0, even if the environment's own numbers start elsewhere.

    Raises:
        ConfigurationError: a dtype that the protocol does not support.
    """
    actions, observations = environment.actions, environment.observation_count
    if observations is not None:
        observation_space = pb.Space(discrete=pb.Discrete(n=observations))
    else:
        low, high = _range_of(np.dtype(environment.observation_dtype))
        dtype = encode_dtype(environment.observation_dtype)
        observation_space = pb.Space(
            box=pb.Box(dtype=dtype, shape=environment.observation_shape, low=[low], high=[high])
        )
    if isinstance(actions, DiscreteActions):
        return observation_space, pb.Space(discrete=pb.Discrete(n=actions.count))
    low_high = {"low": _bounds(np.array(actions.low)), "high": _bounds(np.array(actions.high))}
    return observation_space, pb.Space(box=pb.Box(dtype=encode_dtype(actions.dtype), shape=actions.shape, **low_high))


def _range_of(dtype: np.dtype[Any]) -> tuple[float, float]:
    if dtype.kind == "f":
        return -math.inf, math.inf
    if dtype.kind == "b":
        return 0.0, 1.0
    return float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)


def _count(shape: tuple[int, ...], name: str) -> int:
    if len(shape) > MAX_AXES or any(size < 0 for size in shape):
        raise ConfigurationError(
            f"{name}: a shape has at most {MAX_AXES} axes, none negative, got {len(shape)}: {_format_shape(shape)}"
        )
    return math.prod(shape)


def _dtype_name(dtype: pb.DType) -> str:
    known = DTYPES.get(dtype)
    return f"dtype number {dtype}" if known is None else known.name


def _format_shape(shape: Shape) -> str:
    sizes = ["B" if size is None else str(size) for size in shape[:MAX_AXES]]
    return f"[{', '.join(sizes)}{', ...' if len(shape) > MAX_AXES else ''}]"
