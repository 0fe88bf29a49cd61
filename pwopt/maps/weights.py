"""Read operators with a matrix of weights: Conv, ConvTranspose, Gemm, MatMul."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pwopt.algebra import Array
from pwopt.algebra.geometry import Geometry, Refusal, RefusedError, make_geometry, pointwise_geometry
from pwopt.algebra.linear import LinearMap
from pwopt.algebra.summaries import has_nonzero
from pwopt.graph import attributes
from pwopt.graph.dtypes import FLOATING
from pwopt.graph.ir import Constant, Node, Tensor
from pwopt.graph.view import View
from pwopt.maps.forms import NOT_CONSTANT, NOT_FINITE, Reading, Result, reads

#: The most elements of a bias that is read to find out whether its rows are equal.
MAX_BIAS = 1 << 20


def _weight(view: View, node: Node, index: int) -> Constant | None:
    """The tensor that holds a constant floating-point weight, or None."""
    tensor = view.optional_input(node, index)
    held = None if tensor is None else view.constant(tensor)
    return held if held is not None and held.dtype in FLOATING else None


def _bias(view: View, node: Node, index: int, channels: int) -> Array | Refusal:
    tensor = view.optional_input(node, index)
    if tensor is None:
        return np.zeros(channels)
    value = view.value(tensor)
    if value is None:
        return Refusal("its bias is not a finite constant")
    return (
        np.asarray(np.broadcast_to(value.reshape(-1), (channels,)))
        if value.size in (1, channels)
        else Refusal("its bias does not have one number per channel")
    )


def _loader(
    view: View, weight: Tensor, geometry: Geometry, bias: Array, arrange: Callable[[Array], Array]
) -> Callable[[], LinearMap]:
    def load() -> LinearMap:
        value = view.value(weight)
        if value is None:
            raise RefusedError(NOT_FINITE.reason)
        return LinearMap.of(geometry, arrange(value), bias)

    return load


@reads("Conv")
def read_conv(view: View, node: Node) -> Result:
    weight = _weight(view, node, 1)
    if weight is None:
        return NOT_CONSTANT
    out, inn, *kernel = weight.shape
    spatial = attributes.read_spatial_attributes(view, node, tuple(kernel))
    bias = _bias(view, node, 2, out)
    if isinstance(spatial, Refusal):
        return spatial
    if isinstance(bias, Refusal):
        return bias
    groups = node.attrs.get("group", 1)
    if groups < 1 or out % groups:
        return Refusal("its groups do not divide its channels")
    biased = has_nonzero(bias)
    geometry = make_geometry(out, inn * groups, groups, tuple(kernel), *spatial, biased=biased)
    return Reading(
        (node,), node.inputs[0], geometry, 1, "conv", weight, _loader(view, weight, geometry, bias, lambda w: w)
    )


@reads("ConvTranspose")
def read_conv_transpose(view: View, node: Node) -> Result:
    weight = _weight(view, node, 1)
    if weight is None:
        return NOT_CONSTANT
    groups = node.attrs.get("group", 1)
    inn, out, *kernel = weight.shape
    out *= groups
    spatial = attributes.read_spatial_attributes(view, node, tuple(kernel))
    bias = _bias(view, node, 2, out)
    if isinstance(spatial, Refusal):
        return spatial
    if isinstance(bias, Refusal):
        return bias
    if groups < 1 or inn % groups:
        return Refusal("its groups do not divide its channels")
    extra = tuple(node.attrs.get("output_padding", (0,) * len(kernel)))
    automatic = "output_shape" if "output_shape" in node.attrs else str(node.attrs.get("auto_pad", "NOTSET"))
    if automatic not in ("NOTSET", "VALID"):  # its padding follows from sizes: it is written back as it was
        spatial = spatial._replace(pads=(0, 0) * len(kernel), auto_pad=automatic)
    biased = bool(np.any(bias))
    geometry = Geometry(out, inn, groups, tuple(kernel), *spatial, transposed=True, output_padding=extra, biased=biased)

    def arrange(w: Array) -> Array:  # ONNX keeps (in, out / groups, *kernel)
        blocks: Array = w.reshape(groups, inn // groups, out // groups, *kernel)
        return np.reshape(blocks.swapaxes(1, 2), (out, inn // groups, *kernel))

    return Reading(
        (node,), node.inputs[0], geometry, 1, "conv-transpose", weight, _loader(view, weight, geometry, bias, arrange)
    )


def _row(view: View, tensor: Tensor, channels: int) -> Array | Refusal:
    """The row of a two-dimensional bias whose rows are all equal."""
    value = view.value(tensor) if (view.elements(tensor) or 0) <= MAX_BIAS else None
    if value is None or not value.size or np.any(value != value[:1]):
        return Refusal("its bias differs between rows")
    return np.array(np.broadcast_to(value[0], (channels,)))


@reads("Gemm")
def read_gemm(view: View, node: Node) -> Result:
    weight = _weight(view, node, 1)
    if weight is None:
        return NOT_CONSTANT
    flip = bool(node.attrs.get("transB", 0))
    inn, out = reversed(weight.shape) if flip else weight.shape
    alpha, beta = node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0)
    held = view.optional_input(node, 2)
    if held is not None and (held.shape is None or len(held.shape) > 2):
        return Refusal("its bias differs between rows")
    shape = () if held is None or held.shape is None else tuple(held.shape)
    rows = len(shape) == 2 and shape[0] != 1
    bias = _row(view, held, out) if rows and held is not None else _bias(view, node, 2, out)
    if isinstance(bias, Refusal):
        return bias
    bias = beta * bias
    geometry = pointwise_geometry(out, inn, biased=bool(np.any(bias)))
    return Reading(
        (node,), node.inputs[0], geometry, 1, "gemm", weight,
        _loader(view, weight, geometry, bias, lambda w: alpha * (w if flip else w.T)),
        turned=bool(node.attrs.get("transA", 0)),
    )  # fmt: skip


@reads("MatMul")
def read_matmul(view: View, node: Node) -> Result:
    """Read x·W, which acts on the last axis, or W·x, which acts on the axis before it."""
    left, right = _weight(view, node, 0), _weight(view, node, 1)
    if (left is None) == (right is None):
        return None  # data-dependent, or foldable as a constant
    weight, source = (right, node.inputs[0]) if right is not None else (left, node.inputs[1])
    rank = view.rank(source)
    if weight is None or len(weight.shape) != 2:
        return Refusal("its weight is not one matrix")
    if rank is None:
        return Refusal(view.explain_unknown_shape(source))
    if rank < (1 if left is None else 2):
        return Refusal("its input is a vector")
    out, inn = weight.shape if left is not None else reversed(weight.shape)
    geometry = pointwise_geometry(out, inn)
    if left is not None:
        load = _loader(view, weight, geometry, np.zeros(out), lambda w: w)
        return Reading((node,), source, geometry, rank - 2, "left-matmul", weight, load)
    load = _loader(view, weight, geometry, np.zeros(out), lambda w: w.T)
    return Reading((node,), source, geometry, rank - 1, "matmul", weight, load)
