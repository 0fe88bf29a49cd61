"""Gate factoring (distributive law): a residual connection around a gate becomes part of the gate."""

from __future__ import annotations

import numpy as np

from pwopt.graph.ir import Node, Tensor
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite


class FactorGates(Pass):
    """x + x·g = x·(1 + g)

    * The gate g has size 1 along some axis of x and the size of x along all others.
    * Nothing else reads the product.

    The addition then runs over the few numbers of the gate instead of the whole feature map. Residual
    squeeze-and-excitation has this form (PP-OCR's RSE-FPN; Hu et al., 2018, for the gate).
    """

    name = "factor-gates"
    operators = frozenset({"Add"})

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | None:
        if rw.op(node) != "Add" or rw.opset < 7:  # older sums do not broadcast
            return None
        for x, product in (node.inputs, node.inputs[::-1]):
            mul = rw.producer(product)
            if not rw.is_a(mul, "Mul") or rw.other_uses(product):
                continue
            gate = next((g for f, g in (mul.inputs, list(mul.inputs)[::-1]) if f is x and g is not x), None)
            if gate is None or not _is_smaller(rw, gate, x):
                continue
            dtype = rw.dtype(x)
            if dtype is None:
                continue
            one = rw.new_constant(f"{gate.name}_one", np.ones((), dtype))
            shifted = rw.new_variable(f"{gate.name}_plus_one", gate)
            new = [
                Node("Add", rw.node_name(mul.name, "_one"), {}, [gate, one], [shifted]),
                Node("Mul", node.name, {}, [x, shifted], [node.outputs[0]]),
            ]
            return rw.replace([mul, node], new, "adding 1 to the gate replaces adding the whole feature map")
        return None


def _is_smaller(rw: Rewriter, gate: Tensor, x: Tensor) -> bool:
    """Whether the gate is broadcast over an axis of x, and x over no axis of the gate."""
    a, b = rw.shape(gate), rw.shape(x)
    if a is None or b is None or len(a) != len(b):
        return False
    axes = list(zip(a, b, strict=True))
    return any(p == 1 and q != 1 for p, q in axes) and not any(p != 1 and q == 1 for p, q in axes)
