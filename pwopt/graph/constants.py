"""Constant folding: computes operators on constants, within a limit on the size of the result."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from pwopt.algebra import Values
from pwopt.graph.ir import Node, as_message
from pwopt.graph.operators import VIEWS
from pwopt.graph.shapes import as_fixed, read_dims

#: A constant is computed if it is not larger than this, or not larger than the constants that it is computed from.
MAX_FOLDED_BYTES = 1 << 20
#: All constants that one run of clean-up makes may exceed the constants that they replace by this much.
MAX_GROWTH_BYTES = 1 << 26
#: Constants up to this size, such as shapes, axes and scalars, do not count.
NEGLIGIBLE_BYTES = 1 << 10


def evaluate(
    node: Node,
    values: dict[str, Values],
    opset: int,
    growth: int = MAX_FOLDED_BYTES,
    kept: Collection[str] = (),
) -> list[Values] | str:
    """Compute the outputs of a node on constants.

    onnx's reference evaluator computes them, and inference gives their types and shapes. Where the two disagree, the
    node is refused. Where onnxruntime is known to compute something else, it is refused as well. Operators that only
    change the shape need no evaluator.

    Parameters
    ----------
    node : Node
    values : dict
        Input name → value.
    opset : int
    growth : int
        How many bytes larger than `values` the outputs may be.
    kept : names
        Inputs that stay in the model, because other nodes read them. They do not count as replaced.

    Returns
    -------
    list of array, or str
        The outputs, or why they are not computed.
    """
    reason = _find_disagreement(node, values)
    if reason:
        return reason
    model = _build_model(node, values, opset)
    try:
        inferred = onnx.shape_inference.infer_shapes(model).graph.output
    except Exception as error:
        return f"its value never changes, but onnx cannot compute it ({type(error).__name__})"
    sizes = [as_fixed(read_dims(v.type)) for v in inferred]
    types = [v.type.tensor_type.elem_type for v in inferred]
    held = 0 if _reads_shape_only(node) else sum(v.nbytes for name, v in values.items() if name not in kept)
    allowed = max(NEGLIGIBLE_BYTES, min(max(MAX_FOLDED_BYTES, held), held + growth))
    for code, size in zip(types, sizes, strict=True):
        if size is None:
            return "its value never changes, but its size is not known before it is computed"
        needed = math.prod(size) * onnx.helper.tensor_dtype_to_np_dtype(code).itemsize if code else 0
        if needed > allowed:
            return f"its value never changes, but takes {needed:,} bytes (limit {allowed:,})"
    try:
        if node.op in VIEWS:
            results = [values[node.inputs[0].name].reshape(size or ()) for size in sizes]
        else:
            with np.errstate(all="ignore"):
                results = [np.asarray(r) for r in ReferenceEvaluator(model).run(None, values)]
    except Exception as error:  # an operator that is missing there, or declines: leave the node to the runtime
        return f"its value never changes, but onnx cannot compute it ({type(error).__name__})"
    for result, code, size in zip(results, types, sizes, strict=True):
        if result.dtype != onnx.helper.tensor_dtype_to_np_dtype(code) or result.shape != size:
            return "its value never changes, but onnx computes another type or shape than it infers"
    return results


def _reads_shape_only(node: Node) -> bool:
    return node.op in ("Shape", "Size")


def _build_model(node: Node, values: Mapping[str, Values], opset: int) -> onnx.ModelProto:
    """A model of this node alone. Small inputs are initializers, since inference reads shapes and axes from them."""
    inputs = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for n, v in values.items()
    ]
    outputs = [onnx.ValueInfoProto(name=t.name) for t in node.outputs]
    message = as_message(node)
    for attribute in message.attribute:
        if attribute.name == "axes" and node.op in ("Squeeze", "Unsqueeze"):  # old opsets want them so
            added = len(attribute.ints) if node.op == "Unsqueeze" else 0
            rank = values[node.inputs[0].name].ndim + added
            attribute.ints[:] = sorted(axis % rank for axis in attribute.ints)
    graph = onnx.helper.make_graph([message], "constant", inputs, outputs)
    if not _reads_shape_only(node):
        graph.initializer.extend(onnx.numpy_helper.from_array(v, n) for n, v in values.items() if v.size <= 1024)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])


def _find_disagreement(node: Node, values: Mapping[str, Values]) -> str:
    """Why onnxruntime may compute something else than onnx's reference evaluator; "" if nothing is known."""
    data, *others = values.values()
    if node.op in ("ReduceMax", "ReduceMin") and data.dtype.kind == "f" and np.isnan(data).any():
        return "its value never changes, but runtimes disagree on the extremes of numbers that include NaN"
    if node.op == "Squeeze" and (node.attrs.get("axes") == [] or any(v.size == 0 for v in others)):
        return "its value never changes, but runtimes disagree on an empty list of axes"
    return ""
