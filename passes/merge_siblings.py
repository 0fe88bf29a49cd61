"""Horizontal fusion: maps that read the same tensor become one map, and its result is split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pwopt.algebra.geometry import Geometry
from pwopt.algebra.linear import stack
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.reasons import Reason
from pwopt.graph.shapes import set_channels
from pwopt.maps import emit, forms
from pwopt.maps.forms import Reading, describe_map
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.steps import Step, read_activation, repeat_activation


@dataclass(frozen=True)
class Siblings:
    """Maps that read the same tensor.

    Attributes
    ----------
    maps : tuple of Reading
    tails : tuple of list of Step
        The activations after each map, which are equal.
    concat : Node or None
        The Concat that takes all results, side by side and in the order of the maps.
    """

    maps: tuple[Reading, ...]
    tails: tuple[list[Step], ...]
    concat: Node | None

    @property
    def results(self) -> list[Tensor]:
        return [tail[-1].output if tail else m.output for m, tail in zip(self.maps, self.tails, strict=True)]

    @property
    def nodes(self) -> list[Node]:
        pairs = zip(self.maps, self.tails, strict=True)
        return [n for m, tail in pairs for n in (*m.nodes, *(n for step in tail for n in step.nodes))]

    @property
    def widths(self) -> str:
        counts = ", ".join(str(m.geometry.out_channels) for m in self.maps)
        return f"{self.maps[0].geometry.in_channels}→({counts})"

    @property
    def saves_operators(self) -> bool:
        first = self.maps[0]
        has_add = first.geometry.biased and first.kind == "matmul"
        return 1 + has_add + len(self.tails[0]) + (self.concat is None) < len(self.nodes)


class MergeSiblings(Pass):
    """(W₁x, W₂x, …) = split((W₁; W₂; …)x), and f(W₁x), f(W₂x), … likewise for one elementwise f

    * The maps are dense and have the same geometry but for the outputs. No weight is shared.
    * If one Concat takes all results side by side, neither it nor a Split is needed.
    * Without measuring, the number of operators must decrease.

    One larger product is not always faster than several, and a Split may cost a layout change. Query, key and value
    projections (Vaswani et al., 2017) and the pointwise branches of Inception modules (Szegedy et al., 2015) are
    siblings.
    """

    name = "merge-siblings"
    operators = forms.WEIGHTED_TYPES
    policy = "measured"

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        reading = forms.weighted(rw, node)
        if reading is None or len(rw.readers(reading.source)) < 2:
            return None
        maps = [m for n in rw.readers(reading.source) if (m := _read_sibling(rw, n, reading)) is not None]
        if len(maps) < 2 or maps[0].nodes[0] is not node:
            return None
        shared = [m for m in maps if rw.is_shared(m.weight_input)]
        if shared:
            return Skip(Reason("the weight {!r} is shared", shared[0].weight_input.name))
        siblings = _collect(rw, maps)
        if not self.eager and not siblings.saves_operators:
            what = f"{siblings.widths} as one map and a Split"
            return Skip(f"{what} would not save an operator; only measuring can tell")
        return _merge(rw, siblings)


def _collect(rw: Rewriter, maps: Sequence[Reading]) -> Siblings:
    """Maps with the equal activations after them, in the order in which a Concat takes their results, if one does."""
    siblings = Siblings(tuple(maps), tuple(_find_equal_tails(rw, maps)), None)
    results = siblings.results
    concat = _find_concat(rw, results, maps[0].axis)
    if concat is None:
        return siblings
    order = sorted(range(len(maps)), key=lambda i: _find_index(concat, results[i]))
    return Siblings(tuple(maps[i] for i in order), tuple(siblings.tails[i] for i in order), concat)


def _merge(rw: Rewriter, siblings: Siblings) -> Rewrite:
    maps, results, concat = siblings.maps, siblings.results, siblings.concat
    first, counts = maps[0], [m.geometry.out_channels for m in maps]
    stacked = stack(*(m.load() for m in maps))
    merged = rw.new_variable(f"{first.output.name}_siblings", first.output, set_channels(first.axis, sum(counts)))
    written = emit.write(rw, stacked, first, first.source, merged, first.axis)
    new = list(written.nodes)
    result: Tensor = merged
    for step in siblings.tails[0]:
        after = rw.new_variable(f"{step.output.name}_siblings", step.output, set_channels(first.axis, sum(counts)))
        new += repeat_activation(rw, step, result, after)
        result = after
    if concat is None:
        new.append(_make_split(rw, result, results, first.axis or 0, counts))
    leader = min(siblings.nodes, key=rw.position)  # the new nodes stand where the first of the old ones stood
    reason = Reason("{} maps of {!r}, {}, become one map", len(maps), first.source.name, siblings.widths)
    signature = f"{describe_map(rw, first, siblings.widths)} into {'Split' if concat is None else 'Concat'}"
    old = [*(n for n in siblings.nodes if n is not leader), leader]
    done = rw.replace(old, new, reason, written.residual)
    inner = {m.output.name: merged.name for m, tail in zip(maps, siblings.tails, strict=True) if tail}
    became = dict(done.became) | inner
    if concat is not None:
        reason = Reason("{}, and their Concat takes its result", reason)
        rest = [result if t is results[0] else t for t in concat.inputs if all(t is not e for e in results[1:])]
        rw.replace([concat], [Node("Concat", concat.name, dict(concat.attrs), rest, concat.outputs)], reason)
        became |= {t.name: result.name for t in results}
    return replace(done, reason=reason, became=tuple(became.items()), signature=signature)


def _ignore_outputs(g: Geometry) -> Geometry:
    """The geometry without what may differ between siblings."""
    return replace(g, out_channels=0, biased=False)


def _read_sibling(rw: Rewriter, node: Node, reading: Reading) -> Reading | None:
    """The map at `node`, if it has the form and the geometry of `reading`; else None."""
    other = forms.weighted(rw, node)
    if other is None or other.source is not reading.source:
        return None
    g = other.geometry
    alike = (other.kind, other.axis, _ignore_outputs(g)) == (
        reading.kind,
        reading.axis,
        _ignore_outputs(reading.geometry),
    )
    return other if alike and g.groups == 1 else None


def _find_equal_tails(rw: Rewriter, siblings: Sequence[Reading]) -> list[list[Step]]:
    """The activations after each sibling, as long as they are equal."""
    tails: list[list[Step]] = [[] for _ in siblings]
    tensors = [s.output for s in siblings]
    while True:
        steps = [read_activation(rw, t) for t in tensors]
        if any(s is None for s in steps) or len({s.signature for s in steps if s is not None}) > 1:
            return tails
        for tail, step in zip(tails, steps, strict=True):
            assert step is not None
            tail.append(step)
        tensors = [s.output for s in steps if s is not None]


def _find_concat(rw: Rewriter, results: Sequence[Tensor], axis: int | None) -> Node | None:
    """The Concat along `axis` that takes all results side by side and is their only reader; else None."""
    node = rw.sole_reader(results[0])
    if not rw.is_a(node, "Concat") or any(rw.sole_reader(t) is not node for t in results):
        return None
    rank = rw.rank(results[0])
    places = sorted(_find_index(node, t) for t in results)
    once = all(sum(t is e for t in node.inputs) == 1 for e in results)
    aligned = rank is not None and node.attrs["axis"] % rank == axis
    return node if once and aligned and places == list(range(places[0], places[0] + len(results))) else None


def _find_index(concat: Node, tensor: Tensor) -> int:
    return next(i for i, t in enumerate(concat.inputs) if t is tensor)


def _make_split(rw: Rewriter, source: Tensor, results: Sequence[Tensor], axis: int, sizes: Sequence[int]) -> Node:
    name = rw.node_name(f"{source.name}", "_split")
    if rw.opset < 13:
        return Node("Split", name, {"axis": axis, "split": list(sizes)}, [source], list(results))
    counts = rw.new_constant(f"{source.name}_sizes", np.array(sizes, np.int64))
    return Node("Split", name, {"axis": axis}, [source, counts], list(results))
