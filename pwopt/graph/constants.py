"""Operators on constants, computed by onnx's reference evaluator within a bound on size."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from pwopt.algebra import Values
from pwopt.graph.ir import Node, as_message
from pwopt.graph.shapes import Shape, dims, known

#: A constant is computed if it is not larger than this, or than what it is computed from.
MAX_FOLDED_BYTES = 1 << 20


#: All constants that a model's clean-up makes may be larger than what they are computed from by this much.
MAX_GROWTH_BYTES = 1 << 26
#: Shapes, axes and scalars, which that leaves out.
NEGLIGIBLE_BYTES = 1 << 10


def evaluate(
    node: Node,
    values: dict[str, Values],
    opset: int,
    growth: int = MAX_FOLDED_BYTES,
    kept: Collection[str] = (),
) -> list[Values] | str:
    """Outputs of a node on constants, or why they are not computed. Their size is known before they are made.

    They may have `growth` bytes more than `values`, those left out that are `kept` for others.
    """
    message = as_message(node)
    shape_only = node.op in ("Shape", "Size")
    graph = onnx.helper.make_graph(
        [message],
        "constant",
        [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for n, v in values.items()
        ],
        [onnx.ValueInfoProto(name=t.name) for t in node.outputs],
    )
    if not shape_only:
        small = [onnx.numpy_helper.from_array(v, n) for n, v in values.items() if v.size <= 1024]
        graph.initializer.extend(small)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
        sizes: list[Shape | None] = [dims(v.type) for v in inferred.graph.output]
        held = 0 if shape_only else sum(v.nbytes for name, v in values.items() if name not in kept)
        allowed = max(NEGLIGIBLE_BYTES, min(max(MAX_FOLDED_BYTES, held), held + growth))
        for value, size in zip(inferred.graph.output, sizes, strict=True):
            numbers = known(size)
            if numbers is None:
                return "its value never changes, but its size is not known before it is computed"
            width = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).itemsize
            if math.prod(numbers) * width > allowed:
                return f"its value never changes, but takes {math.prod(numbers) * width:,} bytes (limit {allowed:,})"
        with np.errstate(all="ignore"):
            results = [np.asarray(r) for r in ReferenceEvaluator(model).run(None, values)]
    except Exception as error:  # a reference implementation that is missing or declines: leave the node to the runtime
        return f"its value never changes, but onnx cannot compute it ({type(error).__name__})"
    for result, value in zip(results, inferred.graph.output, strict=True):
        if result.dtype != onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type):
            return "its value never changes, but onnx computes it in another type"
    return results
