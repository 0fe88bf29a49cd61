"""A residual around a gate becomes part of the gate."""

from __future__ import annotations

import numpy as np

from pwopt.graph.ir import Node, Tensor
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite


class FactorGates(Pass):
    """x + x·g = x·(1 + g)

    For a gate g that is broadcast over space, the sum over the whole feature map becomes one over the gate's
    few numbers. Residual squeeze-and-excitation writes it so (PP-OCR's RSE-FPN; Hu et al., 2018, for the gate).
    """

    name = "factor-gates"

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | None:
        if rw.op(node) != "Add" or rw.opset < 7:  # broadcasting since opset 7
            return None
        for x, product in (node.inputs, node.inputs[::-1]):
            mul = rw.producer(product)
            if not rw.is_a(mul, "Mul") or rw.crowd(product):
                continue
            gate = next((g for f, g in (mul.inputs, list(mul.inputs)[::-1]) if f is x and g is not x), None)
            if gate is None or not self._smaller(rw, gate, x):
                continue
            dtype = rw.dtype(x)
            if dtype is None:
                continue
            one = rw.new_constant(f"{gate.name}_one", np.ones((), dtype))
            wider = rw.new_variable(f"{gate.name}_plus_one", gate)
            new = [
                Node("Add", rw.node_name(mul.name, "_one"), {}, [gate, one], [wider]),
                Node("Mul", node.name, {}, [x, wider], [node.outputs[0]]),
            ]
            return rw.replace([mul, node], new, "adding 1 to the gate replaces adding the whole feature map")
        return None

    @staticmethod
    def _smaller(rw: Rewriter, gate: Tensor, x: Tensor) -> bool:
        """Whether the gate is broadcast over an axis of x, and x over none of the gate (the sum holds either way)."""
        a, b = rw.shape(gate), rw.shape(x)
        if a is None or b is None or len(a) != len(b):
            return False
        axes = list(zip(a, b, strict=True))
        return any(p == 1 and q != 1 for p, q in axes) and not any(p != 1 and q == 1 for p, q in axes)
