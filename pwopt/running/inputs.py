"""What a model takes: names, types and shapes of its inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from pwopt.errors import ModelError, UsageError
from pwopt.graph.shapes import Shape, dims, written


@dataclass(frozen=True)
class InputSpec:
    """One input of a model: its name, numpy type and declared shape (None if not even its rank is declared)."""

    name: str
    dtype: np.dtype[Any]
    shape: Shape | None


def input_specs(model: onnx.ModelProto) -> list[InputSpec]:
    """Inputs a caller must give: those without an initializer.

    Raises
    ------
    UsageError
        If one is not a tensor.
    ModelError
        If one has no valid type.
    """
    initialized = {t.name for t in model.graph.initializer} | {s.values.name for s in model.graph.sparse_initializer}
    specs = []
    for value in model.graph.input:
        if value.name in initialized:
            continue
        if not value.type.HasField("tensor_type"):
            raise UsageError(f"input {value.name!r} is not a tensor; pwopt takes models whose inputs are tensors")
        try:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        except KeyError:
            raise ModelError(f"input {value.name!r} has no valid type; export the model again") from None
        specs.append(InputSpec(value.name, np.dtype(dtype), dims(value.type)))
    return specs


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """``NAME=1x3x640x640`` → name and sizes; a scalar is ``NAME=``."""
    name, sep, sizes = text.rpartition("=")
    if not sep or not name or not re.fullmatch(r"(\d+([x,]\d+)*)?", sizes):
        raise UsageError(f"the shape {text!r} is not of the form NAME=1x3x640x640")
    return name, tuple(int(s) for s in re.split("[x,]", sizes) if s)


def check_shapes(specs: Sequence[InputSpec], shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse shapes that do not fit the declared inputs."""
    known = {s.name: s for s in specs}
    for name, shape in shapes.items():
        if name not in known:
            raise UsageError(f"there is no input {name!r}; the model has {', '.join(map(repr, known)) or 'none'}")
        if isinstance(shape, str) or not all(isinstance(d, (int, np.integer)) and d >= 0 for d in shape):
            raise UsageError(f"the shape {shape!r} of input {name!r} is not a sequence of sizes like (1, 3, 640, 640)")
        declared = known[name].shape
        if declared is None:
            continue
        fits = len(shape) == len(declared) and all(
            not isinstance(d, int) or d in (0, s) for d, s in zip(declared, shape, strict=True)
        )
        if not fits:
            raise UsageError(f"the shape {written(shape)} does not fit input {name!r}, which is {written(declared)}")
