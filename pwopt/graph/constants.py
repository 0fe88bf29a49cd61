"""Constant folding: computes operators on constants, within a limit on the size of the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from pwopt.algebra import Values
from pwopt.graph.disagreements import correct_end, is_ambiguous
from pwopt.graph.dtypes import FLOATS, is_floating
from pwopt.graph.ir import Node, as_message
from pwopt.graph.operators import MOVES, SOFTMAXES, VIEWS
from pwopt.graph.shapes import Shape, as_fixed, read_dims

#: A constant is computed if it is not larger than this, or not larger than the constants that it is computed from.
MAX_FOLDED_BYTES = 1 << 20
#: All constants that one run of clean-up makes may exceed the constants that they replace by this much.
MAX_GROWTH_BYTES = 1 << 26
#: Constants up to this size, such as shapes, axes and scalars, do not count.
NEGLIGIBLE_BYTES = 1 << 10
#: Multiply-adds of the largest product or convolution that is computed. onnx's evaluator takes some tenths of a second.
MAX_FOLDED_WORK = 1 << 26
#: Elements of the largest result of a Resize: onnx's evaluator computes one after the other.
MAX_RESIZED = 1 << 14
#: Coordinates of a Resize on which runtimes agree.
INTERPOLATED = ("half_pixel", "pytorch_half_pixel", "asymmetric")
#: Operators that read the type of their input, or whose number of results depends on how they round.
TYPED = frozenset({"CastLike", "Range", *MOVES})

#: Operators that runtimes compute differently for NaN and infinity, and operators that pick an extreme.
INFINITE = frozenset({"Clip", "PRelu", "ReduceLogSumExp", "Sign"})
EXTREMES = frozenset({"ArgMax", "ArgMin", "Hardmax", "ReduceMax", "ReduceMin", "TopK"})
#: Beyond this, exp(-x) is zero in float64.
LARGEST_EXPONENT = 700.0
#: A bound on the absolute value of what a reduction of integers computes on the way.
MAGNITUDES: Mapping[str, Callable[[Values], float]] = {
    "ReduceSum": lambda v: float(np.abs(v.astype(np.float64)).sum()),
    "ReduceMean": lambda v: float(np.abs(v.astype(np.float64)).sum()),
    "ReduceL1": lambda v: float(np.abs(v.astype(np.float64)).sum()),
    "ReduceL2": lambda v: float(np.square(v.astype(np.float64)).sum()),
    "ReduceSumSquare": lambda v: float(np.square(v.astype(np.float64)).sum()),
    "ReduceProd": lambda v: float(np.maximum(np.abs(v.astype(np.float64)), 1).prod()),
}


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
    change the shape need no evaluator. Floating-point numbers are computed in float64 and rounded once, unless the
    operator only moves them.

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
    reason = _find_disagreement(node, values, opset)
    if reason:
        return reason
    model = _build_model(node, values, opset)
    try:
        inferred = onnx.shape_inference.infer_shapes(model).graph.output
    except Exception as error:
        return f"its value never changes, but onnx cannot compute it ({type(error).__name__})"
    shapes = [read_dims(v.type) for v in inferred]
    types = [v.type.tensor_type.elem_type for v in inferred]
    sizes = [_largest_size(node, values, shape) for shape in shapes]
    reason = _find_excess(node, values, list(zip(types, sizes, strict=True)), growth, kept)
    if reason:
        return reason
    dtypes = [onnx.helper.tensor_dtype_to_np_dtype(code) for code in types]
    try:
        if node.op in VIEWS:
            results = [values[node.inputs[0].name].reshape(size or ()) for size in sizes]
        else:
            wide = node.op not in TYPED and not _reads_shape_only(node)  # that would write out what only has a shape
            results = _run(model, values, dtypes, wide)
    except Exception as error:  # an operator that is missing there, or declines: leave the node to the runtime
        return f"its value never changes, but onnx cannot compute it ({type(error).__name__})"
    for result, dtype, shape in zip(results, dtypes, shapes, strict=True):
        if result.dtype != dtype or not _fits(result.shape, shape):
            return "its value never changes, but onnx computes another type or shape than it infers"
    return results


def _find_excess(
    node: Node,
    values: Mapping[str, Values],
    outputs: Sequence[tuple[int, tuple[int, ...] | None]],
    growth: int,
    kept: Collection[str],
) -> str:
    """Why the outputs, given by types and sizes, are too large or take too long to compute; "" if they do not."""
    held = 0 if _reads_shape_only(node) else sum(v.nbytes for name, v in values.items() if name not in kept)
    allowed = max(NEGLIGIBLE_BYTES, min(max(MAX_FOLDED_BYTES, held), held + growth))
    for code, size in outputs:
        if size is None:
            return "its value never changes, but its size is not known before it is computed"
        needed = math.prod(size) * onnx.helper.tensor_dtype_to_np_dtype(code).itemsize if code else 0
        if needed > allowed:
            return f"its value never changes, but takes {needed:,} bytes (limit {allowed:,})"
    work, limit = _count_work(node, values, outputs[0][1] or ())
    if work > limit:
        return f"its value never changes, but takes {work:,} operations to compute (limit {limit:,})"
    return ""


def _run(
    model: onnx.ModelProto, values: Mapping[str, Values], dtypes: Sequence[np.dtype[Any]], wide: bool
) -> list[Values]:
    """Run onnx's reference evaluator, in float64 if `wide`, and round floating-point results to their types."""
    from onnx.reference import ReferenceEvaluator  # loads the schema of every operator

    feeds = {n: v.astype(np.float64) if wide and str(v.dtype) in FLOATS else v for n, v in values.items()}
    graph = model.graph
    numbers = [t for t in graph.initializer if wide and t.name in feeds and feeds[t.name].dtype == np.float64]
    for tensor in numbers:  # an initializer of this name would take the place of the value
        graph.initializer.remove(tensor)
    with np.errstate(all="ignore"):
        results = [np.asarray(r) for r in ReferenceEvaluator(model).run(None, feeds)]
        return [
            r.astype(d) if wide and r.dtype.kind == "f" and str(d) in FLOATS else r
            for r, d in zip(results, dtypes, strict=True)
        ]


def _largest_size(node: Node, values: Mapping[str, Values], shape: Shape | None) -> tuple[int, ...] | None:
    """The size of a result, or the largest one if it depends on the values; None if it is unknown."""
    if node.op == "NonZero" and shape is not None:
        data = next(iter(values.values()))
        return max(data.ndim, 1), data.size
    return as_fixed(shape)


def _fits(size: tuple[int, ...], shape: Shape | None) -> bool:
    return (
        shape is not None
        and len(size) == len(shape)
        and all(a == b or not isinstance(b, int) for a, b in zip(size, shape, strict=True))
    )


def _count_work(node: Node, values: Mapping[str, Values], size: tuple[int, ...]) -> tuple[int, int]:
    """How many operations a node takes, and the limit; 0 if the size of its result bounds them."""
    shapes, count = [v.shape for v in values.values()], math.prod(size)
    if node.op == "Resize":
        return count, MAX_RESIZED
    if node.op in ("Conv", "ConvTranspose") and len(shapes) > 1:
        return max(count, math.prod(shapes[0])) * math.prod(shapes[1][1:]), MAX_FOLDED_WORK
    if node.op in ("MatMul", "Gemm") and shapes[0]:
        return count * max(shapes[0]), MAX_FOLDED_WORK
    if node.op == "Einsum":
        return _count_einsum(str(node.attrs["equation"]), [values[t.name].shape for t in node.inputs]), MAX_FOLDED_WORK
    if node.op in ("AveragePool", "MaxPool"):
        return count * math.prod(node.attrs["kernel_shape"]), MAX_FOLDED_WORK
    return 0, MAX_FOLDED_WORK


def _count_einsum(equation: str, shapes: Sequence[Sequence[int]]) -> int:
    """How many products an Einsum adds: one for each combination of indices; with an ellipsis, an upper bound."""
    if "." in equation:
        return math.prod(math.prod(shape) for shape in shapes)
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    sizes = {
        index: d for term, shape in zip(terms, shapes, strict=False) for index, d in zip(term, shape, strict=False)
    }
    return math.prod(sizes.values())


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


def _find_disagreement(node: Node, values: Mapping[str, Values], opset: int) -> str:
    """Why onnxruntime may compute something else than onnx's reference evaluator; "" if nothing is known."""
    data, *others = values.values()
    reason = _find_numerical_disagreement(node, data, others)
    if reason:
        return f"its value never changes, but runtimes disagree on {reason}"
    if node.op == "Squeeze" and (node.attrs.get("axes") == [] or any(v.size == 0 for v in others)):
        return "its value never changes, but runtimes disagree on an empty list of axes"
    if _skips_entries(node, list(values.values())):
        return "its value never changes, but runtimes disagree on auto_pad with strides beyond the kernel"
    if node.op == "Resize" and any(
        v.dtype == np.float32 and any(is_ambiguous(d, s) for d in data.shape for s in v.ravel()) for v in others
    ):
        return "its value never changes, but runtimes disagree on its size"
    if node.op == "Resize" and (
        node.attrs.get("mode", "nearest") == "nearest"
        or node.attrs.get("coordinate_transformation_mode", "half_pixel") not in INTERPOLATED
    ):
        return "its value never changes, but runtimes disagree on which element is the nearest, and on corners"
    if node.op in SOFTMAXES and opset < 13 and node.attrs.get("axis", 1) not in (-1, data.ndim - 1):
        return "its value never changes, but onnx's evaluator normalises along one axis, as since opset 13 only"
    return ""


def _find_numerical_disagreement(node: Node, data: Values, others: Sequence[Values]) -> str:
    """On which numbers runtimes disagree, that this node computes or reads; "" if nothing is known."""
    whole, op = data.dtype.kind in "iu", str(node.op)
    if op in INFINITE and not whole and any(not np.isfinite(v).all() for v in (data, *others) if is_floating(v.dtype)):
        return f"{op} of NaN and infinity"
    if op in EXTREMES and is_floating(data.dtype) and np.isnan(data).any():
        return "the extremes of numbers that include NaN"
    if op == "LogSoftmax" and not whole and data.size and float(data.max()) - float(data.min()) > LARGEST_EXPONENT:
        return "LogSoftmax of numbers that far apart"
    if op == "ReduceMean" and not data.size:
        return "the mean of nothing"
    if op == "NonZero" and not data.ndim:
        return "NonZero of a scalar"
    if whole and (op == "Shrink" or (op in MAGNITUDES and not _is_exact(MAGNITUDES[op](data), data.dtype))):
        return f"{op} of large integers"
    if op == "Slice" and len(others) > 3:
        ends, steps = others[1].ravel().tolist(), others[3].ravel().tolist()
        if any(correct_end(end, step) != end for end, step in zip(ends, steps, strict=False)):
            return "the last position of a Slice backwards"
    return ""


def _is_exact(largest: float, dtype: np.dtype[Any]) -> bool:
    """Whether no sum up to this number overflows an integer type, nor is rounded on the way in float64."""
    return largest < min(float(np.iinfo(dtype).max) + 1, 2.0**53)


def _skips_entries(node: Node, values: Sequence[Values]) -> bool:
    """Whether a window has automatic padding and a stride that exceeds its size."""
    if not str(node.attrs.get("auto_pad", "NOTSET")).startswith("SAME"):
        return False
    kernel = node.attrs.get("kernel_shape") or (values[1].shape[2:] if len(values) > 1 else ())
    dilations = node.attrs.get("dilations") or [1] * len(kernel)
    extents = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=False)]
    return any(s > e for s, e in zip(node.attrs.get("strides", ()), extents, strict=False))
