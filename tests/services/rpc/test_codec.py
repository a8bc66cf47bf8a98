"""Conversion of arrays and spaces to messages and back, and rejection of invalid messages."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from actors.environments import specify
from replay.errors import ConfigurationError
from replay.types import Array
from services.rpc import squall_pb2 as pb
from services.rpc.codec import DTYPES, decode_array, decode_space, encode_array, encode_space, spaces_of

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


@given(hnp.arrays(st.sampled_from([dtype.name for dtype in DTYPES.values()]), SHAPES))
def test_an_array_comes_back_as_it_was(array: Array) -> None:
    message = pb.Array.FromString(encode_array(array).SerializeToString())
    decoded = decode_array(message, "it", dtype=array.dtype.name, shape=array.shape)
    assert (decoded.dtype, decoded.shape) == (array.dtype, array.shape)
    assert decoded.tobytes() == array.tobytes()


def test_bytes_are_little_endian_and_in_c_order() -> None:
    array = np.arange(6, dtype=">i4").reshape(2, 3).T
    assert encode_array(array).data == b"".join(n.to_bytes(4, "little") for n in (0, 3, 1, 4, 2, 5))


@pytest.mark.parametrize(
    ("dtype", "shape", "size", "words"),
    [
        (pb.DTYPE_FLOAT64, [2, 4], 64, "it must be float32 of shape [B, 4], got float64 of shape [2, 4]"),
        (pb.DTYPE_FLOAT32, [2, 5], 40, "it must be float32 of shape [B, 4], got float32 of shape [2, 5]"),
        (pb.DTYPE_FLOAT32, [8], 32, "got float32 of shape [8]"),
        (pb.DTYPE_FLOAT32, [2, 2, 2], 32, "got float32 of shape [2, 2, 2]"),
        (pb.DTYPE_UNSPECIFIED, [2, 4], 32, "got dtype number 0 of shape [2, 4]"),
        (77, [2, 4], 32, "got dtype number 77"),
        (pb.DTYPE_FLOAT32, [2, 4], 31, "it: float32 of shape [2, 4] takes 32 bytes, got 31"),
        (pb.DTYPE_FLOAT32, [2**62, 4], 0, f"takes {2**62 * 16} bytes, got 0"),
        (pb.DTYPE_FLOAT32, [-1, 4], 16, "none negative"),
        (pb.DTYPE_FLOAT32, [1] * 1000, 16, "got float32 of shape [1, 1, 1, 1, 1, 1, 1, 1, ...]"),
    ],
)
def test_another_dtype_shape_or_size_is_refused_with_both(dtype: int, shape: list[int], size: int, words: str) -> None:
    message = pb.Array(dtype=dtype, shape=shape, data=bytes(size))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        decode_array(message, "it", dtype="float32", shape=(None, 4))


def test_a_bool_is_0_or_1() -> None:
    with pytest.raises(ConfigurationError, match="0 or 1"):
        decode_array(pb.Array(dtype=pb.DTYPE_BOOL, shape=[2], data=b"\x01\x02"), "it", dtype="bool", shape=(2,))


def test_a_dtype_without_a_place_in_the_protocol_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="got float16"):
        encode_array(np.zeros(3, np.float16))


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(7),
        spaces.Box(0, 255, (4, 84, 84), np.uint8),
        spaces.Box(-np.inf, np.inf, (3,), np.float32),
        spaces.Box(np.array([-1.0, 0.0]), np.array([1.0, 0.5]), dtype=np.float64),
        spaces.Box(np.iinfo(np.int64).min, np.iinfo(np.int64).max, (2,), np.int64),
        spaces.Box(-2.0, 2.0, (), np.float32),
    ],
)
def test_a_space_comes_back_as_it_was(space: spaces.Space[Any]) -> None:
    assert decode_space(encode_space(space), "it") == space


def test_bounds_that_are_alike_are_written_once() -> None:
    assert list(encode_space(spaces.Box(0, 255, (4, 84, 84), np.uint8)).box.high) == [255.0]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (pb.Space(), "it must be a Discrete or a Box space"),
        (pb.Space(discrete=pb.Discrete(n=0)), "n of a Discrete space must be positive, got 0"),
        (pb.Space(box=pb.Box(shape=[1], low=[0], high=[1])), "dtype number 0"),
        (pb.Space(box=pb.Box(dtype=pb.DTYPE_FLOAT32, shape=[3], low=[0, 1], high=[1])), "1 or 3 numbers, got 2"),
        (pb.Space(box=pb.Box(dtype=pb.DTYPE_FLOAT32, shape=[2**40], low=[0], high=[1])), "at most"),
        (pb.Space(box=pb.Box(dtype=pb.DTYPE_FLOAT64, shape=[2**22], low=[0], high=[1])), "at most 16,777,216 bytes"),
        (pb.Space(box=pb.Box(dtype=pb.DTYPE_FLOAT32, shape=[-1], low=[0], high=[1])), "none negative"),
        (pb.Space(box=pb.Box(dtype=pb.DTYPE_FLOAT32, shape=[1], low=[float("nan")], high=[1])), "NaN"),
        (pb.Space(box=pb.Box(dtype=pb.DTYPE_FLOAT32, shape=[1], low=[2], high=[1])), "low must not be above high"),
    ],
)
def test_a_space_that_cannot_be_is_refused(message: pb.Space, words: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        decode_space(message, "it")


def test_an_environments_spaces_are_those_that_its_policy_sees() -> None:
    observations, actions = spaces_of(specify("CartPole-v1"))
    assert decode_space(observations, "it") == spaces.Box(-np.inf, np.inf, (4,), np.float32)
    assert decode_space(actions, "it") == spaces.Discrete(2)
    _, box = spaces_of(specify("Pendulum-v1"))
    assert decode_space(box, "it") == spaces.Box(-2.0, 2.0, (1,), np.float32)
