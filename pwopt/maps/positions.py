"""Operators that compute each position of their result from the same position, or from a window, of their inputs."""

from __future__ import annotations

import numpy as np

from pwopt.graph.ir import Node, Tensor
from pwopt.graph.operators import ACTIVATIONS
from pwopt.graph.shapes import Shape, ShapeChange
from pwopt.graph.view import View
from pwopt.maps import forms
from pwopt.maps.forms import Reading

#: A stride for each spatial axis.
Steps = tuple[int, ...]
#: Pooling that can skip positions as convolutions can.
STRIDED_POOLS = ("MaxPool", "AveragePool")


def stencil(view: View, node: Node | None) -> Reading | None:
    """Read a convolution whose padding is known."""
    reading = forms.linear(view, node)
    fits = reading is not None and reading.kind == "conv" and not reading.geometry.auto_pad
    return reading if fits else None


def pooling(view: View, node: Node) -> bool:
    """Whether a node pools windows that its explicit padding determines."""
    plain = not node.attrs.get("ceil_mode", 0) and node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    return view.op(node) in STRIDED_POOLS and plain and len([t for t in node.outputs if t.name]) == 1


def has_positions(view: View, tensor: Tensor, rank: int) -> bool:
    """Whether a tensor has more than one position."""
    shape = view.shape(tensor)
    return shape is not None and len(shape) == rank + 2 and any(d != 1 for d in shape[2:])


def positionwise(view: View, node: Node) -> bool:
    """Whether an operator computes each position from the same position of its inputs."""
    if node not in view.positionwise:  # each of many inputs may ask
        view.positionwise[node] = _is_positionwise(view, node)
    return view.positionwise[node]


def _is_positionwise(view: View, node: Node) -> bool:
    op, out = view.op(node), view.shape(node.outputs[0]) if node.outputs else None
    if out is None or len(out) < 3 or len([t for t in node.outputs if t.name]) != 1:
        return False
    if op == "Concat":
        return bool(node.attrs.get("axis", 1) == 1) and all(
            view.rank(t) == len(out) and view.constant(t) is None for t in node.inputs
        )
    reading = forms.linear(view, node)
    if reading is not None and reading.kind == "diagonal":
        return reading.axis in (1, None)
    if op in ACTIVATIONS:
        return all(view.elements(t) == 1 for t in node.inputs[1:] if t.name)
    if op not in ("Add", "Sub", "Mul", "Div", "Sum", "Max", "Min", "Mean") or view.opset < 7:
        return False
    return all(_fits(view, t, out) for t in node.inputs)


def _fits(view: View, tensor: Tensor, out: Shape) -> bool:
    """Whether an operand has one value for all positions of a result, or one for each position."""
    shape = view.shape(tensor)
    if view.constant(tensor) is not None:
        return view.elements(tensor) == 1
    if shape is None or len(shape) != len(out):
        return False
    same = all(p == q and p is not None for p, q in zip(shape[2:], out[2:], strict=True))
    return same or all(d == 1 for d in shape[2:])


def every(steps: Steps) -> ShapeChange:
    """How a shape changes if only every s-th position is kept."""

    def change(shape: Shape) -> Shape:
        parts = zip(shape[2:], steps, strict=True)
        return (*shape[:2], *(-(-d // s) if isinstance(d, int) else d if s == 1 else None for d, s in parts))

    return change


def subsample(view: View, source: Tensor, output: Tensor, strides: Steps) -> Node:
    """Every stride-th position: MaxPool stays in onnxruntime's blocked layout, but does not know every type."""
    name = view.node_name(f"{source.name}", "_every")
    if view.opset < 10 or str(view.dtype(source)) in ("float32", "float64"):  # Slice has no steps before
        attrs = {"kernel_shape": [1] * len(strides), "strides": list(strides)}
        return Node("MaxPool", name, attrs, [source], [output])
    rank = len(strides)
    values = {"starts": [0] * rank, "ends": [2**31 - 1] * rank, "axes": range(2, 2 + rank), "steps": strides}
    inputs = [view.new_constant(f"{output.name}_{k}", np.array(list(v), np.int64)) for k, v in values.items()]
    return Node("Slice", name, {}, [source, *inputs], [output])
