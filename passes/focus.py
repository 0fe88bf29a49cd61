"""Space-to-depth folding: a convolution after a space-to-depth rearrangement becomes one strided convolution."""

from __future__ import annotations

import math

from pwopt.algebra.multirate import through_subsampling
from pwopt.graph.ir import Node
from pwopt.graph.reasons import Reason
from pwopt.maps import emit
from pwopt.maps.cost import ELEMENT, positions, price
from pwopt.maps.positions import stencil
from pwopt.maps.resampling import subsampling
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.wording import format_count


class Focus(Pass):
    """w ∗ concat(x[r·q + o₁], x[r·q + o₂], …) = w′ ∗ x with stride r: tap k of block j is tap r·d·k + oⱼ of w′

    * Strided Slices and a Concat, SpaceToDepth, or Reshape and Transpose move blocks of positions into channels. Only
      the convolution reads the result, and its weight is not shared.
    * Zero padding of the blocks must be zero padding of x (`algebra.multirate` has the proof).
    * The cost decreases, in multiply-adds and moved elements.

    Slices, a Concat and a 3×3 convolution become one 6×6 convolution of stride 2, with as many multiply-adds. Patch
    merging becomes a 2×2 convolution of stride 2. The Focus layer of YOLOv5 (Jocher, 2020; release 6 made the same
    replacement by hand) and YOLOX (Ge et al., 2021) has this form.
    """

    name = "focus"
    operators = frozenset({"Conv"})
    policy = "if cheaper"

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        reading = stencil(rw, node)
        if reading is None:
            return None
        found = subsampling(rw, reading)
        if found is None:
            return None
        other_uses = _find_other_uses(rw, [*found.nodes, node])
        if other_uses or rw.is_shared(reading.weight_input):
            return Skip(other_uses or Reason("the weight {!r} is shared", reading.weight_input.name))
        strided = through_subsampling(reading.load(), found.steps, found.offsets, found.order)
        places, gathered = positions(rw, reading), rw.size_of(reading.source)
        if places is None or gathered is None:
            return None
        blocks, more = len(found.offsets), price(strided.geometry, places) - price(reading.geometry, places)
        if more >= 4 * ELEMENT * math.prod(gathered):
            count = format_count(blocks, "block")
            return Skip(f"{count} of {found.steps} positions would become a sparse kernel, which costs more")
        written = emit.write(rw, strided, reading, found.source, reading.output, 1)
        kernel, steps = ("×".join(map(str, n)) for n in (strided.geometry.kernel, strided.geometry.strides))
        reason = f"{format_count(blocks, 'block')} of positions and a convolution become one {kernel} of stride {steps}"
        return rw.replace([*found.nodes, node], written.nodes, reason, written.residual)


def _find_other_uses(rw: Rewriter, nodes: list[Node]) -> str:
    """What else uses a result of these operators, except of the last one, as a clause; "" if nothing does."""
    inside = set(nodes)
    results = [t for n in nodes[:-1] for t in n.outputs]
    needed = [t for t in results if rw.must_keep(t) or any(r not in inside for r in rw.readers(t))]
    return rw.other_uses(needed[0]) if needed else ""
