"""Convolutions of positions that were moved into channels run on the positions themselves."""

from __future__ import annotations

import math

import onnx_graphsurgeon as gs

from pwopt.algebra.geometry import Refusal
from pwopt.algebra.linear import LinearMap
from pwopt.algebra.multirate import through_subsampling
from pwopt.maps import emit
from pwopt.maps.cost import ELEMENT, macs
from pwopt.maps.positions import stencil
from pwopt.maps.resampling import subsampling
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip


class Focus(Pass):
    """w ∗ concat(x[r·q + o₁], x[r·q + o₂], …) = w′ ∗ x of stride r: tap k of block j is tap r·d·k + oⱼ of w′.

    Slices, a Concat and a 3×3 convolution are one 6×6 convolution of stride 2, of as many multiply-adds; so are
    SpaceToDepth and pixel unshuffling before a convolution, and patch merging is a 2×2 convolution of stride 2. Zeros
    outside of a block are zeros outside of x (`algebra.multirate`). The Focus of YOLOv5 (Jocher, 2020, whose release 6
    made this replacement by hand) and YOLOX (Ge et al., 2021). Decided by multiply-adds and elements moved.
    """

    name = "focus"
    policy = "if cheaper"

    def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | Skip | None:
        reading = stencil(rw, node)
        found = None if reading is None else subsampling(rw, rw.producer(reading.source))
        if reading is None or found is None or len(found.offsets) < 2 or reading.geometry.groups > 1:
            return None
        crowd = rw.crowd(reading.source)
        if crowd or rw.shared(reading.weight_input):
            return Skip(crowd or f"the weight {reading.weight_input.name!r} is shared")
        linear = reading.load()
        if isinstance(linear, Refusal):
            return Skip(linear.reason)
        ordered = LinearMap.of(linear.geometry, linear.weight[:, list(found.order)], linear.bias)
        whole = through_subsampling(ordered, found.steps, found.offsets)
        if isinstance(whole, Refusal):
            return Skip(whole.reason)
        size, gathered = rw.size_of(reading.output), rw.size_of(reading.source)
        before = macs(rw, node)
        if size is None or gathered is None or before is None:
            return None
        after = whole.geometry.weights * math.prod(size) / max(1, size[1])
        if after - before >= 4 * ELEMENT * math.prod(gathered):
            return Skip(f"{len(found.offsets)} blocks of {found.steps} positions would be a sparse kernel")
        written = emit.write(rw, whole, reading, found.source, reading.output, 1)
        if isinstance(written, Refusal):
            return Skip(written.reason)
        kernel, steps = ("×".join(map(str, n)) for n in (whole.geometry.kernel, whole.geometry.strides))
        reason = f"{len(found.offsets)} blocks of positions and a convolution are one {kernel} of stride {steps}"
        return rw.replace([*found.nodes, node], written.nodes, reason, written.residual)
