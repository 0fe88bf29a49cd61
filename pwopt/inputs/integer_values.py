"""Values to draw for integer inputs: those that the graph admits, by what it does with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx

from pwopt.graph import operators
from pwopt.graph.operators import MOVES, VIEWS
from pwopt.graph.shapes import Dim
from pwopt.inputs.shape_constraints import Constants, Types, find_uses, integer_attributes

#: The values of integers that must stay small: they mean something in most models.
BINARY = (0, 1)
#: The values of integers that are numbers: also one that a mask of 0 and 1 does not have.
NUMBERS = (0, 1, 2)
#: The most constants that a number is compared with.
BOUNDS = 16
#: Comparisons, whose results depend on which side of the other operand a value lies.
COMPARISONS = frozenset(["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"])
#: Operators whose results do not grow with the values of their operands: truth values, sizes, and positions.
BOUNDED_RESULTS = COMPARISONS | {
    "And",
    "ArgMax",
    "ArgMin",
    "IsInf",
    "IsNaN",
    "NonZero",
    "Not",
    "Or",
    "Shape",
    "Size",
    "Xor",
}
#: Operators that take any numbers as any operand.
NUMBER_OPERATORS = operators.ARITHMETIC | operators.BROADCASTS | operators.WEIGHTED_OPERATORS | {"Concat", "PRelu"}
#: Operators that take any numbers as their first operand.
ANY_FIRST = (
    (operators.SAME_SHAPE | operators.REDUCTIONS | operators.SOFTMAXES | operators.POOLS | operators.SUMS | MOVES)
    | (VIEWS | {"CastLike", "CumSum", "Gather", "GatherElements", "GatherND", "Pad", "Sign", "TopK", "Trilu"})
)  # fmt: skip
#: Of these, integers may not be 0 as the second operand.
DIVISIONS = frozenset(["Div", "Mod"])


def find_largest_index(model: onnx.ModelProto, name: str, types: Types) -> int | None:
    """The largest valid value of an input that indexes tables, by the shortest of them; None if it indexes none."""
    lengths = []
    for node, index in find_uses(model, name, MOVES):
        length: Dim = None
        attributes = integer_attributes(node)
        if node.op_type in ("Gather", "GatherElements") and index == 1:
            table = types.get(node.input[0], (0, None))[1]
            axis = attributes.get("axis", 0)
            length = table[axis] if table and -len(table) <= axis < len(table) else None
        elif node.op_type == "OneHot" and index == 0:
            depth = Constants(model).numbers(node.input[1])
            length = int(depth[0]) if depth else None
        elif node.op_type == "EmbedLayerNormalization" and index < 2:
            place = 2 + 2 * index  # word_embedding or segment_embedding
            table = types.get(node.input[place], (0, None))[1] if len(node.input) > place else None
            length = table[0] if table else None
        if isinstance(length, int) and length > 0:
            lengths.append(length)
    return min(lengths) - 1 if lengths else None


def find_values(model: onnx.ModelProto, name: str, dtype: np.dtype[Any], rank: int) -> tuple[int, ...]:
    """Find the values to draw for an integer input that indexes no table.

    A value that becomes an index, a size or a divisor somewhere stays 0 or 1. One that is compared with constants also
    lies beside these, on both sides. Inputs of 8 bits and three axes or more are pixels, which have every value.
    """
    constants = Constants(model)
    values = set(NUMBERS)
    for node, index, free in _follow(model, name):
        if not free:
            return BINARY
        if node.op_type in COMPARISONS:
            bounds = constants.numbers(node.input[1 - index])
            for bound in [b for b in (bounds or ())[:BOUNDS] if math.isfinite(b)]:
                values |= {math.ceil(bound) - 1, math.floor(bound), math.ceil(bound), math.floor(bound) + 1}
    limits = np.iinfo(dtype)
    if dtype.itemsize == 1 and rank > 2:
        return tuple(range(limits.min, limits.max + 1))
    return tuple(sorted(v for v in values if limits.min <= v <= limits.max))


def _follow(model: onnx.ModelProto, name: str) -> Iterator[tuple[onnx.NodeProto, int, bool]]:
    """Generate the nodes that the values of an input reach, the operand, and whether any number is valid there."""
    reached = {name}
    captured = {n for node in model.graph.node for a in node.attribute for g in (a.g, *a.graphs) for n in _reads(g)}
    for node in model.graph.node:  # producers precede consumers
        for index in [i for i, tensor in enumerate(node.input) if tensor in reached]:
            free = _takes_any(node, index) and captured.isdisjoint(node.output) and name not in captured
            yield node, index, free
            truth = node.op_type == "Cast" and integer_attributes(node)["to"] == onnx.TensorProto.BOOL
            if node.op_type == "TopK":
                reached.add(node.output[0])
            elif truth:
                continue
            elif node.op_type not in BOUNDED_RESULTS:
                reached.update(node.output)


def _takes_any(node: onnx.NodeProto, index: int) -> bool:
    """Whether any number is valid as an operand of a node."""
    if node.domain not in ("", "ai.onnx") or (node.op_type in DIVISIONS and index):
        return False
    return node.op_type in NUMBER_OPERATORS | BOUNDED_RESULTS or (index == 0 and node.op_type in ANY_FIRST)


def _reads(graph: onnx.GraphProto) -> Iterator[str]:
    """Generate the names that the nodes of a body read."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _reads(body)
