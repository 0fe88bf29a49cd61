"""Cross-layer equalisation: positive scales move between two maps, so that the ranges of their channels agree."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pwopt.algebra import Array
from pwopt.algebra.geometry import Refusal
from pwopt.algebra.linear import LinearMap
from pwopt.graph.ir import Node, Tensor
from pwopt.maps import commute, emit, forms
from pwopt.maps.commute import Affine
from pwopt.maps.forms import Reading
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite

#: The most operators between a map and the maps that take its scales over.
MAX_BETWEEN = 32
#: The step between the scales that identify channels: small, so that no channel seems to overflow.
STEP = 2.0**-20


@dataclass(frozen=True)
class Reach:
    """Where the scales of a tensor go.

    Attributes
    ----------
    scaled : dict of Tensor to Affine
        The scale of each tensor on the way, the first one included.
    ends : tuple of (Reading, Affine)
        The maps that read one of them, with the scale of what they read.
    """

    scaled: dict[Tensor, Affine]
    ends: tuple[tuple[Reading, Affine], ...]


class EqualiseChannels(Pass):
    """W₂ f(W₁x + b₁) = (W₂S) f(S⁻¹W₁x + S⁻¹b₁) with S = diag(√(r₁/r₂)), for f(Sx) = S f(x)

    * r₁ and r₂ are the largest weights of each channel in the map before and in the maps after. The scales are rounded
      to powers of two, so nothing is rounded.
    * Between the maps stand operators past which positive scales can move (`maps.commute`): Relu, LeakyRelu, PRelu,
      poolings, Concat, Split, moves of numbers, resampling, and products with other tensors, such as gates. Every path
      from the map before ends at a map after.
    * No weight is shared.

    Quantisers lose accuracy where the channels of one tensor have different ranges. The answers in floating point do
    not change, and nothing becomes faster, so this pass runs only by name. Nagel et al., "Data-Free Quantization
    Through Weight Equalization and Bias Correction" (ICCV 2019).
    """

    name = "equalise-channels"
    pays_on = frozenset()

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | None:
        first = _read_map(rw, node) if self.eager else None
        if first is None or first.axis is None:
            return None
        count = first.geometry.out_channels
        probe = Affine(LinearMap.diagonal(1 + STEP * np.arange(1, count + 1)), first.axis)
        reach = _follow(rw, first.output, probe)
        if reach is None:
            return None
        before = first.load()
        scale = _find_scales(before, reach)
        if scale is None:
            return None
        reach = _follow(rw, first.output, Affine(LinearMap.diagonal(scale), first.axis))
        return None if reach is None else _equalise(rw, first, before, scale, reach)


def _equalise(rw: Rewriter, first: Reading, before: LinearMap, scale: Array, reach: Reach) -> Rewrite:
    """Divide the results of a map by `scale`, and multiply the inputs of the maps that read them."""
    edits = [(first, LinearMap.diagonal(1 / scale, rank=before.geometry.rank) @ before)]
    for reading, affine in reach.ends:
        after = reading.load()
        factor = affine.map.broadcast(after.geometry.in_channels).scale
        edits.append((reading, after @ LinearMap.diagonal(factor, rank=after.geometry.rank)))
    for reading, linear in edits:
        emit.check(rw, linear, reading, reading.source, reading.axis)
    count = int(np.count_nonzero(scale != 1))
    reason = f"{count} of {scale.size} channels get a range that suits the maps on both sides"
    records = []
    for reading, linear in edits:
        written = emit.write(rw, linear, reading, reading.source, reading.output, reading.axis)
        records.append(rw.replace(reading.nodes, written.nodes, "", written.residual))
    renamed = {str(t.name): rw.rename(t, "_equalised") for t in reach.scaled}
    return Rewrite.of(reason, records, renamed)


def _read_map(rw: Rewriter, node: Node | None) -> Reading | None:
    found = forms.weighted(rw, node)
    if found is None or found.turned or found.axis is None or found.geometry.transposed:
        return None
    return None if rw.is_shared(found.weight_input) else found


def _follow(rw: Rewriter, tensor: Tensor, affine: Affine) -> Reach | None:
    """Move a scale from a tensor downwards until maps take it over; None if a path has no such map."""
    scaled, ends = {tensor: affine}, []
    if rw.must_keep(tensor):
        return None
    pending = [(rw.position(n), n) for n in set(rw.readers(tensor))]
    heapq.heapify(pending)
    met: set[Node] = set()
    while pending:
        node = heapq.heappop(pending)[1]
        if node in met:
            continue
        met.add(node)
        reading = _read_map(rw, node)
        if reading is not None and reading.source in scaled and sum(t in scaled for t in node.inputs) == 1:
            affine = scaled[reading.source]
            if affine.axis != reading.axis:
                return None
            ends.append((reading, affine))
            continue
        for output, moved in _sink(rw, node, scaled):
            if rw.must_keep(output):
                return None
            scaled[output] = moved
            for reader in rw.readers(output):
                heapq.heappush(pending, (rw.position(reader), reader))
        if not any(t in scaled for t in node.outputs) or len(met) > MAX_BETWEEN:
            return None
    return Reach(scaled, tuple(ends)) if ends else None


def _sink(rw: Rewriter, node: Node, scaled: dict[Tensor, Affine]) -> Iterator[tuple[Tensor, Affine]]:
    """Move the scales of all inputs of an operator to its outputs; yields nothing if one of them has to stay."""
    found: dict[Tensor, Affine] = {}
    for tensor in node.inputs:
        if tensor not in scaled:
            continue
        moves = commute.sink(rw, node, tensor, scaled[tensor])
        if isinstance(moves, Refusal):
            return
        for output, moved in moves:
            other = found.get(output)
            if other is not None and (other.axis != moved.axis or other.map.scale.shape != moved.map.scale.shape):
                return
            scale = moved.map.scale if other is None else other.map.scale * moved.map.scale
            found[output] = Affine(LinearMap.diagonal(scale), moved.axis)
    yield from found.items()


def _find_scales(before: LinearMap, reach: Reach) -> Array | None:
    """√(r₁/r₂) of each channel as a power of two; None if all are 1, or if a channel cannot be followed."""
    count = before.geometry.out_channels
    first = np.abs(before.weight).reshape(count, -1).max(1)
    second = np.zeros(count)
    for reading, affine in reach.ends:
        after = reading.load()
        g = after.geometry
        channels = (affine.map.broadcast(g.in_channels).scale - 1) / STEP
        index = np.rint(channels).astype(int) - 1
        if np.any(np.abs(channels - index - 1) > 1e-3) or np.any(index >= count):
            return None  # two channels of the map before are multiplied with each other
        grouped = np.abs(after.weight).reshape(g.groups, g.out_channels // g.groups, g.in_channels // g.groups, -1)
        np.maximum.at(second, index[index >= 0], grouped.max((1, 3)).reshape(-1)[index >= 0])
    both = (first > 0) & (second > 0)
    ratio = np.divide(first, second, out=np.ones_like(first), where=both)
    scale = np.exp2(np.round(np.log2(ratio) / 2))
    return None if np.all(scale == 1) else scale
