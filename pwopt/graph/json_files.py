"""Read JSON files that somebody else may have written or damaged."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

#: The largest file that is read, in bytes.
MAX_JSON_BYTES = 1 << 28


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is too large, is not JSON, is nested too deeply, or holds a number that is not finite.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"it is larger than {MAX_JSON_BYTES >> 20} MiB")
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse, parse_float=_parse_float)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def read_record(kind: type[T], content: object) -> T:
    """Create a dataclass from a JSON object.

    Fields may be of the types str, int, float, None, unions of those, and tuples, which are lists in JSON.

    Raises
    ------
    ValueError
        If a field is missing, unknown or of another type.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"there is no object but {type(content).__name__}")
    hints = typing.get_type_hints(kind)
    fields = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if set(content) - fields:
        raise ValueError(f"there is no field {min(set(content) - fields)!r}")
    try:
        return kind(**{name: _convert(value, hints[name], name) for name, value in content.items()})
    except TypeError as error:
        raise ValueError(str(error)) from error


def _convert(value: object, hint: Any, name: str) -> object:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None and type(None) in arguments else _convert(value, arguments[0], name)
    if origin is tuple:
        inner = arguments[:1] * len(value) if isinstance(value, list) and arguments[1:] == (...,) else arguments
        if isinstance(value, list) and len(value) == len(inner):
            return tuple(_convert(v, h, name) for v, h in zip(value, inner, strict=True))
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint:
        return value
    raise ValueError(f"the field {name!r} is of the wrong type")
