"""Specifications of a model's inputs: names, types and shapes, as declared or as the graph determines them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from pwopt.errors import ModelError, UsageError
from pwopt.graph.shapes import Shape, as_fixed, format_shape, infer, read_dims
from pwopt.inputs import shape_constraints
from pwopt.inputs.integer_values import BINARY, find_largest_index, find_values


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    Attributes
    ----------
    name : str
    dtype : numpy.dtype
    shape : tuple or None
        As declared. Axes that the declaration leaves open have the size that the graph requires, if it allows only one.
        None if neither says anything.
    largest : int or None
        For indices, the largest valid one; None if the input indexes no table.
    values : tuple of int
        For other integers, those to draw.
    facts : tuple of str
        What the graph determined, for reports.
    """

    name: str
    dtype: np.dtype[Any]
    shape: Shape | None
    largest: int | None = None
    values: tuple[int, ...] = BINARY
    facts: tuple[str, ...] = ()


def input_specs(model: onnx.ModelProto) -> list[InputSpec]:
    """Find the inputs that a caller must give: those without an initializer.

    Raises
    ------
    UsageError
        If an input is not a tensor.
    ModelError
        If an input has no valid type.
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
        specs.append(InputSpec(value.name, np.dtype(dtype), read_dims(value.type)))
    return _complete(specs, model)


def _complete(specs: Sequence[InputSpec], model: onnx.ModelProto) -> list[InputSpec]:
    """Complete declarations by what the graph determines: ranks, sizes of open axes, and ranges of indices."""
    completed = []
    for spec in specs:
        found = shape_constraints.find_rank(model, spec.name) if spec.shape is None else None
        if found is not None:
            fact = f"{spec.name!r} has {found[0]} axes, as {found[1]} takes it"
            spec = replace(spec, shape=(None,) * found[0], facts=(fact,))
        completed.append(spec)
    opened = {s.name: s.shape for s in completed if s.shape is not None and not as_fixed(s.shape)}
    fixed = shape_constraints.find_fixed_sizes(model, opened) if opened else {}
    for i, spec in enumerate(completed):
        if spec.name in opened:
            names = shape_constraints.name_open_axes(spec.name, opened[spec.name])
            found_here = {d: fixed[d] for d in names if isinstance(d, str) and d in fixed}
            shape = tuple(
                found_here[d][0] if isinstance(d, str) and d in found_here else given
                for d, given in zip(names, opened[spec.name], strict=True)
            )
            facts = tuple(f"{axis} is {size}, by {by}" for axis, (size, by) in found_here.items())
            spec = replace(spec, shape=shape, facts=(*spec.facts, *facts))
        if spec.dtype.kind in "iu":
            largest = find_largest_index(model, spec.name, infer(model))
            values = find_values(model, spec.name, spec.dtype, len(spec.shape or ()))
            spec = replace(spec, largest=largest, values=values)
        completed[i] = spec
    return completed


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """Parse ``NAME=1x3x640x640`` to a name and sizes; a scalar is ``NAME=``."""
    name, sep, sizes = text.rpartition("=")
    if not sep or not name or not re.fullmatch(r"(\d+([x,]\d+)*)?", sizes):
        raise UsageError(f"the shape {text!r} is not of the form NAME=1x3x640x640")
    return name, tuple(int(s) for s in re.split("[x,]", sizes) if s)


def check_shapes(specs: Sequence[InputSpec], shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse shapes that do not fit the declared inputs.

    Raises
    ------
    UsageError
    """
    if not isinstance(shapes, Mapping):
        raise UsageError(f"the shapes {shapes!r} are not a mapping of names to sizes like {{'x': (1, 3, 640, 640)}}")
    known = {s.name: s for s in specs}
    for name, shape in shapes.items():
        if name not in known:
            raise UsageError(f"there is no input {name!r}; the model has {', '.join(map(repr, known)) or 'none'}")
        numbers = isinstance(shape, Sequence) and all(isinstance(d, (int, np.integer)) and d >= 0 for d in shape)
        if isinstance(shape, str) or not numbers:
            raise UsageError(f"the shape {shape!r} of input {name!r} is not a sequence of sizes like (1, 3, 640, 640)")
        declared = known[name].shape
        if declared is None:
            continue
        fits = len(shape) == len(declared) and all(
            not isinstance(d, int) or d in (0, s) for d, s in zip(declared, shape, strict=True)
        )
        if not fits:
            example = "x".join(str(d if isinstance(d, int) and d else 1) for d in declared)
            raise UsageError(
                f"the shape {format_shape(shape)} does not fit input {name!r}, which is {format_shape(declared)}; "
                f"give sizes that fit, such as {name}={example}"
            )
