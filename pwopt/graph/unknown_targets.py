"""Sizes behind targets that onnx's inference does not know, found in one sweep over a graph.

onnx's inference divides no sizes and knows no computed ends of a Slice, nor most arithmetic before opset 13. Behind one
such target, the next one depends on an unknown shape, so n blocks would take n inferences of the whole graph.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from pwopt.algebra import Values
from pwopt.graph.ir import Graph, Node, Tensor, as_message, find_bodies
from pwopt.graph.shapes import Shape, as_fixed, infer_alone
from pwopt.graph.values import MAX_ENTRIES, Entries, as_numbers, read_entries
from pwopt.graph.view import View


def follow_targets(graph: Graph) -> dict[str, Shape]:
    """Annotate tensors with the sizes that follow from the known entries of targets; return their shapes.

    An operator is inferred alone, and only if it reads a computed target, or a tensor whose shape was found before.
    """
    view = View(graph)
    found: dict[str, Shape] = {}
    for node in graph.nodes:
        known = all(as_fixed(t.shape) is not None for t in node.outputs if t.name)
        if known or not (view.op(node) or view.runtime_op(node)) or find_bodies([node]):
            continue
        if not any(t.name in found or _has_computed_sizes(view, t) for t in node.inputs):
            continue
        inferred = infer_alone(_isolate(view, node))
        for tensor in node.outputs:
            old, new = view.shape(tensor), inferred.get(tensor.name)
            shape = None if new is None else _fill_in(old, new)
            if shape is not None and shape != old:
                tensor.shape = found[tensor.name] = shape
    return found


def _has_computed_sizes(view: View, tensor: Tensor) -> bool:
    """Whether an operator computes the tensor, and some of its entries are known numbers."""
    if view.producer(tensor) is None or view.constant(tensor) is not None:
        return False
    return any(isinstance(entry, int) for entry in read_entries(view, tensor) or ())


def _isolate(view: View, node: Node) -> onnx.ModelProto:
    """A model of one operator. A target with symbols is the shape of a further input."""
    graph = helper.make_graph([], "operator", [], [])
    for tensor in dict.fromkeys(t for t in node.inputs if t.name):
        shape, dtype, entries = view.shape(tensor), view.dtype(tensor), read_entries(view, tensor)
        value = _read_value(view, tensor, entries)
        if value is not None:
            graph.initializer.append(onnx.numpy_helper.from_array(value, tensor.name))
        elif entries is not None and len(shape or ()) == 1:
            sized, dims = f"{tensor.name} as a shape", [e if isinstance(e, (int, str)) else None for e in entries]
            graph.input.append(helper.make_tensor_value_info(sized, onnx.TensorProto.FLOAT, dims))
            graph.node.append(helper.make_node("Shape", [sized], [tensor.name]))
        else:
            code = 0 if dtype is None else helper.np_dtype_to_tensor_dtype(dtype)
            graph.input.append(helper.make_tensor_value_info(tensor.name, code, shape))
    graph.node.append(as_message(node))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", view.opset)])


def _read_value(view: View, tensor: Tensor, entries: Entries | None) -> Values | None:
    """The value of a small tensor, from which the shape of a result may follow; None if it is unknown."""
    count, numbers = view.elements(tensor), as_numbers(entries)
    if count is not None:
        return view.raw(tensor) if count <= MAX_ENTRIES else None
    return None if numbers is None else np.array(numbers, view.dtype(tensor)).reshape([-1] * (view.rank(tensor) or 0))


def _fill_in(old: Shape | None, new: Shape) -> Shape | None:
    """Take over numbers only, because inference makes up names where it knows nothing."""
    before = (None,) * len(new) if old is None else old
    if len(before) != len(new):
        return None
    return tuple(b if isinstance(b, int) and not isinstance(a, int) else a for a, b in zip(before, new, strict=True))
