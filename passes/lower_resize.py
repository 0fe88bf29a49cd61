"""Lowering of interpolation to matrix products."""

from __future__ import annotations

import math

import numpy as np

from pwopt.algebra.interpolation import TRANSFORMATIONS, Interpolation
from pwopt.graph.ir import Node
from pwopt.maps import emit
from pwopt.rewriting.driver import Rewriter
from pwopt.rewriting.lowering import Form, Lowering
from pwopt.rewriting.records import Skip

#: Nanoseconds per output element of onnxruntime's kernel for cubic interpolation, and per multiply-add of its products
#: (AVX-512 Xeon, 1 thread).
CUBIC_COST, PRODUCT_COST = 63.0, 0.02
#: The largest number of positions of an axis.
MAX_POSITIONS = 4096


class LowerResize(Lowering):
    """resize(X) = A·X·Bᵀ for linear and cubic interpolation of images

    * The sizes are fixed, the type is float32, and only the last two of four axes change.
    * No region of interest and no antialiasing.
    * The inputs are finite: NaN and infinities spread over the image of their channel, because they meet weights of
      zero.

    A and B hold the weights of each output along one axis (`pwopt.algebra.interpolation`). The smaller product comes
    first. Without measuring, the row applies to cubic interpolation only, for which onnxruntime's kernel is slow.
    """

    name = "lower-resize"
    policy = "measured"
    pays_on = frozenset({"cpu"})
    operators = frozenset({"Resize"})
    since = 11
    exactness = "rounding, finite inputs"
    figure = "1.04 and 1.05 on segmentation heads; cubic alone 24 to 36 (AVX-512 Xeon)"

    def lower(self, node: Node, rw: Rewriter) -> Form | Skip | None:
        kind, x = _read_interpolation(node), node.inputs[0]
        axes = None if kind is None or str(rw.dtype(x)) != "float32" else _read_axes(rw, node)
        if kind is None or axes is None or not any(size != count for count, size, _ in axes):
            return None
        (high, higher, _), (wide, wider, _) = axes
        exact = [kind.matrix(*axis) for axis in axes]
        rows, columns = (m.astype(np.float32) for m in exact)
        first = high * wide * wider + high * higher * wider  # the columns first
        second = higher * high * wide + higher * wide * wider
        new = _write(rw, node, rows, columns, first <= second)
        pays = kind.mode == "cubic" and PRODUCT_COST * min(first, second) < CUBIC_COST * higher * wider / 2
        size = "×".join(map(str, rw.size_of(x) or ("?",)))
        detail = f"{kind.mode} {high}×{wide} to {higher}×{wider}: {size}"
        residual = max(map(emit.relative_rounding, (rows, columns), exact))
        reason = f"{kind.mode} interpolation of {high}×{wide} to {higher}×{wider} as two matrix products"
        return Form((node,), new, reason, detail, pays, residual)


def _write(rw: Rewriter, node: Node, rows: np.ndarray, columns: np.ndarray, columns_first: bool) -> tuple[Node, ...]:
    """A·(X·Bᵀ) or (A·X)·Bᵀ."""
    x, output = node.inputs[0], node.outputs[0]
    left = rw.new_constant(f"{output.name}_rows", rows)
    right = rw.new_constant(f"{output.name}_columns", np.ascontiguousarray(columns.T))
    width, height = (len(columns), None) if columns_first else (None, len(rows))
    middle = rw.new_variable(f"{output.name}_half", x, lambda s: (*s[:2], height or s[2], width or s[3]))
    first, second = ([x, right], [left, middle]) if columns_first else ([left, x], [middle, right])
    return (
        Node("MatMul", rw.node_name(node.name, "_half"), {}, first, [middle]),
        Node("MatMul", node.name, {}, second, [output]),
    )


def _read_interpolation(node: Node) -> Interpolation | None:
    """The interpolation of a Resize, if matrices without a region of interest describe it."""
    attrs = node.attrs
    mode = attrs.get("mode", "nearest")
    transformation = attrs.get("coordinate_transformation_mode", "half_pixel")
    policy = attrs.get("keep_aspect_ratio_policy", "stretch")
    if transformation not in TRANSFORMATIONS or attrs.get("antialias", 0) or policy != "stretch":
        return None
    if mode == "linear" and not attrs.get("exclude_outside", 0):
        return Interpolation("linear", transformation)
    if mode == "cubic":
        a, outside = attrs.get("cubic_coeff_a", -0.75), bool(attrs.get("exclude_outside", 0))
        return Interpolation("cubic", transformation, float(a), outside)
    return None


def _read_axes(rw: Rewriter, node: Node) -> list[tuple[int, int, float]] | None:
    """(positions before, positions after, factor) of the last two of four axes; None if they are not fixed.

    Also None if the other axes change.
    """
    before = rw.shape(node.inputs[0])
    if before is None or len(before) != 4:
        return None
    given = node.attrs.get("axes")
    order = list(range(4)) if given is None else [int(a) % 4 for a in given]
    scales, sizes = rw.optional_input(node, 2), rw.optional_input(node, 3)
    found: dict[int, tuple[int, float]] = {}
    if scales is not None and rw.elements(scales) != 0:
        values = rw.value(scales)
        if values is None or len(values) != len(order):
            return None
        for axis, scale in zip(order, values, strict=True):
            count = before[axis]
            if axis >= 2 and isinstance(count, int):
                found[axis] = math.floor(np.float32(count) * np.float32(scale)), float(scale)
            elif scale != 1:
                return None
    else:
        wanted = None if sizes is None else rw.integers(sizes)
        if wanted is None or len(wanted) != len(order):
            return None
        for axis, size in zip(order, wanted, strict=True):
            count = before[axis]
            if axis >= 2 and isinstance(count, int) and count:
                found[axis] = size, float(np.float32(size / count))
            elif size != count:
                return None
    spans = [(d, *found.get(a, (d, 1.0))) for a, d in enumerate(before) if a >= 2 and isinstance(d, int)]
    usable = len(spans) == 2 and all(0 < n <= MAX_POSITIONS for span in spans for n in span[:2])
    return spans if usable else None
