"""Convolutions of positions that were moved into channels run on the positions themselves."""

from __future__ import annotations

import math

from pwopt.algebra.geometry import Refusal
from pwopt.algebra.multirate import through_subsampling
from pwopt.graph.ir import Node
from pwopt.maps import emit
from pwopt.maps.cost import ELEMENT, positions, price
from pwopt.maps.positions import stencil
from pwopt.maps.resampling import subsampling
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.wording import counted


class Focus(Pass):
    """w ∗ concat(x[r·q + o₁], x[r·q + o₂], …) = w′ ∗ x of stride r: tap k of block j is tap r·d·k + oⱼ of w′.

    Slices, a Concat and a 3×3 convolution are one 6×6 convolution of stride 2, of as many multiply-adds; so are
    SpaceToDepth and pixel unshuffling before a convolution, and patch merging is a 2×2 convolution of stride 2. Zeros
    outside of a block are zeros outside of x (`algebra.multirate`). The Focus of YOLOv5 (Jocher, 2020, whose release 6
    made this replacement by hand) and YOLOX (Ge et al., 2021). Decided by multiply-adds and elements moved.
    """

    name = "focus"
    policy = "if cheaper"

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        reading = stencil(rw, node)
        if reading is None:
            return None
        found = subsampling(rw, reading)
        if found is None:
            return None
        crowd = _crowd(rw, [*found.nodes, node])
        if crowd or rw.shared(reading.weight_input):
            return Skip(crowd or f"the weight {reading.weight_input.name!r} is shared")
        linear = reading.load()
        if isinstance(linear, Refusal):
            return Skip(linear.reason)
        whole = through_subsampling(linear, found.steps, found.offsets, found.order)
        if isinstance(whole, Refusal):
            return Skip(whole.reason)
        places, gathered = positions(rw, reading), rw.size_of(reading.source)
        if places is None or gathered is None:
            return None
        blocks, more = len(found.offsets), price(whole.geometry, places) - price(reading.geometry, places)
        if more >= 4 * ELEMENT * math.prod(gathered):
            return Skip(f"{counted(blocks, 'block')} of {found.steps} positions would be a sparse kernel")
        written = emit.write(rw, whole, reading, found.source, reading.output, 1)
        if isinstance(written, Refusal):
            return Skip(written.reason)
        kernel, steps = ("×".join(map(str, n)) for n in (whole.geometry.kernel, whole.geometry.strides))
        reason = f"{counted(blocks, 'block')} of positions and a convolution are one {kernel} of stride {steps}"
        return rw.replace([*found.nodes, node], written.nodes, reason, written.residual)


def _crowd(rw: Rewriter, nodes: list[Node]) -> str:
    """Why others need what these operators make before the last of them, as a clause, else ""."""
    inside = set(nodes)
    made = [t for n in nodes[:-1] for t in n.outputs]
    needed = [t for t in made if rw.pinned(t) or any(r not in inside for r in rw.readers(t))]
    return rw.crowd(needed[0]) if needed else ""
