"""Arrays and spaces as messages of squall.proto, for both ends of a call; nothing is believed before it is checked."""

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
MOST_AXES = 8
MOST_BOX_BYTES = 2**24
"""In one value of a Box space; a larger one fits no message."""

Shape = Sequence[int | None]


def encode_array(array: Array) -> pb.Array:
    """Return an array as a message.

    Raises:
        ConfigurationError: its dtype has no place in the protocol.
    """
    dtype = encode_dtype(array.dtype)
    return pb.Array(dtype=dtype, shape=array.shape, data=np.ascontiguousarray(array, DTYPES[dtype]).tobytes())


def decode_array(message: pb.Array, what: str, *, dtype: str, shape: Shape) -> Array:
    """Return the array in a message, a read-only view of it; nothing is allocated.

    Args:
        message: what came.
        what: its name, for the error.
        dtype: NumPy name of the dtype that it must have.
        shape: that it must have; None where an axis may have any length.

    Raises:
        ConfigurationError: another dtype or shape, or data of another size; the text names both.
    """
    own = tuple(message.shape)
    fits = len(own) == len(shape) and all(wanted in (None, size) for size, wanted in zip(own, shape, strict=True))
    if not fits or DTYPES.get(message.dtype) != np.dtype(dtype):
        raise ConfigurationError(
            f"{what} must be {dtype} of shape {_shown(shape)}, got {_name(message.dtype)} of shape {_shown(own)}"
        )
    array_bytes = _count(own, what) * np.dtype(dtype).itemsize
    if len(message.data) != array_bytes:
        raise ConfigurationError(
            f"{what}: {dtype} of shape {_shown(own)} takes {array_bytes} bytes, got {len(message.data)}"
        )
    if message.dtype == pb.DTYPE_BOOL and np.any(np.frombuffer(message.data, np.uint8) > 1):
        raise ConfigurationError(f"{what}: a bool is a byte of 0 or 1, got other bytes")
    return np.frombuffer(message.data, DTYPES[message.dtype]).reshape(own)


def encode_dtype(dtype: np.dtype[Any] | str) -> pb.DType:
    """Return a dtype as the protocol numbers it.

    Raises:
        ConfigurationError: it has no place in the protocol.
    """
    for number, known in DTYPES.items():
        if known == np.dtype(dtype).newbyteorder("<"):
            return number
    raise ConfigurationError(
        f"arrays over gRPC are {', '.join(known.name for known in DTYPES.values())}, got {np.dtype(dtype)}"
    )


def encode_space(space: spaces.Space[Any]) -> pb.Space:
    """Return a Gymnasium space as a message; bounds that are all alike are written once.

    Raises:
        ConfigurationError: it is neither a Discrete that starts at 0 nor a Box of a dtype of the protocol.
    """
    if isinstance(space, spaces.Discrete) and space.start == 0:
        return pb.Space(discrete=pb.Discrete(n=int(space.n)))
    if isinstance(space, spaces.Box):
        dtype = encode_dtype(space.dtype)
        return pb.Space(box=pb.Box(dtype=dtype, shape=space.shape, low=_bounds(space.low), high=_bounds(space.high)))
    raise ConfigurationError(f"spaces over gRPC are Box, and Discrete from 0, got {space}")


def describe_space(message: pb.Space) -> str:
    """Return what the space in a message is, but for its bounds, in words."""
    kind = message.WhichOneof("kind")
    if kind == "discrete":
        return f"Discrete({message.discrete.n})"
    if kind == "box":
        return f"a Box of {_name(message.box.dtype)} of shape {_shown(message.box.shape)}"
    return "neither a Discrete nor a Box space"


def _bounds(values: Array) -> list[float]:
    flat = [float(value) for value in np.ravel(values)]
    return flat[:1] if len(set(flat)) == 1 else flat


def decode_space(message: pb.Space, what: str) -> spaces.Space[Any]:
    """Return the Gymnasium space in a message.

    Raises:
        ConfigurationError: there is none in it, or one that cannot be; the text starts with `what`.
    """
    kind = message.WhichOneof("kind")
    if kind == "discrete":
        if message.discrete.n < 1:
            raise ConfigurationError(f"{what}: n of a Discrete space must be positive, got {message.discrete.n}")
        return spaces.Discrete(message.discrete.n)
    if kind != "box":
        raise ConfigurationError(f"{what} must be a Discrete or a Box space, got neither")
    box = message.box
    if box.dtype not in DTYPES:
        raise ConfigurationError(f"{what}: the dtype of a Box must be set, got {_name(box.dtype)}")
    shape = tuple(box.shape)
    elements = _count(shape, what)
    if elements * DTYPES[box.dtype].itemsize > MOST_BOX_BYTES:
        raise ConfigurationError(f"{what}: a Box takes at most {MOST_BOX_BYTES:,} bytes, got {describe_space(message)}")
    low, high = (
        _decode_bounds(bounds, elements, shape, DTYPES[box.dtype], f"{what}: {name}")
        for name, bounds in (("low", box.low), ("high", box.high))
    )
    if not np.all(low <= high):
        raise ConfigurationError(f"{what}: low must not be above high")
    return spaces.Box(low, high, dtype=DTYPES[box.dtype].type)


def _decode_bounds(
    bounds: Sequence[float], elements: int, shape: tuple[int, ...], dtype: np.dtype[Any], what: str
) -> Array:
    if len(bounds) not in (1, elements):
        raise ConfigurationError(f"{what} must have 1 or {elements} numbers, got {len(bounds)}")
    if any(math.isnan(bound) for bound in bounds):
        raise ConfigurationError(f"{what} must hold numbers, got NaN")
    values: Sequence[float] = bounds
    if dtype.kind != "f":
        # The ends of int64 are no doubles: the nearest one lies outside.
        least, most = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        values = [most if bound >= most else least if bound <= least else int(bound) for bound in bounds]
    with np.errstate(over="ignore"):
        flat = np.asarray(values, dtype)
    return np.broadcast_to(flat, elements).reshape(shape).copy()


def spaces_of(environment: EnvironmentSpec) -> tuple[pb.Space, pb.Space]:
    """Return the observation and action space of an environment, as its policy sees them.

    Actions of a Discrete space are numbered from 0, whatever number the environment's own begin with.

    Raises:
        ConfigurationError: a dtype that has no place in the protocol.
    """
    actions, observations = environment.actions, environment.observation_count
    if observations is not None:
        observed = pb.Space(discrete=pb.Discrete(n=observations))
    else:
        low, high = _range_of(np.dtype(environment.observation_dtype))
        dtype = encode_dtype(environment.observation_dtype)
        observed = pb.Space(box=pb.Box(dtype=dtype, shape=environment.observation_shape, low=[low], high=[high]))
    if isinstance(actions, DiscreteActions):
        return observed, pb.Space(discrete=pb.Discrete(n=actions.count))
    low_high = {"low": _bounds(np.array(actions.low)), "high": _bounds(np.array(actions.high))}
    return observed, pb.Space(box=pb.Box(dtype=encode_dtype(actions.dtype), shape=actions.shape, **low_high))


def _range_of(dtype: np.dtype[Any]) -> tuple[float, float]:
    if dtype.kind == "f":
        return -math.inf, math.inf
    if dtype.kind == "b":
        return 0.0, 1.0
    return float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)


def _count(shape: tuple[int, ...], what: str) -> int:
    if len(shape) > MOST_AXES or any(size < 0 for size in shape):
        raise ConfigurationError(
            f"{what}: a shape has at most {MOST_AXES} axes, none negative, got {len(shape)}: {_shown(shape)}"
        )
    return math.prod(shape)


def _name(dtype: pb.DType) -> str:
    known = DTYPES.get(dtype)
    return f"dtype number {dtype}" if known is None else known.name


def _shown(shape: Shape) -> str:
    sizes = ["B" if size is None else str(size) for size in shape[:MOST_AXES]]
    return f"[{', '.join(sizes)}{', ...' if len(shape) > MOST_AXES else ''}]"
