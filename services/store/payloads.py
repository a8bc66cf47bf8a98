"""Payloads of the run store: conversion between Python values and JSON, and texts of bounded length."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from services.errors import NotStorable

_MAX_TEXT_LENGTH = 20_000


def clean_text(text: str) -> str:
    """Return `text` as valid UTF-8, cut to 20,000 characters; a cut text ends with the number of removed characters."""
    if len(text) > _MAX_TEXT_LENGTH:
        text = f"{text[:_MAX_TEXT_LENGTH]}... ({len(text) - _MAX_TEXT_LENGTH} characters more)"
    return text.encode("utf-8", "replace").decode()


def plain_payload(name: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a payload into plain JSON types; NaN and infinities become None.

    Args:
        name: name of the payload, for error messages.
        payload: mapping of JSON values, NumPy scalars, and tuples.

    Raises:
        NotStorable: a value that JSON cannot represent; the message names its position.
    """
    if not isinstance(payload, Mapping):
        raise NotStorable(f"{name} must be a dict, got {type(payload).__name__}")
    plain: dict[str, Any] = _to_plain(name, payload)
    return plain


def _to_plain(position: str, value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_to_plain(f"{position}[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise NotStorable(f"keys of {position} must be text, got {key!r}")
        return {_to_plain(position, key): _to_plain(f"{position}[{key!r}]", item) for key, item in value.items()}
    raise NotStorable(f"{position} must be plain numbers, text, lists, or dicts, got {type(value).__name__}")


def payload_from_json(text: str | None) -> dict[str, Any] | None:
    """Return the payload that a store keeps as JSON; None if there is none."""
    if text is None:
        return None
    payload: dict[str, Any] = json.loads(text)
    return payload


def plain_metrics(values: Mapping[str, float]) -> dict[str, float]:
    """Copy metrics into Python floats, including NaN and infinities. Raises `NotStorable`, which names the metric."""
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Real):
            raise NotStorable(f"metric {name!r} must be a number, got {value!r} ({type(value).__name__})")
    return {name: float(value) for name, value in values.items()}


def metrics_to_json(values: Mapping[str, float]) -> str:
    """Return metrics as JSON that any language can read: NaN and infinities become "nan", "inf", and "-inf"."""
    return json.dumps(
        {name: value if math.isfinite(value) else str(value) for name, value in plain_metrics(values).items()}
    )


def metrics_from_json(text: str) -> dict[str, float]:
    """Return the metrics that `metrics_to_json` has written."""
    return {name: float(value) for name, value in json.loads(text).items()}
