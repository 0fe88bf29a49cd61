"""Estimate the memory and the multiply-adds of a run from shapes alone: activations by liveness analysis."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx

from pwopt.graph.operators import VIEWS, WEIGHTED_OPERATORS
from pwopt.graph.shapes import as_fixed
from pwopt.inputs.shape_constraints import Types

#: Assumed bytes of a string.
STRING = 32


@dataclass(frozen=True)
class Footprint:
    """An estimate of one run.

    Attributes
    ----------
    bytes : int
        The peak of inputs and activations; each tensor is freed after its last reader.
    macs : int
        Multiply-adds of convolutions and matrix products.
    """

    bytes: int
    macs: int


def estimate_footprint(model: onnx.ModelProto, types: Types) -> Footprint:
    """Estimate the footprint of one run.

    Parameters
    ----------
    model : onnx.ModelProto
        Its nodes in topological order. Bodies of loops and branches are not counted.
    types : mapping of tensor name to (element type, shape)
        As `pwopt.graph.shapes.infer` gives them. A tensor of unknown shape counts as its node's largest operand.
    """
    weights = {t.name for t in model.graph.initializer}
    size: dict[str, int] = {v.name: _bytes(types, v.name) or 0 for v in model.graph.input if v.name not in weights}
    owner = {name: name for name in size}
    last: dict[str, int] = {}
    for position, node in enumerate(model.graph.node):
        for name in node.output:
            view = (node.op_type in VIEWS or node.op_type == "Identity") and node.input and node.input[0] in owner
            owner[name] = owner[node.input[0]] if view else name
            if not view and name:
                given = _bytes(types, name)
                size[name] = (
                    max((size[owner[i]] for i in node.input if i in owner), default=0) if given is None else given
                )
        for name in node.input:
            if name in owner:
                last[owner[name]] = position
    for value in model.graph.output:
        if value.name in owner:
            last[owner[value.name]] = len(model.graph.node)
    return Footprint(_peak(model, size, owner, last), sum(_macs(node, types) for node in model.graph.node))


def _peak(model: onnx.ModelProto, size: dict[str, int], owner: dict[str, str], last: dict[str, int]) -> int:
    ends: dict[int, list[str]] = {}
    for name, position in last.items():
        ends.setdefault(position, []).append(name)
    alive = sum(size[v.name] for v in model.graph.input if v.name in size)
    peak = alive
    for position, node in enumerate(model.graph.node):
        made = [name for name in node.output if name and owner[name] == name]
        alive += sum(size[name] for name in made)
        peak = max(peak, alive)
        unread = [name for name in made if name not in last]
        alive -= sum(size[name] for name in (*ends.get(position, ()), *unread))
    return peak


def _bytes(types: Types, name: str) -> int | None:
    kind, shape = types.get(name, (0, None))
    numbers = as_fixed(shape)
    if numbers is None:
        return None
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))
    except KeyError:
        return None
    return math.prod(numbers) * (STRING if dtype.kind == "O" else dtype.itemsize)


def _macs(node: onnx.NodeProto, types: Types) -> int:
    """Count the multiply-adds of a convolution or matrix product; 0 for other operators and for unknown sizes."""
    if node.op_type not in WEIGHTED_OPERATORS or len(node.input) < 2 or not node.output:
        return 0
    read, weights, made = (as_fixed(types.get(n, (0, None))[1]) for n in (*node.input[:2], node.output[0]))
    if not read or not weights or not made:
        return 0
    if node.op_type == "Conv":
        return math.prod(made) * math.prod(weights[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(read) * math.prod(weights[1:])
    return math.prod(made) * read[0 if any(a.name == "transA" and a.i for a in node.attribute) else -1]
