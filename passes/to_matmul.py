"""Lowering convolutions to matrix products: pointwise convolutions run over flattened positions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pwopt.graph.ir import Node
from pwopt.graph.reasons import Reason
from pwopt.maps import emit
from pwopt.maps.positions import stencil
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip


class ToMatMul(Pass):
    """conv₁ₓ₁(x) = reshape(W · reshape(x)): a pointwise convolution is a product of (out, in) and (in, positions)

    * The convolution is dense and 2-D, the size of its input is known, and the weight is not shared.
    * There are several positions. `lower-rank` handles single ones.

    This makes most models slower on onnxruntime's CPU provider, because the product leaves its blocked layout. On other
    providers, or with odd sizes, it may pay.
    """

    name = "to-matmul"
    operators = frozenset({"Conv"})
    policy = "measured"

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        reading = stencil(rw, node)
        g = None if reading is None else reading.geometry
        if reading is None or g is None or not g.pointwise or g.groups > 1 or len(g.kernel) != 2:
            return None
        height, width = rw.dim(reading.source, 2), rw.dim(reading.source, 3)
        if not isinstance(height, int) or not isinstance(width, int) or height * width < 2 or not self.eager:
            return None
        if rw.is_shared(reading.weight_input):
            return Skip(Reason("the weight {!r} is shared", reading.weight_input.name))
        linear = reading.load()
        source, output, places = reading.source, reading.output, height * width
        flat = rw.new_variable(f"{output.name}_flat", source, lambda s: (*s[:2], places))
        product = rw.new_variable(f"{output.name}_mapped", output, lambda s: (*s[:2], places))
        like = replace(reading, kind="left-matmul")
        written = emit.write(rw, linear.at_rank(0), like, flat, product, 1, inherit=False)
        shapes = [
            rw.new_constant(f"{output.name}_{name}", np.array(shape, np.int64))
            for name, shape in (("positions", (0, g.in_channels, places)), ("map", (0, g.out_channels, height, width)))
        ]
        new = [
            Node("Reshape", rw.node_name(node.name, "_flat"), {}, [source, shapes[0]], [flat]),
            *written.nodes,
            Node("Reshape", rw.node_name(node.name, "_map"), {}, [product, shapes[1]], [output]),
        ]
        done = rw.replace([node], new, f"{reading.channels} runs as a matrix product", written.residual)
        return done.with_signature(f"products at {height}×{width}: {reading.channels}")
