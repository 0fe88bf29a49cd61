"""Linear maps → nodes: one rounding to the model's own type, in the form that the map came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from pwopt.forms import Reading
from pwopt.graph import View
from pwopt.linear import Array, LinearMap, Refusal

#: Types for which onnxruntime has a BatchNormalization kernel or casts around one.
NORMALISABLE = ("float16", "float32", "float64")


@dataclass(frozen=True)
class Written:
    """Nodes that compute a map, not yet in the graph, and what rounding did to its weights.

    Attributes
    ----------
    nodes : tuple of gs.Node
        The last one produces the output.
    residual : float
        max |rounded − exact| / max |exact| over weights and bias.
    """

    nodes: tuple[gs.Node, ...]
    residual: float


def rounded(values: Array, dtype: np.dtype[Any]) -> np.ndarray | Refusal:
    """`values` in the model's type, rounded once; refused if one overflows or a whole channel's weights vanish."""
    with np.errstate(over="ignore", under="ignore"):
        low = values.astype(dtype)
    if not np.all(np.isfinite(low.astype(np.float64))):
        return Refusal(f"the folded weights overflow {dtype}")
    if values.ndim == 1:  # biases and shifts: nothing is lost where a sum cannot notice
        return low
    rows = values.reshape(len(values), -1) if values.ndim else values.reshape(1, 1)
    lost = np.any(rows, axis=1) & ~np.any(low.reshape(rows.shape).astype(np.float64), axis=1)
    return Refusal(f"a folded channel underflows {dtype}") if lost.any() else low


class _Writer:
    def __init__(self, view: View, name: str, dtype: np.dtype[Any]) -> None:
        self.view, self.name, self.dtype = view, name, dtype
        self.residual = 0.0
        self.refusal: Refusal | None = None

    def constant(self, name: str, values: Array) -> gs.Constant:
        low = rounded(values, self.dtype)
        if isinstance(low, Refusal):
            self.refusal = low
            low = np.zeros(values.shape, self.dtype)
        largest = float(np.max(np.abs(values), initial=0.0))
        if largest:
            self.residual = max(self.residual, float(np.max(np.abs(low.astype(np.float64) - values))) / largest)
        return self.view.new_constant(name, low)

    def node(self, op: str, inputs: list[gs.Tensor], output: gs.Tensor, suffix: str = "", **attrs: Any) -> gs.Node:
        return gs.Node(op, self.name + suffix, attrs, inputs, [output])


def write(
    view: View, linear: LinearMap, like: Reading, source: gs.Tensor, output: gs.Tensor, axis: int | None
) -> Written | Refusal:
    """Nodes for `output = linear(source)` in the form of `like`, whose names and element type they take over.

    Parameters
    ----------
    view : View
    linear : LinearMap
    like : Reading
        The map being replaced: its kind chooses the operator.
    source, output : gs.Tensor
    axis : int or None
        The channel axis; None for a scalar scale and shift.
    """
    reference = like.weight if like.weight is not None else source
    dtype = view.dtype(reference)
    if dtype is None:
        return Refusal("the element type is not known")
    if view.opset < 7 and not like.kind.startswith("conv"):
        return Refusal(f"operators of opset {view.opset} do not broadcast; --opset converts the model")
    held = _own(view, like, 1 if like.kind != "left-matmul" else 0)
    own_bias = _own(view, like, 2) if like.kind in ("conv", "conv-transpose", "gemm") else None
    own_names = [t.name for t in (held, own_bias) if t is not None]
    view.release(own_names)
    weight_name = held.name if held is not None else f"{output.name}_weight"
    bias_name = own_bias.name if own_bias is not None else f"{output.name}_bias"
    writer = _Writer(view, like.nodes[0].name, dtype)
    nodes = FORMS[like.kind](writer, linear, like, source, output, axis, weight_name, bias_name)
    if writer.refusal is not None:
        view.reserve(own_names)
        return writer.refusal
    return Written(tuple(nodes), writer.residual)


def _own(view: View, like: Reading, index: int) -> gs.Tensor | None:
    """The weight or bias tensor of `like` if nobody else reads it, so that its name can pass to its successor."""
    node = like.nodes[0]
    tensor = view.optional(node, index) if like.kind != "diagonal" else None
    return tensor if tensor is not None and view.sole_reader(tensor) is node else None


def _conv(
    w: _Writer,
    linear: LinearMap,
    like: Reading,
    source: gs.Tensor,
    output: gs.Tensor,
    axis: int | None,
    weight: str,
    bias: str,
) -> list[gs.Node]:
    g = linear.geometry
    attrs: dict[str, Any] = {"dilations": list(g.dilations), "group": g.groups, "kernel_shape": list(g.kernel)}
    if g.auto_pad:
        attrs["auto_pad"] = g.auto_pad
    else:
        attrs["pads"] = list(g.pads)
    attrs["strides"] = list(g.strides)
    values = linear.weight
    if g.transposed:
        inn = g.in_channels // g.groups
        values = values.reshape(g.groups, -1, inn, *g.kernel).swapaxes(1, 2).reshape(g.in_channels, -1, *g.kernel)
        if any(g.output_padding):
            attrs["output_padding"] = list(g.output_padding)
    inputs = [source, w.constant(weight, values)]
    if g.biased:
        inputs.append(w.constant(bias, linear.bias))
    return [w.node("ConvTranspose" if g.transposed else "Conv", inputs, output, **attrs)]


def _gemm(
    w: _Writer,
    linear: LinearMap,
    like: Reading,
    source: gs.Tensor,
    output: gs.Tensor,
    axis: int | None,
    weight: str,
    bias: str,
) -> list[gs.Node]:
    flip = like.nodes[0].op == "Gemm" and bool(like.nodes[0].attrs.get("transB", 0))
    matrix = linear.weight.reshape(linear.geometry.out_channels, -1)
    inputs = [source, w.constant(weight, matrix if flip else matrix.T)]
    inputs += [w.constant(bias, linear.bias)] if linear.geometry.biased else []
    if len(inputs) == 2 and w.view.opset < 11:  # the third input is optional from opset 11
        inputs.append(w.constant(bias, linear.bias))
    attrs: dict[str, Any] = {"transB": 1} if flip else {}
    return [w.node("Gemm", inputs, output, **attrs)]


def _matmul(
    w: _Writer,
    linear: LinearMap,
    like: Reading,
    source: gs.Tensor,
    output: gs.Tensor,
    axis: int | None,
    weight: str,
    bias: str,
) -> list[gs.Node]:
    matrix = linear.weight.reshape(linear.geometry.out_channels, -1)
    left = like.kind == "left-matmul"
    if not left and linear.geometry.biased and w.view.rank(source) == 2:
        return _gemm(w, linear, like, source, output, axis, weight, bias)
    held = w.constant(weight, matrix if left else matrix.T)
    inputs = [held, source] if left else [source, held]
    if not linear.geometry.biased:
        return [w.node("MatMul", inputs, output)]
    product = w.view.new_variable(f"{output.name}_product", output, w.view.shape(output))
    shift = w.constant(bias, linear.bias[:, None] if left else linear.bias)
    return [w.node("MatMul", inputs, product), w.node("Add", [product, shift], output, "_bias" if w.name else "")]


def _affine(
    w: _Writer,
    linear: LinearMap,
    like: Reading,
    source: gs.Tensor,
    output: gs.Tensor,
    axis: int | None,
    weight: str,
    bias: str,
) -> list[gs.Node]:
    """A scale and a shift: one BatchNormalization where the channel axis is 1, else Mul and Add as needed."""
    scale, shift = linear.scale, linear.bias
    scales, shifts = bool(np.any(scale != 1.0)), linear.geometry.biased
    rank = w.view.rank(source) or 0
    channels = w.view.dim(source, 1) if rank >= 3 else None
    if scales and shifts and axis in (1, None) and isinstance(channels, int) and str(w.dtype) in NORMALISABLE:
        zero, one = np.zeros(channels), np.ones(channels)
        wide = linear.spread(channels)
        parts = [("scale", wide.scale), ("shift", wide.bias), ("mean", zero), ("var", one)]
        inputs = [source, *(w.constant(f"{output.name}_{name}", values) for name, values in parts)]
        return [w.node("BatchNormalization", inputs, output, epsilon=0.0)]
    ones = (1,) * (rank - 1 - axis) if axis is not None else ()
    shape = (-1, *ones) if axis is not None else ()

    def arrange(values: Array) -> Array:
        return values.reshape(shape)

    if not shifts:
        return [w.node("Mul", [source, w.constant(f"{output.name}_scale", arrange(scale))], output)]
    shift_constant = w.constant(f"{output.name}_shift", arrange(shift))
    if not scales:
        return [w.node("Add", [source, shift_constant], output)]
    product = w.view.new_variable(f"{output.name}_product", output, w.view.shape(output))
    scale_constant = w.constant(f"{output.name}_scale", arrange(scale))
    return [
        w.node("Mul", [source, scale_constant], product),
        w.node("Add", [product, shift_constant], output, "_shift" if w.name else ""),
    ]


#: How each kind of reading is written back; other kinds are read only.
FORMS = {
    "conv": _conv,
    "conv-transpose": _conv,
    "gemm": _gemm,
    "matmul": _matmul,
    "left-matmul": _matmul,
    "diagonal": _affine,
}
