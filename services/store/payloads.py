"""Payloads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from services.errors import NotStorable

_LONGEST_TEXT = 20_000


def clean_text(text: str) -> str:
    """Make `text` storable: valid UTF-8, at most 20,000 characters, with a word on what was cut."""
    if len(text) > _LONGEST_TEXT:
        text = f"{text[:_LONGEST_TEXT]}... ({len(text) - _LONGEST_TEXT} characters more)"
    return text.encode("utf-8", "replace").decode()


def plain_payload(what: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a payload into plain JSON types; NaN and infinities become None.

    Raises:
        NotStorable: something that is not plain; the text names the place.
    """
    if not isinstance(payload, Mapping):
        raise NotStorable(f"{what} must be a dict, got {type(payload).__name__}")
    plain: dict[str, Any] = _plain(what, payload)
    return plain


def _plain(where: str, value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(f"{where}[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise NotStorable(f"keys of {where} must be text, got {key!r}")
        return {_plain(where, key): _plain(f"{where}[{key!r}]", item) for key, item in value.items()}
    raise NotStorable(f"{where} must be plain numbers, text, lists or dicts, got {type(value).__name__}")


def plain_metrics(values: Mapping[str, float]) -> dict[str, float]:
    """Copy metrics into Python floats, NaN and infinities too. Raises `NotStorable`, naming the metric."""
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Real):
            raise NotStorable(f"metric {name!r} must be a number, got {value!r} ({type(value).__name__})")
    return {name: float(value) for name, value in values.items()}


def metrics_to_json(values: Mapping[str, float]) -> str:
    """Write metrics as JSON that any language reads: `"nan"`, `"inf"` and `"-inf"` become text."""
    return json.dumps(
        {name: value if math.isfinite(value) else str(value) for name, value in plain_metrics(values).items()}
    )


def metrics_from_json(text: str) -> dict[str, float]:
    """Undo `metrics_to_json`."""
    return {name: float(value) for name, value in json.loads(text).items()}
