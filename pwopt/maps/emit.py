"""Write linear maps as nodes: in the form of the map that they replace, rounded once to the type of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pwopt.algebra import Array, Values
from pwopt.algebra.geometry import RefusedError
from pwopt.algebra.linear import LinearMap
from pwopt.algebra.summaries import count_zeros, find_magnitude, is_finite
from pwopt.graph.dtypes import range_of
from pwopt.graph.ir import Constant, Node, Tensor, Variable
from pwopt.graph.view import View
from pwopt.maps.forms import Reading

#: Types for which onnxruntime has a BatchNormalization kernel or casts around one.
NORMALISABLE = ("float16", "float32", "float64")


#: Attributes that determine the padding of a transposed convolution.
FROM_SIZES = ("auto_pad", "output_shape", "pads")


@dataclass(frozen=True)
class Written:
    """Nodes that compute a map and are not yet in the graph, and the rounding error of the weights.

    Attributes
    ----------
    nodes : tuple of Node
        The last one produces the output.
    residual : float
        max |rounded − exact| / max |exact| over weights and bias.
    """

    nodes: tuple[Node, ...]
    residual: float


@dataclass(frozen=True)
class Rounded:
    """The numbers of a map in the model's type.

    Attributes
    ----------
    weight, bias : array
        Shaped as those of the `LinearMap`.
    residual : float
        max |rounded − exact| / max |exact|, the larger one of weight and bias.
    """

    weight: Values
    bias: Values
    residual: float


def round_values(values: Array, dtype: np.dtype[Any]) -> Values:
    """Round float64 values once to a type of the model.

    Raises
    ------
    RefusedError
        If one of them is not finite in that type.
    """
    with np.errstate(over="ignore", under="ignore"):
        low = values.astype(dtype)
    if not is_finite(low if dtype.kind == "f" else low.astype(np.float64)):
        raise RefusedError(f"the folded weights overflow {dtype}")
    return low


def round_map(linear: LinearMap, dtype: np.dtype[Any]) -> Rounded:
    """Round the numbers of a map once to a type of the model.

    Raises
    ------
    RefusedError
        If a number is not finite in that type, if the map could overflow where the original does not
        (`pwopt.algebra.overflow`), or if all weights of an output channel become zero. Weights that become zero beside
        others of the same channel, and biases that become zero, are below the rounding error of the sum.
    """
    weight, biased = round_values(linear.weight, dtype), linear.geometry.biased
    bias = round_values(linear.bias, dtype) if biased else linear.bias.astype(dtype)
    range_of(dtype).check(linear)
    if count_zeros(weight) > count_zeros(linear.weight):
        rows, exact = (v.reshape(linear.geometry.out_channels, -1) for v in (weight, linear.weight))
        if (exact.any(axis=1) & ~rows.any(axis=1)).any():
            raise RefusedError(f"a folded channel underflows {dtype}")
    of_bias = relative_rounding(bias, linear.bias) if biased else 0.0
    return Rounded(weight, bias, max(relative_rounding(weight, linear.weight), of_bias))


def relative_rounding(low: Values, exact: Array) -> float:
    """max |low − exact| / max |exact|; 0 if all are zero."""
    largest = find_magnitude(exact)
    return find_magnitude(np.subtract(low, exact, dtype=np.float64)) / largest if largest else 0.0


def check(view: View, linear: LinearMap, like: Reading, source: Tensor, axis: int | None) -> Rounded:
    """Round the numbers that `write` would write with these arguments, or refuse as it would.

    Raises
    ------
    RefusedError
        If `write` would.
    """
    g, dtype = linear.geometry, _type_of(view, like, source)
    if dtype is None:
        raise RefusedError("the element type is not known")
    if not g.pointwise and not like.kind.startswith("conv"):
        raise RefusedError("only a convolution has strides, taps or padding")
    if axis is not None and like.kind == "diagonal" and view.rank(source) is None:
        raise RefusedError("the rank of its input is not known")
    if view.opset < 7 and not like.kind.startswith("conv"):
        raise RefusedError(f"operators of opset {view.opset} do not broadcast; --opset converts the model")
    if g.transposed and g.auto_pad and like.kind != "conv-transpose":
        raise RefusedError("the padding of a transposed convolution follows from its sizes")
    return round_map(linear, dtype)


def _type_of(view: View, like: Reading, source: Tensor) -> np.dtype[Any] | None:
    return view.dtype(like.weight if like.weight is not None else source)


def write(
    view: View,
    linear: LinearMap,
    like: Reading,
    source: Tensor,
    output: Tensor,
    axis: int | None,
    *,
    inherit: bool = True,
) -> Written:
    """Nodes for `output = linear(source)` in the form and element type of `like`.

    Parameters
    ----------
    view : View
    linear : LinearMap
    like : Reading
        The map being replaced: its kind chooses the operator.
    source, output : Tensor
    axis : int or None
        The channel axis; None for a scalar scale and shift.
    inherit : bool
        Whether the node, and weights that nobody else reads, pass their names on.

    Raises
    ------
    RefusedError
        If the form cannot hold the map, or the type cannot hold its numbers. The graph is unchanged then.
    """
    low = check(view, linear, like, source, axis)
    names = _inherited(view, like) if inherit else {}
    view.release_names(names.values())
    writer = _Writer(view, linear, low, like, source, output, axis, names, like.nodes[0].name if inherit else "")
    return Written(tuple(WRITERS[like.kind](writer)), low.residual)


def _inherited(view: View, like: Reading) -> dict[str, str]:
    """The names of the weight and the bias of `like`, if nothing else reads them."""
    node = like.nodes[0]
    slots = {"weight": 0 if like.kind == "left-matmul" else 1, "bias": 2 if node.op != "MatMul" else None}
    names = {}
    for role, index in slots.items():
        tensor = view.optional_input(node, index) if index is not None and like.kind != "diagonal" else None
        if tensor is not None and view.sole_reader(tensor) is node:
            names[role] = str(tensor.name)
    return names


@dataclass
class _Writer:
    view: View
    linear: LinearMap
    low: Rounded
    like: Reading
    source: Tensor
    output: Tensor
    axis: int | None
    names: dict[str, str]
    node_name: str

    def constant(self, role: str, values: Values) -> Constant:
        return self.view.new_constant(self.names.get(role, f"{self.output.name}_{role}"), values)

    def node(self, op: str, inputs: list[Tensor], output: Tensor, suffix: str = "", **attrs: Any) -> Node:
        name = self.view.node_name(self.node_name, suffix) if suffix else self.node_name
        return Node(op, name, attrs, inputs, [output])

    def middle(self) -> Variable:
        return self.view.new_variable(f"{self.output.name}_product", self.output)

    def matrix(self) -> Values:
        """The weight as (out, in)."""
        return self.low.weight.reshape(self.linear.geometry.out_channels, -1)

    def conv(self) -> list[Node]:
        g, values = self.linear.geometry, self.low.weight
        attrs: dict[str, Any] = {"dilations": list(g.dilations), "group": g.groups, "kernel_shape": list(g.kernel)}
        attrs |= {"auto_pad": g.auto_pad} if g.auto_pad else {"pads": list(g.pads)}
        attrs["strides"] = list(g.strides)
        if g.transposed and g.auto_pad:
            attrs.pop("auto_pad")
            attrs |= {k: v for k, v in self.like.nodes[0].attrs.items() if k in FROM_SIZES}
        if g.transposed:
            inn = g.in_channels // g.groups
            values = values.reshape(g.groups, -1, inn, *g.kernel).swapaxes(1, 2).reshape(g.in_channels, -1, *g.kernel)
            if any(g.output_padding):
                attrs["output_padding"] = list(g.output_padding)
        inputs = [self.source, self.constant("weight", values)]
        if g.biased:
            inputs.append(self.constant("bias", self.low.bias))
        return [self.node("ConvTranspose" if g.transposed else "Conv", inputs, self.output, **attrs)]

    def gemm(self) -> list[Node]:
        first = self.like.nodes[0]
        flip = first.op == "Gemm" and bool(first.attrs.get("transB", 0))
        inputs = [self.source, self.constant("weight", self.matrix() if flip else self.matrix().T)]
        if self.linear.geometry.biased or self.view.opset < 11:  # the third input is optional from opset 11
            inputs.append(self.constant("bias", self.low.bias))
        attrs: dict[str, Any] = {name: 1 for name, wanted in (("transA", self.like.turned), ("transB", flip)) if wanted}
        return [self.node("Gemm", inputs, self.output, **attrs)]

    def matmul(self) -> list[Node]:
        left, biased = self.like.kind == "left-matmul", self.linear.geometry.biased
        if not left and biased and self.view.rank(self.source) == 2:
            return self.gemm()
        held = self.constant("weight", self.matrix() if left else self.matrix().T)
        inputs = [held, self.source] if left else [self.source, held]
        if not biased:
            return [self.node("MatMul", inputs, self.output)]
        product, bias = self.middle(), self.low.bias
        shift = self.constant("bias", bias[:, None] if left else bias)
        return [self.node("MatMul", inputs, product), self.node("Add", [product, shift], self.output, "_bias")]

    def affine(self) -> list[Node]:
        """A scale and a shift: one BatchNormalization if the channel axis is 1, else Mul, Add or both.

        No constant is called `…_scale`: onnxruntime's quantiser takes that name for the scale of a tensor.
        """
        scale, shift = self.matrix().reshape(-1), self.low.bias
        scales, shifts = bool(np.any(self.linear.scale != 1.0)), self.linear.geometry.biased
        rank = self.view.rank(self.source) or 0
        channels = self.view.dim(self.source, 1) if rank >= 3 and self.axis in (1, None) else None
        if scales and shifts and isinstance(channels, int) and channels > 0 and str(scale.dtype) in NORMALISABLE:
            parts = {"factor": scale, "shift": shift, "mean": 0, "var": 1}
            wide = {role: np.full(channels, values, scale.dtype) for role, values in parts.items()}
            inputs = [self.source, *(self.constant(role, values) for role, values in wide.items())]
            return [self.node("BatchNormalization", inputs, self.output, epsilon=0.0)]
        shape = () if self.axis is None else (-1, *(1,) * (rank - 1 - self.axis))
        if not shifts:
            return [self.node("Mul", [self.source, self.constant("factor", scale.reshape(shape))], self.output)]
        if not scales:
            return [self.node("Add", [self.source, self.constant("shift", shift.reshape(shape))], self.output)]
        product = self.middle()
        return [
            self.node("Mul", [self.source, self.constant("factor", scale.reshape(shape))], product),
            self.node("Add", [product, self.constant("shift", shift.reshape(shape))], self.output, "_shift"),
        ]


#: How each kind of reading is written back; other kinds are read only.
WRITERS = {
    "conv": _Writer.conv,
    "conv-transpose": _Writer.conv,
    "gemm": _Writer.gemm,
    "matmul": _Writer.matmul,
    "left-matmul": _Writer.matmul,
    "diagonal": _Writer.affine,
}
