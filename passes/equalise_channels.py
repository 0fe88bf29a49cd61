"""Cross-layer equalisation: positive scales move between two maps, so that the ranges of their channels agree."""

from __future__ import annotations

import numpy as np

from pwopt.algebra import Array
from pwopt.algebra.linear import LinearMap
from pwopt.graph.ir import Node, Tensor
from pwopt.maps import emit, forms
from pwopt.maps.forms import Reading
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite

#: Operators with f(s·x) = s·f(x) for every positive scale s per channel.
HOMOGENEOUS = ("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity")
#: The longest sequence of such operators between two maps.
MAX_BETWEEN = 4


class EqualiseChannels(Pass):
    """W₂ f(W₁x + b₁) = (W₂S) f(S⁻¹W₁x + S⁻¹b₁) with S = diag(√(r₁/r₂)), for f(Sx) = S f(x)

    * r₁ and r₂ are the largest weights of each channel in the map before and in the map after. The scales are rounded
      to powers of two, so nothing is rounded.
    * Between the maps stand at most four of Relu, LeakyRelu, poolings and Identity, and nothing else reads their
      results.
    * No weight is shared.

    Quantisers lose accuracy where the channels of one tensor have different ranges. The answers in floating point do
    not change, and nothing becomes faster, so this pass runs only by name. Nagel et al., "Data-Free Quantization
    Through Weight Equalization and Bias Correction" (ICCV 2019).
    """

    name = "equalise-channels"
    pays_on = frozenset()

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | None:
        second = _read_map(rw, node) if self.eager else None
        if second is None:
            return None
        between: list[Node] = []
        tensor = second.source
        while (above := rw.producer(tensor)) is not None and not rw.other_uses(tensor):
            first = _read_map(rw, above)
            if first is not None:
                same = first.axis == second.axis and (first.axis == 1 or not between)
                return self._equalise(rw, first, between, second) if same and first.output is tensor else None
            if not rw.is_a(above, *HOMOGENEOUS) or len(above.outputs) != 1 or len(between) == MAX_BETWEEN:
                return None
            between.insert(0, above)
            tensor = above.inputs[0]
        return None

    def _equalise(self, rw: Rewriter, first: Reading, between: list[Node], second: Reading) -> Rewrite | None:
        before, after = first.load(), second.load()
        scale = _find_scales(before, after)
        if scale is None:
            return None
        before = LinearMap.diagonal(1 / scale, rank=before.geometry.rank) @ before
        after = after @ LinearMap.diagonal(scale, rank=after.geometry.rank)
        tensors = [first.output, *(n.outputs[0] for n in between)]
        middle: list[Tensor] = [rw.new_variable(f"{t.name}_equalised", t) for t in tensors]
        written = emit.write(rw, before, first, first.source, middle[0], first.axis)
        copies = [Node(n.op, n.name, dict(n.attrs), [middle[i]], [middle[i + 1]]) for i, n in enumerate(between)]
        last = emit.write(rw, after, second, middle[-1], second.output, second.axis)
        count = int(np.count_nonzero(scale != 1))
        reason = f"{count} of {scale.size} channels get a range that suits both maps"
        old = [*first.nodes, *between, *second.nodes]
        return rw.replace(old, [*written.nodes, *copies, *last.nodes], reason, max(written.residual, last.residual))


def _read_map(rw: Rewriter, node: Node | None) -> Reading | None:
    found = forms.weighted(rw, node)
    if found is None or found.turned or found.axis is None or found.geometry.transposed:
        return None
    return None if rw.is_shared(found.weight_input) else found


def _find_scales(before: LinearMap, after: LinearMap) -> Array | None:
    """√(r₁/r₂) of each channel as a power of two; None if all are 1."""
    g = after.geometry
    if before.geometry.out_channels != g.in_channels:
        return None
    first = np.abs(before.weight).reshape(g.in_channels, -1).max(1)
    grouped = np.abs(after.weight).reshape(g.groups, g.out_channels // g.groups, g.in_channels // g.groups, -1)
    second = grouped.max((1, 3)).reshape(-1)
    both = (first > 0) & (second > 0)
    ratio = np.divide(first, second, out=np.ones_like(first), where=both)
    scale = np.exp2(np.round(np.log2(ratio) / 2))
    return None if np.all(scale == 1) else scale
