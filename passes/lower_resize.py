"""Lowering of interpolation to matrix products."""

from __future__ import annotations

import numpy as np

from pwopt.graph.ir import Node
from pwopt.maps import emit
from pwopt.maps.interpolations import read_interpolated
from pwopt.rewriting.driver import Rewriter
from pwopt.rewriting.lowering import Form, Lowering
from pwopt.rewriting.records import Skip

#: Nanoseconds per output element of onnxruntime's kernel for cubic interpolation, and per multiply-add of its products
#: (AVX-512 Xeon, 1 thread).
CUBIC_COST, PRODUCT_COST = 63.0, 0.02


class LowerResize(Lowering):
    """resize(X) = A·X·Bᵀ for linear and cubic interpolation of images

    * The sizes are fixed, the type is float32, and only the last two of four axes change.
    * No region of interest and no antialiasing.
    * The inputs are finite: NaN and infinities spread over the image of their channel, because they meet weights of
      zero.

    A and B hold the weights of each output along one axis (`pwopt.algebra.interpolation`), rounded once. The smaller
    product comes first. onnxruntime's kernel rounds positions to float32, so the products are nearer to the exact
    result. Without measuring, the row applies to cubic interpolation only, for which the kernel is slow.
    """

    name = "lower-resize"
    policy = "measured"
    pays_on = frozenset({"cpu"})
    operators = frozenset({"Resize"})
    since = 11
    exactness = "rounding, finite inputs"
    figure = "1.04 and 1.05 on segmentation heads; cubic alone 24 to 36 (AVX-512 Xeon)"

    def lower(self, node: Node, rw: Rewriter) -> Form | Skip | None:
        found = read_interpolated(rw, node)
        if found is None or str(rw.dtype(node.inputs[0])) != "float32":
            return None
        (high, higher), (wide, wider) = ((a.count, a.size) for a in (found.rows, found.columns))
        exact = found.matrices()
        rows, columns = (m.astype(np.float32) for m in exact)
        first = high * wide * wider + high * higher * wider  # the columns first
        second = higher * high * wide + higher * wide * wider
        new = _write(rw, node, rows, columns, first <= second)
        mode = found.kind.mode
        pays = mode == "cubic" and PRODUCT_COST * min(first, second) < CUBIC_COST * higher * wider / 2
        size = "×".join(map(str, rw.size_of(node.inputs[0]) or ("?",)))
        detail = f"{mode} {high}×{wide} to {higher}×{wider}: {size}"
        residual = max(map(emit.relative_rounding, (rows, columns), exact))
        return Form((node,), new, f"{found.what} as two matrix products", detail, pays, residual)


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
