"""Read scales and shifts per channel: BatchNormalization, arithmetic with a constant, operators without effect."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from pwopt.algebra import Array, zeros
from pwopt.algebra.geometry import Refusal
from pwopt.algebra.linear import LinearMap
from pwopt.algebra.summaries import has_nonzero, is_finite
from pwopt.graph import attributes
from pwopt.graph.dtypes import FLOATING
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.view import View
from pwopt.maps.forms import NOT_CONSTANT, NOT_FINITE, Reading, Result, linear, reads


def diagonal(node: Node, source: Tensor, scale: Array, shift: Array, axis: int | None) -> Result:
    if not scale.size:
        return None
    if not (is_finite(scale) and is_finite(shift)):
        return NOT_FINITE
    linear_map = LinearMap.diagonal(scale, shift)
    return Reading((node,), source, linear_map.geometry, axis, "diagonal", None, lambda: linear_map)


@reads("BatchNormalization")
def read_batch_normalization(view: View, node: Node) -> Result:
    """γ(x − μ)/√(σ² + ε) + β at inference."""
    attrs = node.attrs
    if (
        attrs.get("training_mode", 0)
        or (view.opset < 7 and not attrs.get("is_test", 0))
        or any(o.name for o in node.outputs[1:])
    ):
        return Refusal("it normalises with the batch's own statistics (training mode)")
    if not attrs.get("spatial", 1):
        return Refusal("it normalises each position on its own (spatial = 0)")
    values = [view.value(t) for t in node.inputs[1:5]]
    if len(values) != 4 or any(v is None for v in values):
        return NOT_CONSTANT
    gamma, beta, mean, variance = given = [v for v in values if v is not None]
    if len({v.shape for v in given}) > 1 or gamma.ndim != 1:
        return Refusal("its parameters are not one number per channel")
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(variance + attrs.get("epsilon", float(np.float32(1e-5))))
        shift = beta - mean * scale
    return diagonal(node, node.inputs[0], scale, shift, 1)


def _channel_constant(view: View, node: Node, constant: Tensor, source: Tensor) -> tuple[Array, int | None] | None:
    """The numbers of a constant that scales or shifts `source` per channel, and the channel axis (None for one number).

    None if the constant varies along several axes, or if broadcasting could enlarge `source`.
    """
    held, rank = view.constant(constant), view.rank(source)
    if held is None:
        return None
    shape = tuple(held.shape)
    elements = math.prod(shape)
    if elements == 0 or (elements > 1 and rank is None):
        return None
    if view.opset < 7 and node.attrs.get("broadcast", 0) and "axis" in node.attrs and rank is not None:
        shape = (*shape, *(1,) * (rank - node.attrs["axis"] - len(shape)))
    if len(shape) > (rank or 0):
        return None
    axes = [len(shape) - i for i, d in enumerate(shape) if d != 1]
    if len(axes) > 1:
        return None
    value = view.value(held)
    if value is None:
        return None
    if not axes:
        return value.reshape(1), None
    axis = (rank or 0) - axes[0]
    return (value.reshape(-1), axis) if view.dim(source, axis) == elements else None


def _operands(view: View, node: Node) -> tuple[Tensor, Array, int | None, bool] | None:
    """The data input of an arithmetic operator, its constant per channel, the channel axis, and whether the constant is
    first."""
    if len(node.inputs) != 2:
        return None
    sides = [view.constant(t) is not None for t in node.inputs]
    if sides[0] == sides[1]:
        return None
    source, constant = node.inputs if sides[1] else node.inputs[::-1]
    found = _channel_constant(view, node, constant, source)
    return None if found is None else (source, *found, sides[0])


def _explain_unknown(view: View, node: Node) -> Refusal | None:
    """Why an operator on one constant is not read although it may be a scale or shift: a shape is unknown."""
    data = [t for t in node.inputs if view.constant(t) is None]
    unknown = len(node.inputs) == 2 and len(data) == 1 and view.rank(data[0]) is None
    return Refusal(view.explain_unknown_shape(data[0])) if unknown else None


def adds_nothing(view: View, node: Node) -> tuple[Tensor, Array] | None:
    """The data input of an Add or Sub of zero, and the zero that is added per channel: +0 or −0."""
    found = _operands(view, node) if view.is_a(node, "Add", "Sub") else None
    if found is None or (node.op == "Sub" and found[3]) or not found[1].size or has_nonzero(found[1]):
        return None
    return found[0], -found[1] if node.op == "Sub" else found[1]


def subtracts_from_nothing(view: View, node: Node) -> bool:
    """Whether a node computes +0 − x in the shape of x, which is −x except for the sign of zeros."""
    found = _operands(view, node) if view.is_a(node, "Sub") else None
    return found is not None and found[3] and not np.any(found[1]) and zeros.joins(found[1])


@reads("Mul", "Div", "Add", "Sub")
def read_arithmetic(view: View, node: Node) -> Result:
    """Read a scale or a shift by a constant; an Add after a MatMul is the bias of that MatMul.

    Adding +0 is not a linear map, because it turns −0 into +0. `clean-up` removes it, and replaces 0 − x by −x, if no
    operator depends on the sign of the zeros.
    """
    found = _operands(view, node)
    if found is None:
        return _explain_unknown(view, node)
    source, value, axis, first = found
    op, zero = node.op, np.zeros(value.shape)
    nothing = op in ("Add", "Sub") and value.size and not has_nonzero(value)
    if nothing and not zeros.keeps(-value if op == "Sub" and not first else value):
        return Refusal("adding +0 makes +0 of −0")
    if op == "Add":
        return _matmul_bias(view, node, source, value, axis) or diagonal(node, source, zero + 1, value, axis)
    if op == "Sub":
        return (
            diagonal(node, source, zero - 1, value, axis) if first else diagonal(node, source, zero + 1, -value, axis)
        )
    if op == "Mul":
        return diagonal(node, source, value, zero, axis)
    if first:
        return None  # constant / x
    with np.errstate(divide="ignore"):
        return diagonal(node, source, 1.0 / value, zero, axis)


def _matmul_bias(view: View, node: Node, source: Tensor, value: Array, axis: int | None) -> Result:
    maker = view.producer(source)
    if not view.is_a(maker, "MatMul") or view.sole_reader(source) is not node:
        return None
    product = linear(view, maker)
    if product is None or axis not in (product.axis, None):
        return None
    bias = np.broadcast_to(value, (product.geometry.out_channels,))

    def load() -> LinearMap:
        base = product.load()
        return LinearMap.of(base.geometry, base.weight, bias)

    geometry = replace(product.geometry, biased=bool(np.any(bias)))
    return replace(product, nodes=(*product.nodes, node), geometry=geometry, load=load)


@reads("Neg")
def read_neg(view: View, node: Node) -> Result:
    if view.dtype(node.inputs[0]) not in FLOATING:
        return None
    return diagonal(node, node.inputs[0], -np.ones(1), np.zeros(1), None)


@reads("Identity", "Dropout")
def read_identity(view: View, node: Node) -> Result:
    if any(o.name for o in node.outputs[1:]):
        return Refusal("its mask is used")
    if node.op == "Dropout" and not attributes.is_inactive_dropout(view, node):
        return Refusal("it drops units (training mode)")
    if view.dtype(node.inputs[0]) not in FLOATING:
        return None
    return diagonal(node, node.inputs[0], np.ones(1), np.zeros(1), None)
