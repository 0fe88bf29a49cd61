"""Memoization of functions of a model."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import TypeVar

import onnx

T = TypeVar("T")

#: The number of models whose results are kept: an original and its result, each with and without fixed sizes.
LATEST = 4


def digest(model: onnx.ModelProto) -> str:
    """A digest that is equal for models with the same content. Of external data, only its place counts."""
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def memoize(function: Callable[[onnx.ModelProto], T]) -> Callable[[onnx.ModelProto], T]:
    """Call `function` only once for models with the same content. Callers must not change its results.

    A model is rewritten many times while its rewrites are selected, each time from the same original.
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
