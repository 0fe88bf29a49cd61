"""Sequences of linear maps become the cheapest sequence that computes the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pwopt.algebra.geometry import Geometry, Refusal, RefusedError, compose_geometry
from pwopt.algebra.linear import LinearMap
from pwopt.algebra.ranks import factor
from pwopt.graph.dtypes import epsilon
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.shapes import channels
from pwopt.maps import emit, forms
from pwopt.maps.cost import price
from pwopt.maps.forms import Reading
from pwopt.maps.paths import relative_places
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.wording import dearer

#: Chains are planned exactly up to this many maps at a time; longer ones in such pieces, then again.
MAX_CHAIN = 64
#: Composed maps are factored up to this many channels; a singular value decomposition takes seconds beyond.
MAX_FACTORED = 2048


@dataclass
class Chain:
    """Linear maps in sequence, and the plan for them.

    Attributes
    ----------
    maps : list of Reading
    places : list of float
        How often each map is applied; relative to the first where sizes are not known.
    ends : dict of int to int
        End of each planned segment (index of its last map) → index of its first map.
    """

    maps: list[Reading]
    places: list[float]
    ends: dict[int, int]


class FoldChains(Pass):
    """W₂(W₁x + b₁) + b₂ = (W₂W₁)x + (W₂b₁ + b₂)

    Of a chain's 2ⁿ⁻¹ ways to cut it into composed maps, the one with the fewest multiply-adds is found by
    dynamic programming (a shortest path over intermediate widths): bottlenecks stay, expansions go. A
    composed map is split again at its rank where that is cheaper. Exactness is `linear.compose_geometry`'s.
    Paddings with zeros, reductions over the channels and selections (channel shuffle, Slice, Gather, Pad) take
    part, free of charge. Never more multiply-adds. PP-OCR, ExpandNet (Guo et al., 2020) and linear bottlenecks hold
    such chains.
    """

    name = "fold-chains"
    policy = "if cheaper"

    def start(self, rw: Rewriter) -> None:
        self._chains: dict[Node, Chain] = {}

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        reading = _member(rw, node)
        if reading is None:
            return _unread(rw, node)
        if reading.node is not node:
            return None
        chain = self._chain_of(rw, reading)
        index = next(i for i, r in enumerate(chain.maps) if r.node is node)
        if chain.ends.get(index, index) < index:
            return self._fold(rw, chain, chain.ends[index], index)
        if index not in chain.ends:
            return None  # inside a segment, which is folded at its end
        if index > 0 and index - 1 in chain.ends:
            return Skip(_refusal_to_join(chain, index))
        return self._blocked(rw, reading)

    def _chain_of(self, rw: Rewriter, reading: Reading) -> Chain:
        """The planned chain through a map; plans are kept until one of their segments is folded."""
        chain = self._chains.get(reading.node)
        if chain is not None:
            return chain
        maps = [reading]
        while len(maps) < MAX_CHAIN and (first := self._linked(rw, maps[0])[0]) is not None:
            maps.insert(0, first)
        while len(maps) < MAX_CHAIN and (last := _next_map(rw, maps[-1])) is not None:
            if self._linked(rw, last)[0] is None:
                break
            maps.append(last)
        chain = plan(rw, maps)
        for r in maps:
            self._chains[r.node] = chain
        return chain

    def _linked(self, rw: Rewriter, reading: Reading) -> tuple[Reading | None, str]:
        """The map whose output `reading` reads, if the two can be joined at all, else why they cannot."""
        before = _member(rw, rw.producer(reading.source)) if not reading.turned else None
        if before is None or before.output is not reading.source:
            return None, ""
        crowd = rw.crowd(reading.source)
        if crowd:
            price_tag = _price_tag(rw, before, reading)
            return None, f"{crowd}; {price_tag}" if price_tag else crowd
        if before.axis != reading.axis:
            return None, f"they act on different axes ({before.axis} and {reading.axis})"
        for r in (before, reading):
            if r.weighted and rw.shared(r.weight_input):
                return None, f"the weight {r.weight_input.name!r} is shared"
        composed = compose_geometry(reading.geometry, before.geometry)
        if isinstance(composed, Refusal):
            return None, composed.reason
        return before, ""

    def _blocked(self, rw: Rewriter, reading: Reading) -> Skip | None:
        before, reason = self._linked(rw, reading)
        both = reading.weighted and forms.weighted(rw, rw.producer(reading.source)) is not None if reason else False
        return Skip(reason) if before is None and both else None

    def _fold(self, rw: Rewriter, chain: Chain, first: int, last: int) -> Rewrite | Skip:
        maps = chain.maps[first : last + 1]
        composed = maps[0].load()
        for r in maps[1:]:
            composed = r.load() @ composed
        formed = [r for r in maps if r.weighted]
        shape = next((r for r in formed if r.turned or not r.geometry.pointwise), formed[-1])
        target, source, output = formed[-1], maps[0].source, maps[-1].output
        widths = "→".join(str(r.geometry.in_channels) for r in maps) + f"→{maps[-1].geometry.out_channels}"
        weights = sum(r.geometry.weights for r in formed)
        low = rw.attempt(self._factor, rw, composed, shape, source, output, target, weights)
        written = low
        if isinstance(written, Refusal):
            written = rw.attempt(emit.write, rw, composed, shape, source, output, target.axis)
        if isinstance(written, Refusal):
            return Skip(f"{widths} is cheaper as one map, but {written.reason}")
        for r in chain.maps:
            self._chains.pop(r.node, None)
        old = [n for r in maps for n in r.nodes]
        what = "one map" if isinstance(low, Refusal) else "two maps of its rank"
        return rw.replace(old, written.nodes, f"{widths} is cheaper as {what}", written.residual)

    @staticmethod
    def _factor(
        rw: Rewriter,
        composed: LinearMap,
        shape: Reading,
        source: Tensor,
        output: Tensor,
        target: Reading,
        most: int,
    ) -> emit.Written:
        """The composed map at its rank; refused unless that has fewer than `most` weights."""
        if min(composed.geometry.out_channels, composed.weight[0].size) > MAX_FACTORED:
            raise RefusedError("a singular value decomposition would take too long")
        dtype = rw.dtype(shape.weight if shape.weight is not None else source)
        # Every intermediate width bounds the rank, so a plan that beat all of them can only be beaten from below.
        parts = factor(composed, epsilon(dtype) / 2)
        middle = rw.new_variable(f"{output.name}_rank", output, channels(target.axis, parts[0].geometry.out_channels))
        first = emit.write(rw, parts[0], shape, source, middle, target.axis)
        plain = replace(target, turned=False)
        second = emit.write(rw, parts[1], plain, middle, output, target.axis, inherit=shape is not target)
        nodes = (*first.nodes, *second.nodes)
        if sum(rw.elements(t) or 0 for n in nodes for t in n.inputs[:2]) >= most:
            raise RefusedError("the maps were of that rank already")
        return emit.Written(nodes, max(first.residual, second.residual))


def _member(rw: Rewriter, node: Node | None) -> Reading | None:
    """A map that chains are made of: with weights, or one that its neighbours can take over for nothing."""
    reading = forms.weighted(rw, node) or forms.linear(rw, node, turned=True)
    if reading is None or reading.fill is not None:
        return None
    return reading if reading.weighted or reading.kind in ("selection", "reduction", "border") else None


def _unread(rw: Rewriter, node: Node) -> Skip | None:
    """Why a Gemm beside another map is none that could be folded."""
    found = forms.read(rw, node) if rw.is_a(node, "Gemm") else None
    beside = (rw.producer(node.inputs[0]), rw.sole_reader(node.outputs[0])) if isinstance(found, Refusal) else ()
    near = any(forms.weighted(rw, n) is not None for n in beside)
    return Skip(f"Gemm stays: {found.reason}") if isinstance(found, Refusal) and near else None


def _next_map(rw: Rewriter, reading: Reading) -> Reading | None:
    after = _member(rw, rw.sole_reader(reading.output))
    return after if after is not None and after.source is reading.output else None


def plan(rw: Rewriter, maps: list[Reading]) -> Chain:
    """Cheapest segments of a chain: best[j] = min over i of best[i] + price of maps i … j − 1 as one.

    Ties go to fewer maps. A segment is one map or an exact composition whose site is not denied. Selections and
    paddings cost nothing by themselves.
    """
    places = relative_places(rw, maps)
    count = len(maps)
    known: dict[Geometry, Geometry] = {}
    geometries = [known.setdefault(m.geometry, m.geometry) for m in maps]  # equal ones are one, and compared at once
    weighted = [m.weighted for m in maps]
    pairs: dict[tuple[Geometry, Geometry], Geometry | Refusal] = {}
    best: list[tuple[float, int]] = [(0.0, 0)] + [(float("inf"), 0)] * count
    start = [0] * (count + 1)
    for i in range(count):
        composed: Geometry | Refusal = geometries[i]
        transposed_at = i if geometries[i].transposed else None
        has_weights = weighted[i]
        for j in range(i, count):
            if j > i:
                assert isinstance(composed, Geometry)
                pair = (geometries[j], composed)
                if pair not in pairs:
                    made = compose_geometry(geometries[j], composed)
                    pairs[pair] = made if isinstance(made, Refusal) else known.setdefault(made, made)
                composed = pairs[pair]
                if isinstance(composed, Refusal):
                    break
                transposed_at = j if geometries[j].transposed else transposed_at
                has_weights = has_weights or weighted[j]
                if rw.denied(maps[j].node) or not has_weights:
                    continue
            over = places[transposed_at] if transposed_at is not None else places[j]
            assert isinstance(composed, Geometry)
            free = i == j and not weighted[i]
            total = (best[i][0] + (0.0 if free else price(composed, over)), best[i][1] + 1)
            if total < best[j + 1]:
                best[j + 1], start[j + 1] = total, i
    ends, j = {}, count
    while j > 0:
        ends[j - 1] = start[j]
        j = start[j]
    return Chain(maps, places, ends)


def _refusal_to_join(chain: Chain, index: int) -> str:
    pair = chain.maps[index - 1 : index + 1]
    composed = compose_geometry(pair[1].geometry, pair[0].geometry)
    assert isinstance(composed, Geometry)
    return _times(pair, composed, chain.places[index - 1 : index + 1])


def _times(pair: list[Reading], composed: Geometry, places: list[float]) -> str:
    separate = sum(price(r.geometry, p) for r, p in zip(pair, places, strict=True) if r.weighted)
    joined = price(composed, places[0] if pair[0].geometry.transposed else places[1])
    a, b = pair
    widths = f"{a.geometry.in_channels}→{a.geometry.out_channels}→{b.geometry.out_channels}"
    return f"folding {widths} would cost {dearer(separate, joined, absolute=max(places) > 1)}"


def _price_tag(rw: Rewriter, before: Reading, after: Reading) -> str:
    composed = compose_geometry(after.geometry, before.geometry)
    return (
        "" if isinstance(composed, Refusal) else _times([before, after], composed, relative_places(rw, [before, after]))
    )
