"""Canonical forms of operators that compute no new numbers: what `clean-up` rewrites besides what it removes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from pwopt.graph import attributes, values
from pwopt.graph.dtypes import FLOATING, is_floating
from pwopt.graph.ir import Constant, Node, Tensor
from pwopt.graph.operators import SAME_SHAPE
from pwopt.maps import forms
from pwopt.maps.signed_zeros import read_bounds
from pwopt.rewriting.driver import Rewriter
from pwopt.rewriting.records import Rewrite, Skip

Rule = Callable[[Rewriter, Node], "Rewrite | Skip | None"]
#: Operators that pick or rearrange entries of their first input.
PICKS = ("Gather", "Slice", "Squeeze", "Unsqueeze", "Identity", "Reshape")
#: Types of quantised numbers that survive dequantising and quantising again.
ROUND_TRIPS = ("int4", "uint4", "int8", "uint8", "int16", "uint16")
#: The attributes of QuantizeLinear and DequantizeLinear that only say where the scales apply, or which type results.
LAYOUT = {"axis", "block_size", "output_dtype", "saturate"}
#: The smallest scale for which a quantised number survives, and the inverse of the largest one.
TINY_SCALE = 2.0**-100
#: The first opset in which the bounds of a Clip are inputs.
CLIP_TAKES_BOUNDS = 11
#: The first opset whose arithmetic broadcasts by the rules of numpy.
ARITHMETIC_BROADCASTS_SINCE = 7


def rewrite_canonically(rw: Rewriter, node: Node) -> Rewrite | Skip | None:
    """Rewrite a node in its canonical form; None if it has it already, or if there is none."""
    rule = RULES.get(rw.op(node))
    return rule(rw, node) if rule is not None else None


def _replace_input(rw: Rewriter, node: Node, old: Tensor, new: Tensor, reason: str) -> Rewrite:
    inputs = [new if t is old else t for t in node.inputs]
    return rw.replace([node], [Node(node.op, node.name, dict(node.attrs), inputs, list(node.outputs))], reason)


def is_lossless(source: np.dtype[Any], target: np.dtype[Any]) -> bool:
    """Whether each number of one type is a number of the other one."""
    if source == target:
        return True
    if source.kind == "b":
        return target.kind in "iu" or is_floating(target)
    if source.kind in "iu" and target.kind in "iu":
        a, b = np.iinfo(source), np.iinfo(target)
        return bool(b.min <= a.min and a.max <= b.max)
    if not is_floating(target) or not (source.kind in "iu" or is_floating(source)):
        return False
    wide = ml_dtypes.finfo(target)  # type: ignore[no-untyped-call]
    if source.kind in "iu":
        bits = int(np.iinfo(source).max).bit_length()
        return bits <= wide.nmant + 1 and float(np.iinfo(source).max) <= float(wide.max)
    narrow = ml_dtypes.finfo(source)  # type: ignore[no-untyped-call]
    finest = float(narrow.smallest_subnormal) >= float(wide.smallest_subnormal)
    return bool(narrow.nmant <= wide.nmant and float(narrow.max) <= float(wide.max) and finest)


def _join_casts(rw: Rewriter, node: Node) -> Rewrite | None:
    """Join two Casts, if the first one loses nothing, so that both round once."""
    before = rw.producer(node.inputs[0])
    to = node.attrs.get("to")
    if before is None or to is None:
        return None
    if rw.is_a(before, *PICKS):
        return _cast_sizes_once(rw, before, node)
    if not rw.is_a(before, "Cast"):
        return None
    source, middle = rw.dtype(before.inputs[0]), rw.dtype(node.inputs[0])
    target = onnx.helper.tensor_dtype_to_np_dtype(to)
    if source is None or middle is None or not is_lossless(source, middle):
        return None
    if not is_floating(target) and is_floating(source):
        return None  # runtimes differ in what NaN and large numbers become
    if target.kind in "iu" and is_floating(middle) and not is_lossless(source, target):
        return None  # integers wrap, but what a floating-point number too large for an integer becomes is undefined
    if source != target and rw.other_uses(node.inputs[0]):
        return None
    return _replace_input(rw, node, node.inputs[0], before.inputs[0], f"Cast to {middle} before it loses nothing")


def _cast_sizes_once(rw: Rewriter, pick: Node, node: Node) -> Rewrite | None:
    """Pick sizes in int64 instead of casting them to int32 and back: no size exceeds int32 (`values.END`)."""
    first = rw.producer(pick.inputs[0])
    if first is None or not rw.is_a(first, "Cast") or rw.other_uses(node.inputs[0]):
        return None
    source = first.inputs[0]
    types = [str(rw.dtype(t)) for t in (source, pick.inputs[0], node.outputs[0])]
    found = values.read_entries(rw, source)
    if types != ["int64", "int32", "int64"] or found is None or None in found:
        return None
    inputs = [source, *pick.inputs[1:]]
    new = Node(pick.op, pick.name, dict(pick.attrs), inputs, list(node.outputs))
    return rw.replace([pick, node], [new], "sizes fit int32, so the Casts change nothing")


def undoes_dequantising(rw: Rewriter, node: Node) -> bool:
    """Whether a QuantizeLinear returns the numbers that the DequantizeLinear before it reads.

    (q − z)·s and its quotient by s round once each in float32. For 16 bits, the error is at most 2¹⁷·2⁻²³ < 1/2, so the
    quotient rounds to q − z. A scale near the ends of float32's range would overflow or lose digits.
    """
    before = rw.producer(node.inputs[0])
    if before is None or not rw.is_a(before, "DequantizeLinear") or (node.attrs.keys() | before.attrs.keys()) - LAYOUT:
        return False
    if str(rw.dtype(before.inputs[0])) not in ROUND_TRIPS or rw.dtype(node.outputs[0]) != rw.dtype(before.inputs[0]):
        return False
    scales = rw.raw(node.inputs[1])
    if scales is None or scales.dtype != np.float32 or not np.all((scales > TINY_SCALE) & (scales < 1 / TINY_SCALE)):
        return False
    same_axis = scales.size == 1 or node.attrs.get("axis", 1) == before.attrs.get("axis", 1)
    unblocked = not node.attrs.get("block_size", 0) and not before.attrs.get("block_size", 0)
    return same_axis and unblocked and all(_are_equal(rw, node, before, index) for index in (1, 2))


def _are_equal(rw: Rewriter, a: Node, b: Node, index: int) -> bool:
    """Whether two nodes read equal constants, or nothing, at the same place."""
    pair = [rw.optional_input(n, index) for n in (a, b)]
    if None in pair:
        return pair == [None, None]
    values = [None if t is None else rw.raw(t) for t in pair]
    x, y = values
    return x is not None and y is not None and x.dtype == y.dtype and np.array_equal(x, y)


def _swap_branches(rw: Rewriter, node: Node) -> Rewrite | None:
    """Where(¬c, a, b) = Where(c, b, a)"""
    before = rw.producer(node.inputs[0])
    if before is None or not rw.is_a(before, "Not"):
        return None
    inputs = [before.inputs[0], node.inputs[2], node.inputs[1]]
    new = Node("Where", node.name, {}, inputs, list(node.outputs))
    return rw.replace([node], [new], "its branches are swapped instead of negating its condition")


def _negate_twice(rw: Rewriter, node: Node) -> Rewrite | None:
    before = rw.producer(node.inputs[0])
    return rw.drop(node, before.inputs[0], "Not undoes Not") if before is not None and rw.is_a(before, "Not") else None


def _read_shape_earlier(rw: Rewriter, node: Node) -> Rewrite | None:
    """Read a shape before an operator that keeps it, if nothing else reads its result."""
    before = rw.producer(node.inputs[0])
    if before is None or rw.op(before) not in SAME_SHAPE or rw.other_uses(node.inputs[0]):
        return None
    return _replace_input(rw, node, node.inputs[0], before.inputs[0], f"{before.op} keeps the shape of its input")


def _drop_empty_parts(rw: Rewriter, node: Node) -> Rewrite | None:
    """Remove inputs of a Concat that hold nothing, such as the wrapped part of a roll by 0."""
    axis = attributes.read_concat_axis(rw, node)
    full = [t for t in node.inputs if axis is None or rw.dim(t, axis) != 0]
    if len(full) == len(node.inputs) or not full:
        return None
    new = Node("Concat", node.name, dict(node.attrs), full, list(node.outputs))
    return rw.replace([node], [new], f"{len(node.inputs) - len(full)} of its inputs are empty")


def _multiply_instead(rw: Rewriter, node: Node) -> Rewrite | None:
    """x + … + x = n·x beside another linear map, which can absorb a factor."""
    x, count, dtype = node.inputs[0], len(node.inputs), rw.dtype(node.inputs[0])
    if count < 2 or len(set(node.inputs)) > 1 or dtype not in FLOATING or rw.constant(x) is not None:
        return None
    before, after = rw.producer(x) if rw.sole_reader(x) is node else None, rw.sole_reader(node.outputs[0])
    maps = [r for r in (forms.linear(rw, before), forms.linear(rw, after)) if r is not None]
    if rw.opset < ARITHMETIC_BROADCASTS_SINCE or not any(r.weighted or r.kind == "diagonal" for r in maps):
        return None
    factor = rw.new_constant(f"{node.outputs[0].name}_factor", np.array(count, dtype))
    new = Node("Mul", node.name, {}, [x, factor], list(node.outputs))
    return rw.replace([node], [new], f"a sum of {count} equal terms is a product")


def _absorb_relu(rw: Rewriter, node: Node) -> Rewrite | None:
    """Clip(Relu(x), low, high) = Clip(x, max(low, 0), high) for constant bounds with high ≥ max(low, 0)"""
    relu = rw.producer(node.inputs[0])
    dtype = rw.dtype(node.inputs[0])
    if relu is None or not rw.is_a(relu, "Relu") or rw.other_uses(node.inputs[0]) or dtype not in FLOATING:
        return None
    held = [rw.optional_input(node, i) for i in (1, 2)]
    if any(t is not None and rw.uniform(t) is None for t in held):
        return None
    low, high = read_bounds(rw, node)
    low = max(low, 0.0)
    if not high >= low:
        return None
    if rw.opset < CLIP_TAKES_BOUNDS:
        new = Node("Clip", node.name, {**node.attrs, "min": low}, [relu.inputs[0]], list(node.outputs))
    else:
        bound = rw.new_constant(f"{node.outputs[0].name}_min", np.array(low, dtype))
        new = Node("Clip", node.name, {}, [relu.inputs[0], bound, *node.inputs[2:]], list(node.outputs))
    return rw.replace([relu, node], [new], "Clip bounds its input from below, as Relu does")


def _flatten_weight(rw: Rewriter, node: Node) -> Rewrite | None:
    """Write a weight of one matrix, (1, …, 1, K, N), with two axes, if the other operand has as many axes as it."""
    for index, tensor in enumerate(node.inputs):
        held, other = rw.constant(tensor), node.inputs[1 - index]
        rank = rw.rank(other)
        if held is None or rank is None or not 2 < len(held.shape) <= rank or rw.is_shared(tensor):
            continue
        if any(d != 1 for d in held.shape[:-2]) or rw.constant(other) is not None:
            continue
        raw = rw.raw(tensor)
        if raw is None:
            return None
        matrix = rw.new_constant(f"{tensor.name}_matrix", raw.reshape(raw.shape[-2:]))
        inputs = [matrix if i == index else t for i, t in enumerate(node.inputs)]
        new = Node("MatMul", node.name, {}, inputs, list(node.outputs))
        return rw.replace([node], [new], "its weight is one matrix")
    return None


def _absorb_padding(rw: Rewriter, node: Node) -> Rewrite | None:
    """Let a convolution with computed weights, or an average that counts padding, pad its input by zeros itself."""
    before = rw.producer(node.inputs[0])
    if before is None or not rw.is_a(before, "Pad") or rw.other_uses(node.inputs[0]):
        return None
    found = attributes.read_pad_parameters(rw, before)
    if found is None or found[1] not in ("constant", b"constant") or found[2] != 0 or min(found[0]) < 0:
        return None
    rank = len(found[0]) // 2
    around = [*found[0][2:rank], *found[0][rank + 2 :]]
    own = list(node.attrs.get("pads", [0] * len(around)))
    outside = any(found[0][a] or found[0][rank + a] for a in (0, 1))
    if outside or rank < 3 or node.attrs.get("auto_pad", "NOTSET") != "NOTSET" or len(own) != len(around):
        return None
    attrs = {**node.attrs, "pads": [a + b for a, b in zip(around, own, strict=True)]}
    if rw.is_a(node, "AveragePool"):
        counts = rw.opset >= 7 and (node.attrs.get("count_include_pad", 0) or not any(own))
        sizes = node.attrs["kernel_shape"] * 2  # onnxruntime refuses windows that see padding only
        if not counts or node.attrs.get("ceil_mode", 0) or any(d > 1 for d in node.attrs.get("dilations", ())):
            return None
        if any(p >= k for p, k in zip(attrs["pads"], sizes, strict=True)):
            return None
        attrs["count_include_pad"] = 1
    elif rw.constant(node.inputs[1]) is not None:
        return None  # a map, which other passes fold
    new = Node(node.op, node.name, attrs, [before.inputs[0], *node.inputs[1:]], list(node.outputs))
    return rw.replace([before, node], [new], f"{node.op} pads its input itself")


def _write_scalars(rw: Rewriter, node: Node) -> Rewrite | None:
    """Write the bounds of a Range that are vectors of one number as scalars.

    onnxruntime computes such a Range, but refuses to load it if it sees that the bound is a constant.
    """
    inputs = list(node.inputs)
    for index, tensor in enumerate(inputs):
        raw = rw.raw(tensor)
        if raw is not None and raw.shape == (1,):
            inputs[index] = rw.new_constant(f"{tensor.name}_scalar", raw.reshape(()))
    if inputs == node.inputs:
        return None
    new = Node("Range", node.name, dict(node.attrs), inputs, list(node.outputs))
    return rw.replace([node], [new], "its bounds are written as scalars")


def _write_value(rw: Rewriter, node: Node) -> Rewrite | None:
    """Write the number or list of numbers of a Constant as a tensor, which is what other rewrites read."""
    for name, dtype in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        if name in node.attrs:
            value = Constant(f"{node.outputs[0].name}_value", np.asarray(node.attrs[name], dtype))
            new = Node("Constant", node.name, {"value": value}, [], list(node.outputs))
            return rw.replace([node], [new], "its value is written as a tensor")
    return None


RULES: dict[str, Rule] = {
    "Add": _multiply_instead,
    "AveragePool": _absorb_padding,
    "Conv": _absorb_padding,
    "Cast": _join_casts,
    "Clip": _absorb_relu,
    "Concat": _drop_empty_parts,
    "Constant": _write_value,
    "MatMul": _flatten_weight,
    "Not": _negate_twice,
    "Range": _write_scalars,
    "Shape": _read_shape_earlier,
    "Size": _read_shape_earlier,
    "Sum": _multiply_instead,
    "Where": _swap_branches,
}
