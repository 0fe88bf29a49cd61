"""Functions of a model that remember what they said of the last few."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import TypeVar

import onnx

T = TypeVar("T")

#: Models remembered: an original as it is and with its sizes, and what became of both.
LATEST = 4


def digest(model: onnx.ModelProto) -> str:
    """Equal for models with the same content; whatever is external counts by its place only."""
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def memoize(function: Callable[[onnx.ModelProto], T]) -> Callable[[onnx.ModelProto], T]:
    """`function`, called once for models with the same content; its results must not be changed.

    A model is rewritten again and again while its rewrites are chosen, each time from the same beginning.
    """
    known: dict[str, tuple[T]] = {}

    @functools.wraps(function)
    def remembering(model: onnx.ModelProto) -> T:
        # Each step on `known` is atomic, so threads need no lock, which a forked process might inherit locked.
        key = digest(model)
        found = known.get(key) or (function(model),)
        known.pop(key, None)
        known[key] = found
        for old in list(known)[:-LATEST]:
            known.pop(old, None)
        return found[0]

    return remembering
