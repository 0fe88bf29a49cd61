"""Bias folding through zero padding: the padded convolution reads the bias as the weight of a channel of ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pwopt.algebra.geometry import Geometry, Refusal, compose_geometry, homogeneous_geometry
from pwopt.graph.ir import Node
from pwopt.graph.shapes import set_channels
from pwopt.maps import emit, forms
from pwopt.maps.cost import ELEMENT, price
from pwopt.maps.forms import Reading
from pwopt.maps.paths import relative_places
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.wording import format_increase

#: The first opset in which the widths of a Pad are an input.
PAD_TAKES_WIDTHS = 11


class FoldBorders(Pass):
    """W₂ ∗ pad(W₁x + b₁) = (W₂(W₁ b₁)) ∗ pad(x; 1)

    * A 1×1 map with a bias is followed by a convolution with zero padding, and only the bias keeps them from being one
      map. Nothing else reads the tensor between them, and no weight is shared.
    * The number of multiply-adds decreases. Without measuring, the number of moved elements must decrease as well.

    Zero padding after a map with a bias is not the same as zero padding before it: at the border, the bias is missing
    from the sums of the padded convolution. Therefore the bias becomes the weight of one more channel. That channel is
    1 wherever x is, and the padding continues it with 0 like all others (`algebra.geometry.homogeneous_geometry`).

    Measured between two 3×3 convolutions (Intel Xeon, 1 thread, medians): 64→128→64 at 48² 1.07×, 16→64→16 at 96²
    1.28×, but 16→32→16 at 64² 0.95× and 64→64→64 at 48² 0.89×, because the Pad leaves the blocked layout.

    Super-resolution blocks are trained as a 1×1 and a padded 3×3 convolution, and exported without their authors'
    fusing step: Zhang et al., "Edge-oriented Convolution Block" (ECBSR, 2021), Wang et al., "RepSR" (2022).
    """

    name = "fold-borders"
    policy = "measured"

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        reading = forms.weighted(rw, node)
        before = forms.weighted(rw, rw.producer(reading.source)) if reading is not None else None
        if reading is None or before is None or before.output is not reading.source or reading.axis != before.axis:
            return None
        joined = _join_geometries(reading.geometry, before.geometry)
        if joined is None or rw.opset < PAD_TAKES_WIDTHS or rw.other_uses(reading.source):
            return None
        shared = next((r.weight_input.name for r in (before, reading) if rw.is_shared(r.weight_input)), None)
        if shared is not None:
            return Skip(f"the weight {shared!r} is shared")
        g = before.geometry
        widths = f"{g.in_channels}→{g.out_channels}→{reading.geometry.out_channels}"
        places = relative_places(rw, [before, reading])
        separate = sum(price(r.geometry, p) for r, p in zip((before, reading), places, strict=True))
        together = price(joined, places[0] if joined.transposed else places[1])
        if together >= separate:
            return Skip(f"folding {widths} with a channel of ones would cost {format_increase(separate, together)}")
        over = places[0] * float(np.prod(g.strides, initial=1))
        moved = ELEMENT * 2 * (over * joined.in_channels - places[0] * g.out_channels)
        if not self.eager and together + moved >= separate:
            return Skip(f"{widths} could be one map with an additional channel of ones; only measuring can tell")
        return self._fold(rw, before, reading, widths)

    @staticmethod
    def _fold(rw: Rewriter, before: Reading, reading: Reading, widths: str) -> Rewrite | Skip:
        composed = reading.load() @ before.load().homogeneous()
        source, dtype = before.source, rw.dtype(before.source)
        rank = rw.rank(source)
        if rank is None or dtype is None or str(dtype) not in emit.NORMALISABLE:
            return Skip("the rank or the type of its input is not known")
        ones = rw.new_variable(f"{source.name}_ones", source, set_channels(1, composed.geometry.in_channels))
        written = rw.attempt(emit.write, rw, composed, reading, ones, reading.output, reading.axis)
        if isinstance(written, Refusal):
            return Skip(f"{widths} is cheaper as one map, but {written.reason}")
        ends = np.zeros(2 * rank, np.int64)
        ends[rank + 1] = 1
        inputs = [
            source,
            rw.new_constant(f"{ones.name}_ends", ends),
            rw.new_constant(f"{ones.name}_one", np.ones((), dtype)),
        ]
        pad = Node("Pad", rw.node_name(before.nodes[0].name, "_ones"), {}, inputs, [ones])
        reason = f"{widths} is cheaper as one map, with the bias as a channel of ones"
        done = rw.replace([*before.nodes, *reading.nodes], [pad, *written.nodes], reason, written.residual)
        return done.with_signature(
            f"bias before padding: {forms.describe_map(rw, replace(reading, source=source), widths)}"
        )


def _join_geometries(second: Geometry, first: Geometry) -> Geometry | None:
    """Both maps as one map of (x, 1), if only the bias keeps them from being one map of x; else None."""
    if isinstance(compose_geometry(second, first), Geometry) or not first.biased:
        return None
    wide = homogeneous_geometry(first)
    joined = wide if isinstance(wide, Refusal) else compose_geometry(second, wide)
    return joined if isinstance(joined, Geometry) else None
