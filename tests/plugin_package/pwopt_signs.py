"""Passes of a package of its own, as docs/own-rewrites.md says how to write them."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from pwopt.rewriting import Pass, Rewrite, Rewriter, Skip


class DropSign(Pass):
    """|−x| = |x|

    Exact, bit for bit: changing a sign rounds nothing.
    """

    name = "drop-sign"
    contract = 2

    def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | Skip | None:
        negation = rw.producer(node.inputs[0]) if rw.op(node) == "Abs" else None
        if negation is None or rw.op(negation) != "Neg":
            return None
        other_uses = rw.other_uses(node.inputs[0])
        if other_uses:
            return Skip(f"{other_uses}, so the sign is computed anyway")
        new = gs.Node("Abs", node.name, {}, [negation.inputs[0]], [node.outputs[0]])
        return rw.replace([negation, node], [new], "the sign has no effect on an absolute value")


class Square(Pass):
    """x² = x·x

    A library's power of 2 rounds as the product does; whether the product is faster is measured.
    """

    name = "square"
    policy = "measured"
    contract = 2

    def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | Skip | None:
        exponent = rw.raw(node.inputs[1]) if rw.op(node) == "Pow" else None
        if exponent is None or exponent.size != 1 or not np.all(exponent == 2):
            return None
        if not self.eager:
            return Skip("only measured or asked for: a product instead of a power")
        new = gs.Node("Mul", node.name, {}, [node.inputs[0], node.inputs[0]], [node.outputs[0]])
        return rw.replace([node], [new], "a product instead of a power").with_signature("squares")
