"""Linear chain folding: a sequence of linear maps becomes the cheapest sequence that computes the same."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from pwopt.algebra.geometry import Geometry, Refusal, RefusedError, compose_geometry
from pwopt.algebra.linear import LinearMap
from pwopt.algebra.ranks import factor
from pwopt.graph.dtypes import epsilon
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.operators import WEIGHTED_OPERATORS
from pwopt.graph.reasons import Reason
from pwopt.graph.shapes import set_channels
from pwopt.maps import emit, forms
from pwopt.maps.cost import price
from pwopt.maps.forms import Reading
from pwopt.maps.paths import relative_places
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.wording import format_increase

#: The longest chain that is planned at once. Longer ones are planned in pieces, and the results once more.
MAX_CHAIN = 64
#: The largest number of channels of a composed map that is factored, because a singular value decomposition of more
#: takes seconds.
MAX_FACTORED = 2048


@dataclass
class Chain:
    """Linear maps in sequence, and where to cut the sequence.

    Attributes
    ----------
    maps : list of Reading
    places : list of float
        How often each map is applied; relative to the first map if sizes are not known.
    ends : dict of int to int
        The index of the last map of each segment → the index of its first map. Each segment becomes one map.
    """

    maps: list[Reading]
    places: list[float]
    ends: dict[int, int]

    @functools.cached_property
    def indices(self) -> dict[Node, int]:
        """The index of each map, by its last node."""
        return {m.node: i for i, m in enumerate(self.maps)}


class FoldChains(Pass):
    """W₂(W₁x + b₁) + b₂ = (W₂W₁)x + (W₂b₁ + b₂)

    * Each map but the last has one reader, and no weight is shared.
    * The composition is exact: `geometry.compose_geometry` has the rules and their proofs.
    * The number of multiply-adds does not rise.

    A chain of n maps can be cut into composed maps in 2ⁿ⁻¹ ways. Dynamic programming finds the one with the fewest
    multiply-adds, as in matrix chain ordering: bottlenecks stay, expansions go. A composed map is split again at its
    rank if that is cheaper. Zero paddings, reductions over channels and selections (channel shuffle, Slice, Gather,
    Pad) are part of chains and cost nothing.

    PP-OCR, ExpandNet (Guo et al., 2020) and linear bottlenecks contain such chains.
    """

    name = "fold-chains"
    policy = "if cheaper"

    def start(self, rw: Rewriter) -> None:
        self._chains: dict[Node, Chain] = {}

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        reading = _read_member(rw, node)
        if reading is None:
            return _explain_refusal(rw, node)
        if reading.node is not node:
            return None
        chain = self._find_chain(rw, reading)
        index = chain.indices[node]
        if chain.ends.get(index, index) < index:
            return self._fold(rw, chain, chain.ends[index], index)
        if index not in chain.ends:
            return None  # inside a segment, which is folded at its last map
        if index > 0 and index - 1 in chain.ends:
            return Skip(_compare_cost(chain.maps[index - 1 : index + 1], chain.places[index - 1 : index + 1]))
        return self._explain_gap(rw, reading)

    def _find_chain(self, rw: Rewriter, reading: Reading) -> Chain:
        """The planned chain through a map. Plans are kept until one of their segments is folded."""
        chain = self._chains.get(reading.node)
        if chain is not None:
            return chain
        maps = [reading]
        while len(maps) < MAX_CHAIN and (first := self._find_previous(rw, maps[0])[0]) is not None:
            maps.insert(0, first)
        while len(maps) < MAX_CHAIN and (last := _find_next(rw, maps[-1])) is not None:
            if self._find_previous(rw, last)[0] is None:
                break
            maps.append(last)
        chain = _plan(rw, maps)
        for r in maps:
            self._chains[r.node] = chain
        return chain

    def _find_previous(self, rw: Rewriter, reading: Reading) -> tuple[Reading | None, str]:
        """The map whose output `reading` reads, if the two can be composed; else None and why not."""
        before = _read_member(rw, rw.producer(reading.source)) if not reading.turned else None
        if before is None or before.output is not reading.source:
            return None, ""
        other_uses = rw.other_uses(reading.source)
        if other_uses:
            composable = isinstance(compose_geometry(reading.geometry, before.geometry), Geometry)
            pair = [before, reading]
            return None, Reason(
                "{}; {}", other_uses, _compare_cost(pair, relative_places(rw, pair))
            ) if composable else other_uses
        if before.axis != reading.axis:
            return None, f"they act on different axes ({before.axis} and {reading.axis})"
        for r in (before, reading):
            if r.weighted and rw.is_shared(r.weight_input):
                return None, Reason("the weight {!r} is shared", r.weight_input.name)
        composed = compose_geometry(reading.geometry, before.geometry)
        if isinstance(composed, Refusal):
            return None, composed.reason
        return before, ""

    def _explain_gap(self, rw: Rewriter, reading: Reading) -> Skip | None:
        """Why two weighted maps in sequence cannot be composed."""
        _, reason = self._find_previous(rw, reading)
        both = reading.weighted and forms.weighted(rw, rw.producer(reading.source)) is not None
        return Skip(reason) if reason and both else None

    def _fold(self, rw: Rewriter, chain: Chain, first: int, last: int) -> Rewrite | Skip:
        maps = chain.maps[first : last + 1]
        composed = maps[0].load()
        for r in maps[1:]:
            composed = r.load() @ composed
        weighted = [r for r in maps if r.weighted]
        like = next((r for r in weighted if r.turned or not r.geometry.pointwise), weighted[-1])
        last_map, source, output = weighted[-1], maps[0].source, maps[-1].output
        widths = "→".join(str(r.geometry.in_channels) for r in maps) + f"→{maps[-1].geometry.out_channels}"
        most = sum(r.geometry.weights for r in weighted)
        factored = rw.attempt(self._factor, rw, composed, like, source, output, last_map, most)
        written = factored
        if isinstance(written, Refusal):
            written = rw.attempt(emit.write, rw, composed, like, source, output, last_map.axis)
        if isinstance(written, Refusal):
            return Skip(Reason("{} is cheaper as one map, but {}", widths, written.reason))
        for r in chain.maps:
            self._chains.pop(r.node, None)
        old = [n for r in maps for n in r.nodes]
        what = "one map" if isinstance(factored, Refusal) else "two maps of its rank"
        return rw.replace(old, written.nodes, f"{widths} is cheaper as {what}", written.residual)

    @staticmethod
    def _factor(
        rw: Rewriter,
        composed: LinearMap,
        like: Reading,
        source: Tensor,
        output: Tensor,
        last: Reading,
        most: int,
    ) -> emit.Written:
        """The composed map as two maps of its rank; refuses unless they have fewer than `most` weights.

        The rank is at most every intermediate width, and the plan is cheaper than keeping any of them. So only a rank
        below all widths can be cheaper still.
        """
        if min(composed.geometry.out_channels, composed.weight[0].size) > MAX_FACTORED:
            raise RefusedError("a singular value decomposition would take too long")
        dtype = rw.dtype(like.weight if like.weight is not None else source)
        parts = factor(composed, epsilon(dtype) / 2)
        middle = rw.new_variable(f"{output.name}_rank", output, set_channels(last.axis, parts[0].geometry.out_channels))
        first = emit.write(rw, parts[0], like, source, middle, last.axis)
        plain = replace(last, turned=False)
        second = emit.write(rw, parts[1], plain, middle, output, last.axis, inherit=like is not last)
        nodes = (*first.nodes, *second.nodes)
        if sum(rw.elements(t) or 0 for n in nodes for t in n.inputs[:2]) >= most:
            raise RefusedError("the maps have this rank already")
        return emit.Written(nodes, max(first.residual, second.residual))


def _read_member(rw: Rewriter, node: Node | None) -> Reading | None:
    """A map that can be part of a chain: it has weights, or its neighbours can absorb it at no cost."""
    reading = forms.weighted(rw, node) or forms.linear(rw, node, turned=True)
    if reading is None or reading.fill is not None:
        return None
    return reading if reading.weighted or reading.kind in ("selection", "reduction", "border") else None


def _explain_refusal(rw: Rewriter, node: Node) -> Skip | None:
    """Why an operator with weights, or a Gemm beside a map, is not a linear map itself."""
    found = forms.read(rw, node) if rw.op(node) in WEIGHTED_OPERATORS else None
    if not isinstance(found, Refusal):
        return None
    neighbours = (rw.producer(node.inputs[0]), rw.sole_reader(node.outputs[0]))
    near = node.op == "Gemm" and any(forms.weighted(rw, n) is not None for n in neighbours)
    return Skip(Reason("{} stays: {}", node.op, found.reason)) if near or found is not forms.NOT_CONSTANT else None


def _find_next(rw: Rewriter, reading: Reading) -> Reading | None:
    after = _read_member(rw, rw.sole_reader(reading.output))
    return after if after is not None and after.source is reading.output else None


def _plan(rw: Rewriter, maps: list[Reading]) -> Chain:
    """Cut a chain into the cheapest segments: best[j] = min over i of best[i] + price of maps i … j − 1 as one.

    If several plans cost the same, the one with the fewest maps wins. A segment is one map, or an exact composition
    whose site is not denied. Selections and paddings by themselves cost nothing.
    """
    places = relative_places(rw, maps)
    count = len(maps)
    kinds: list[Geometry] = []  # distinct geometries; a pair of their numbers is composed once
    weights: list[int] = []  # of each of them
    numbers: dict[Geometry, int] = {}

    def number(geometry: Geometry) -> int:
        if geometry not in numbers:
            numbers[geometry] = len(kinds)
            kinds.append(geometry)
            weights.append(geometry.weights)
        return numbers[geometry]

    own = [number(m.geometry) for m in maps]
    weighted, transposed = [m.weighted for m in maps], [m.geometry.transposed for m in maps]
    denied = [rw.is_denied(m.node) for m in maps]
    pairs: dict[tuple[int, int], int | None] = {}
    best: list[tuple[float, int]] = [(0.0, 0)] + [(float("inf"), 0)] * count
    start = [0] * (count + 1)
    for i in range(count):
        composed = own[i]
        transposed_at = i if transposed[i] else None
        has_weights = weighted[i]
        for j in range(i, count):
            if j > i:
                pair = own[j], composed
                if pair not in pairs:
                    result = compose_geometry(kinds[own[j]], kinds[composed])
                    pairs[pair] = None if isinstance(result, Refusal) else number(result)
                following = pairs[pair]
                if following is None:
                    break
                composed = following
                transposed_at = j if transposed[j] else transposed_at
                has_weights = has_weights or weighted[j]
                if denied[j] or not has_weights:
                    continue
            over = places[transposed_at] if transposed_at is not None else places[j]
            free = i == j and not weighted[i]
            total = (best[i][0] + (0.0 if free else weights[composed] * over), best[i][1] + 1)
            if total < best[j + 1]:
                best[j + 1], start[j + 1] = total, i
    ends, j = {}, count
    while j > 0:
        ends[j - 1] = start[j]
        j = start[j]
    return Chain(maps, places, ends)


def _compare_cost(pair: list[Reading], places: list[float]) -> str:
    """What composing two maps would cost."""
    first, second = pair
    composed = compose_geometry(second.geometry, first.geometry)
    assert isinstance(composed, Geometry)
    separate = sum(price(r.geometry, p) for r, p in zip(pair, places, strict=True) if r.weighted)
    together = price(composed, places[0] if first.geometry.transposed else places[1])
    widths = f"{first.geometry.in_channels}→{first.geometry.out_channels}→{second.geometry.out_channels}"
    return f"folding {widths} would cost {format_increase(separate, together, absolute=max(places) > 1)}"
