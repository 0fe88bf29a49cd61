"""What the nodes of a graph demand of its inputs: sizes that weights and tables settle, and values that are indices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from pwopt.graph import operators
from pwopt.graph.operators import MOVES, SAME_SHAPE
from pwopt.graph.shapes import SMALL, Dim, Shape, infer

#: Element type (``onnx.TensorProto.DataType``) and shape by tensor, as `pwopt.graph.shapes.infer` gives them.
Types = Mapping[str, tuple[int, Shape | None]]

#: Operators of which one operand at least is broadcast to another.
BROADCASTS = operators.BROADCASTS | {"PRelu"}


@dataclass(frozen=True)
class Demand:
    """A size that a node demands.

    Attributes
    ----------
    tensor : str
    axis : int or None
        None for the number of elements.
    size : int
    exactly : bool
        Whether nothing else will do; else 1 does as well, since it is broadcast.
    by : str
        What demands it, in words.
    """

    tensor: str
    axis: int | None
    size: int
    exactly: bool
    by: str

    def found(self, types: Types) -> Dim:
        """The size there; None if it is not known."""
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

    def broken(self, types: Types) -> bool:
        """Whether it is certain that the size is another one."""
        found = self.found(types)
        return isinstance(found, int) and found != self.size and (self.exactly or found != 1)


class Constants:
    """Values of small constants, and shapes of all."""

    def __init__(self, model: onnx.ModelProto) -> None:
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
        tensor = self.tensors.get(name)
        if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL or np.prod(tensor.dims) > SMALL:
            return None
        try:
            values = numpy_helper.to_array(tensor)
        except (ValueError, TypeError):  # not as many as it says, or of no type
            return None
        return values.reshape(-1).tolist() if values.dtype.kind in "iu" else None


def demands(model: onnx.ModelProto) -> list[Demand]:
    """Every demand that nodes of the main graph make through their constants, in the graph's order."""
    constants = Constants(model)
    found: list[Demand] = []
    for node in model.graph.node:
        if node.domain in ("", "ai.onnx") and node.input:
            found += _of(node, constants)
    return found


def _of(node: onnx.NodeProto, constants: Constants) -> Iterator[Demand]:
    settings = _settings(node)
    x, weights = node.input[0], constants.shape(node.input[1]) if len(node.input) > 1 else None
    by = f"the weights of {node.op_type}"
    if node.op_type in ("Conv", "ConvTranspose") and weights is not None and len(weights) > 2:
        yield Demand(x, 1, weights[1] * settings.get("group", 1) if node.op_type == "Conv" else weights[0], True, by)
    elif node.op_type == "Gemm" and weights is not None and len(weights) == 2:
        yield Demand(x, 0 if settings.get("transA") else 1, weights[1 if settings.get("transB") else 0], True, by)
    elif node.op_type == "MatMul":
        if weights:
            yield Demand(x, -1, weights[-2] if len(weights) > 1 else weights[0], True, by)
        elif len(node.input) > 1 and (left := constants.shape(x)):
            yield Demand(node.input[1], -2 if len(left) > 1 else 0, left[-1], True, by)
    elif node.op_type in ("LSTM", "GRU", "RNN") and weights is not None and len(weights) == 3:
        yield Demand(x, 2, weights[2], True, by)
    elif node.op_type in ("BatchNormalization", "InstanceNormalization") and weights:
        yield Demand(x, 1, weights[0], True, by)
    elif node.op_type in BROADCASTS:
        for other in node.input:
            for tensor in node.input:
                table = constants.shape(other) or ()
                if tensor not in constants.tensors:
                    for axis, size in enumerate(table):
                        if size != 1:
                            yield Demand(tensor, axis - len(table), size, False, f"the table that {node.op_type} takes")
    elif node.op_type == "Reshape" and len(node.input) > 1 and not settings.get("allowzero"):
        target = constants.integers(node.input[1])
        if target and min(target) > 0:
            yield Demand(x, None, int(np.prod(target)), True, "the target of a Reshape")
    elif node.op_type == "Squeeze":
        axes = constants.integers(node.input[1]) if len(node.input) > 1 else settings.get("axes")
        for axis in axes or ():
            yield Demand(x, axis, 1, True, "a Squeeze")


def _settings(node: onnx.NodeProto) -> dict[str, Any]:
    """Attributes that are integers, or several."""
    several = {a.name: list(a.ints) for a in node.attribute if a.type == onnx.AttributeProto.INTS}
    return {**several, **{a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}}


def rank(model: onnx.ModelProto, name: str) -> tuple[int, str] | None:
    """How many axes an input has by the nodes that read it, and which one says so; None if none does."""
    constants = Constants(model)
    likely: tuple[int, str] | None = None
    for node, index in uses(model, name, SAME_SHAPE | BROADCASTS):
        count, certain = _rank(node, index, constants)
        if count and certain:
            return count, node.op_type
        if count and likely is None:
            likely = count, node.op_type
    return likely


def _rank(node: onnx.NodeProto, index: int, constants: Constants) -> tuple[int, bool]:
    """The rank of what a node reads at some place, 0 if it does not say; and whether it must be that."""
    settings = _settings(node)
    weights = constants.shape(node.input[1]) if len(node.input) > 1 else None
    if index == 0 and node.op_type in ("Conv", "ConvTranspose") and weights:
        return len(weights), True
    if index == 0 and "kernel_shape" in settings:
        return 2 + len(settings["kernel_shape"]), True
    if index == 0 and "perm" in settings:
        return len(settings["perm"]), True
    if index == 0 and node.op_type == "Pad" and weights and len(node.input) < 4:
        return weights[0] // 2, True
    if node.op_type in ("LSTM", "GRU", "RNN") and index == 0:
        return 3, True
    if node.op_type == "Gemm" and index < 2:
        return 2, True
    if (node.op_type == "MatMul" and weights) or (node.op_type == "Gather" and index == 1):
        return 2, False
    return 0, False


def uses(model: onnx.ModelProto, name: str, through: frozenset[str]) -> Iterator[tuple[onnx.NodeProto, int]]:
    """Nodes that read a tensor, also behind operators that it goes through; each with the index of its operand."""
    reached = {name}
    for node in model.graph.node:  # in the file's order, so producers come first
        for index, tensor in enumerate(node.input):
            if tensor not in reached:
                continue
            yield node, index
            if node.op_type in through and (index == 0 or node.op_type == "Concat" or node.op_type in BROADCASTS):
                reached.update(node.output)


def largest_index(model: onnx.ModelProto, name: str, types: Types) -> int | None:
    """The largest value of an input that indexes the shortest table it is used on; None if it is no index."""
    lengths = []
    for node, index in uses(model, name, MOVES):
        length: Dim = None
        settings = _settings(node)
        if node.op_type in ("Gather", "GatherElements") and index == 1:
            table = types.get(node.input[0], (0, None))[1]
            axis = settings.get("axis", 0)
            length = table[axis] if table and -len(table) <= axis < len(table) else None
        elif node.op_type == "EmbedLayerNormalization" and index < 2:
            place = 2 + 2 * index  # word_embedding or segment_embedding
            table = types.get(node.input[place], (0, None))[1] if len(node.input) > place else None
            length = table[0] if table else None
        if isinstance(length, int) and length > 0:
            lengths.append(length)
    return min(lengths) - 1 if lengths else None


def reads_waveform(model: onnx.ModelProto, name: str) -> bool:
    """Whether what first looks at an input is a short-time Fourier transform, or a 1-D filter of one channel or two."""
    constants = Constants(model)
    for node, index in uses(model, name, SAME_SHAPE | MOVES | BROADCASTS | {"Pad"}):
        weights = constants.shape(node.input[1]) if node.op_type == "Conv" and len(node.input) > 1 else None
        if weights is not None and index == 0:
            return len(weights) == 3 and weights[1] in (1, 2)
        if node.op_type in ("STFT", "DFT"):
            return True
    return False


def solve(count: Callable[[int], Dim], size: int, prefer: Sequence[int], largest: int) -> int | None:
    """An argument for which a function that never falls is `size`, as far as it is known: the first preferred one.

    Parameters
    ----------
    count : callable
    prefer : sequence of int
    largest : int
        Arguments beyond are not looked at.
    """

    def first(wanted: int) -> int:
        """The smallest argument with at least that many."""
        low, high = 1, largest + 1
        while low < high:
            middle = (low + high) // 2
            found = count(middle)
            if isinstance(found, int) and found >= wanted:
                high = middle
            else:  # too small for some window counts as too few
                low = middle + 1
        return low

    low, high = first(size), first(size + 1)
    if low > largest or count(low) != size:
        return None
    inside = [p for p in prefer if low <= p < high]
    step = next((s for s in (32, 16, 8, 4) if (high - 1) // s * s >= low), 1)
    return inside[0] if inside else (high - 1) // step * step


def submodel(model: onnx.ModelProto, tensor: str) -> onnx.ModelProto:
    """The part of a model, as a skeleton for inference, that makes one tensor."""
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


def symbols(name: str, shape: Shape) -> tuple[int | str, ...]:
    """A shape with a name for each open axis: its own, or one that says where it is."""
    return tuple(
        d if isinstance(d, int) and d > 0 else d if isinstance(d, str) and d != "?" else f"axis {axis} of {name!r}"
        for axis, d in enumerate(shape)
    )


def settled(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> dict[str, tuple[int, str]]:
    """Open axes, as `symbols` names them, whose size the graph leaves no choice of; each with what settles it."""
    types = infer(model, {name: symbols(name, shape) for name, shape in shapes.items()})
    open_axes = {d for name, shape in shapes.items() for d in symbols(name, shape) if isinstance(d, str)}
    found: dict[str, tuple[int, str]] = {}
    for demand in demands(model):
        where = demand.found(types)
        if demand.exactly and demand.axis is not None and isinstance(where, str) and where in open_axes:
            found.setdefault(where, (demand.size, demand.by))
    return found
