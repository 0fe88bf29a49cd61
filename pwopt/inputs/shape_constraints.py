"""Shape constraints: sizes and ranks of inputs that follow from the weights and other constants of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from pwopt.algebra import Values
from pwopt.graph import operators
from pwopt.graph.operators import MOVES, SAME_SHAPE
from pwopt.graph.shapes import MAX_SHAPE_VALUES, Dim, Shape, infer

#: Element type (``onnx.TensorProto.DataType``) and shape by tensor, as `pwopt.graph.shapes.infer` gives them.
Types = Mapping[str, tuple[int, Shape | None]]

#: Operators that broadcast at least one operand to another.
BROADCASTING_OPERATORS = operators.BROADCASTS | {"PRelu"}


@dataclass(frozen=True)
class ShapeConstraint:
    """A size that a node requires of a tensor.

    Attributes
    ----------
    tensor : str
    axis : int or None
        None if `size` is the number of elements.
    size : int
    exact : bool
        Whether only this size is valid. Otherwise 1 is valid too, since it is broadcast.
    source : str
        Which part of the graph requires it, for reports.
    """

    tensor: str
    axis: int | None
    size: int
    exact: bool
    source: str

    def current_size(self, types: Types) -> Dim:
        """The size of the tensor there, or None if it is unknown."""
        shape = types.get(self.tensor, (0, None))[1]
        if shape is None:
            return None
        if self.axis is not None:
            return shape[self.axis] if -len(shape) <= self.axis < len(shape) else None
        count = 1
        for d in shape:
            if not isinstance(d, int):
                return None
            count *= d
        return count

    def is_violated(self, types: Types) -> bool:
        """Whether the size is known, and not valid."""
        found = self.current_size(types)
        return isinstance(found, int) and found != self.size and (self.exact or found != 1)


class Constants:
    """The constants of a graph: shapes of all of them, values of the small ones; and which inputs are vectors."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.vectors = {v.name for v in model.graph.input if len(v.type.tensor_type.shape.dim) == 1}
        self.tensors = {t.name: t for t in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant" and node.output:
                for a in node.attribute:
                    if a.name == "value":
                        self.tensors[node.output[0]] = a.t
                    elif a.name in ("value_int", "value_ints"):
                        values = np.asarray(a.i if a.name == "value_int" else list(a.ints), np.int64)
                        self.tensors[node.output[0]] = numpy_helper.from_array(values)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self.tensors[name].dims) if name in self.tensors else None

    def integers(self, name: str) -> list[int] | None:
        """The values of a small constant of integers, else None."""
        values = self._values(name)
        return values.reshape(-1).tolist() if values is not None and values.dtype.kind in "iu" else None

    def numbers(self, name: str) -> list[float] | None:
        """The values of a small constant of numbers, else None."""
        values = self._values(name)
        return None if values is None or values.dtype.kind not in "iuf" else values.reshape(-1).tolist()

    def _values(self, name: str) -> Values | None:
        tensor = self.tensors.get(name)
        if (
            tensor is None
            or tensor.data_location == onnx.TensorProto.EXTERNAL
            or np.prod(tensor.dims) > MAX_SHAPE_VALUES
        ):
            return None
        try:
            return np.asarray(numpy_helper.to_array(tensor))
        except (ValueError, TypeError):  # it holds fewer values than its shape says, or its type is invalid
            return None


def find_shape_constraints(model: onnx.ModelProto) -> list[ShapeConstraint]:
    """Find the shape constraints that nodes of the main graph impose through constants, in the graph's order."""
    constants = Constants(model)
    found: list[ShapeConstraint] = []
    for node in model.graph.node:
        if node.domain in ("", "ai.onnx") and node.input:
            found += _constrain(node, constants)
    return found


def _constrain(node: onnx.NodeProto, constants: Constants) -> Iterator[ShapeConstraint]:
    attributes = integer_attributes(node)
    x, weights = node.input[0], constants.shape(node.input[1]) if len(node.input) > 1 else None
    source = f"the weights of {node.op_type}"
    if node.op_type in ("Conv", "ConvTranspose") and weights is not None and len(weights) > 2:
        yield ShapeConstraint(
            x, 1, weights[1] * attributes.get("group", 1) if node.op_type == "Conv" else weights[0], True, source
        )
    elif node.op_type == "Gemm" and weights is not None and len(weights) == 2:
        yield ShapeConstraint(
            x, 0 if attributes.get("transA") else 1, weights[1 if attributes.get("transB") else 0], True, source
        )
    elif node.op_type == "MatMul":
        if weights:
            yield ShapeConstraint(x, -1, weights[-2] if len(weights) > 1 else weights[0], True, source)
        elif len(node.input) > 1 and (left := constants.shape(x)):
            axis = 0 if node.input[1] in constants.vectors else -2
            yield ShapeConstraint(node.input[1], axis, left[-1], True, source)
    elif node.op_type in ("LSTM", "GRU", "RNN") and weights is not None and len(weights) == 3:
        yield ShapeConstraint(x, 2, weights[2], True, source)
    elif node.op_type in ("BatchNormalization", "InstanceNormalization") and weights:
        yield ShapeConstraint(x, 1, weights[0], True, source)
    elif node.op_type in BROADCASTING_OPERATORS:
        for other in node.input:
            for tensor in node.input:
                table = constants.shape(other) or ()
                if tensor not in constants.tensors:
                    for axis, size in enumerate(table):
                        if size != 1:
                            yield ShapeConstraint(
                                tensor, axis - len(table), size, False, f"the table that {node.op_type} takes"
                            )
    elif node.op_type == "Reshape" and len(node.input) > 1 and not attributes.get("allowzero"):
        target = constants.integers(node.input[1])
        if target and min(target) > 0:
            yield ShapeConstraint(x, None, int(np.prod(target)), True, "the target of a Reshape")
    elif node.op_type == "Squeeze":
        axes = constants.integers(node.input[1]) if len(node.input) > 1 else attributes.get("axes")
        for axis in axes or ():
            yield ShapeConstraint(x, axis, 1, True, "a Squeeze")


def integer_attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Attributes that are integers or lists of integers."""
    several = {a.name: list(a.ints) for a in node.attribute if a.type == onnx.AttributeProto.INTS}
    return {**several, **{a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}}


def find_rank(model: onnx.ModelProto, name: str) -> tuple[int, str] | None:
    """Find how many axes an input has, by the nodes that read it, and the operator that says so; None if none does."""
    constants = Constants(model)
    types = infer(model)
    likely: tuple[int, str] | None = None
    for node, index in find_uses(model, name, SAME_SHAPE | BROADCASTING_OPERATORS):
        count, certain = _rank_from(node, index, constants)
        if not count and node.op_type in BROADCASTING_OPERATORS:  # the rank of the others is always valid
            others = [types.get(n, (0, None))[1] for i, n in enumerate(node.input) if i != index]
            count = max((len(shape) for shape in others if shape is not None), default=0)
        if count and certain:
            return count, node.op_type
        if count and likely is None:
            likely = count, node.op_type
    return likely


def _rank_from(node: onnx.NodeProto, index: int, constants: Constants) -> tuple[int, bool]:
    """The rank of an operand by the node that reads it (0 if unknown), and whether no other rank is valid."""
    attributes = integer_attributes(node)
    weights = constants.shape(node.input[1]) if len(node.input) > 1 else None
    if index == 0 and node.op_type in ("Conv", "ConvTranspose") and weights:
        return len(weights), True
    if index == 0 and "kernel_shape" in attributes:
        return 2 + len(attributes["kernel_shape"]), True
    if index == 0 and "perm" in attributes:
        return len(attributes["perm"]), True
    if index == 0 and node.op_type == "Pad" and weights and len(node.input) < 4:
        return weights[0] // 2, True
    if node.op_type in ("LSTM", "GRU", "RNN") and index == 0:
        return 3, True
    if node.op_type == "Gemm" and index < 2:
        return 2, True
    left = constants.shape(node.input[0]) if node.op_type == "MatMul" and index == 1 else None
    if (node.op_type == "MatMul" and (weights or left)) or (node.op_type == "Gather" and index == 1):
        return 2, False
    return 0, False


def find_uses(model: onnx.ModelProto, name: str, through: frozenset[str]) -> Iterator[tuple[onnx.NodeProto, int]]:
    """Find the nodes that read a tensor, directly or behind operators in `through`, each with the operand's index."""
    reached = {name}
    for node in model.graph.node:  # producers precede consumers
        for index, tensor in enumerate(node.input):
            if tensor not in reached:
                continue
            yield node, index
            if node.op_type in through and (
                index == 0 or node.op_type == "Concat" or node.op_type in BROADCASTING_OPERATORS
            ):
                reached.update(node.output)


def reads_waveform(model: onnx.ModelProto, name: str) -> bool:
    """Whether the first operator on an input is a Fourier transform, or a 1-D convolution of one or two channels."""
    constants = Constants(model)
    for node, index in find_uses(model, name, SAME_SHAPE | MOVES | BROADCASTING_OPERATORS | {"Pad"}):
        weights = constants.shape(node.input[1]) if node.op_type == "Conv" and len(node.input) > 1 else None
        if weights is not None and index == 0:
            return len(weights) == 3 and weights[1] in (1, 2)
        if node.op_type in ("STFT", "DFT"):
            return True
    return False


def solve_size(count: Callable[[int], Dim], size: int, prefer: Sequence[int], largest: int) -> int | None:
    """Find an argument for which a monotonically increasing function has the value `size`, by bisection.

    Parameters
    ----------
    count : callable
        It may return None where its value is unknown.
    size : int
    prefer : sequence of int
        If several arguments solve the equation, the first of these is returned, or else a multiple of a power of 2.
    largest : int
        The largest argument to try.
    """

    def first(wanted: int) -> int:
        """The smallest argument with at least that value."""
        low, high = 1, largest + 1
        while low < high:
            middle = (low + high) // 2
            found = count(middle)
            if isinstance(found, int) and found >= wanted:
                high = middle
            else:  # an argument too small for some window counts as too small
                low = middle + 1
        return low

    low, high = first(size), first(size + 1)
    if low > largest or count(low) != size:
        return None
    inside = [p for p in prefer if low <= p < high]
    step = next((s for s in (32, 16, 8, 4) if (high - 1) // s * s >= low), 1)
    return inside[0] if inside else (high - 1) // step * step


def extract_submodel(model: onnx.ModelProto, tensor: str) -> onnx.ModelProto:
    """Extract the nodes that compute one tensor, as a model for shape inference."""
    part = onnx.ModelProto()
    part.CopyFrom(model)
    del part.graph.node[:], part.graph.output[:]
    needed, kept = {tensor}, []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
            needed.update(name for a in node.attribute for g in (a.g, *a.graphs) for n in g.node for name in n.input)
    part.graph.node.extend(reversed(kept))
    return part


def name_open_axes(name: str, shape: Shape) -> tuple[int | str, ...]:
    """Give each open axis of a shape a name: its symbol, or a phrase that says where it is."""
    return tuple(
        d if isinstance(d, int) and d > 0 else d if isinstance(d, str) and d != "?" else f"axis {axis} of {name!r}"
        for axis, d in enumerate(shape)
    )


def find_fixed_sizes(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> dict[str, tuple[int, str]]:
    """Find the open axes with only one valid size. Returns axis (see `name_open_axes`) → size and its source."""
    types = infer(model, {name: name_open_axes(name, shape) for name, shape in shapes.items()})
    open_axes = {d for name, shape in shapes.items() for d in name_open_axes(name, shape) if isinstance(d, str)}
    found: dict[str, tuple[int, str]] = {}
    for constraint in find_shape_constraints(model):
        where = constraint.current_size(types)
        if constraint.exact and constraint.axis is not None and isinstance(where, str) and where in open_axes:
            found.setdefault(where, (constraint.size, constraint.source))
    return found
