"""Maps that read one tensor become one map, whose result is split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pwopt.algebra.geometry import Geometry
from pwopt.algebra.linear import stack
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.shapes import channels
from pwopt.maps import emit, forms
from pwopt.maps.forms import Reading, describe_map
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.steps import Step, activation, repeated


class MergeSiblings(Pass):
    """(W₁x, W₂x, …) = split((W₁; W₂; …)x), and f(W₁x), f(W₂x), … likewise for one elementwise f.

    Where all results go side by side into one Concat, both the Split and the Concat go. Query, key and value
    projections (Vaswani et al., 2017) and the pointwise branches of Inception modules (Szegedy et al., 2015) are
    siblings. One larger product is not always faster than several, and a Split may cost a layout change: measured.
    Without measuring, siblings merge only if operators disappear.
    """

    name = "merge-siblings"
    policy = "measured"

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        reading = forms.weighted(rw, node)
        if reading is None or len(rw.readers(reading.source)) < 2:
            return None
        siblings = [s for n in rw.readers(reading.source) if (s := _sibling(rw, n, reading)) is not None]
        if len(siblings) < 2 or siblings[0].nodes[0] is not node:
            return None
        shared = [s for s in siblings if rw.is_shared(s.weight_input)]
        if shared:
            return Skip(f"the weight {shared[0].weight_input.name!r} is shared")
        return self._merge(rw, siblings)

    def _merge(self, rw: Rewriter, siblings: list[Reading]) -> Rewrite | Skip:
        tails = _equal_tails(rw, siblings)
        ends = [tail[-1].output if tail else s.output for s, tail in zip(siblings, tails, strict=True)]
        concat = _common_concat(rw, ends, siblings[0].axis)
        if concat is not None:
            order = sorted(range(len(ends)), key=lambda i: _place(concat, ends[i]))
            siblings, tails, ends = [siblings[i] for i in order], [tails[i] for i in order], [ends[i] for i in order]
        first, old = siblings[0], [n for s, t in zip(siblings, tails, strict=True) for n in _nodes(s, t)]
        count = len(siblings)
        widths = f"{first.geometry.in_channels}→({', '.join(str(s.geometry.out_channels) for s in siblings)})"
        if not self.eager and 1 + first.geometry.biased * (first.kind == "matmul") + len(tails[0]) + (
            concat is None
        ) >= len(old):
            return Skip(f"{widths} as one map and a Split would not save an operator; only measuring can tell")
        stacked = stack(*(s.load() for s in siblings))
        wide = sum(s.geometry.out_channels for s in siblings)
        merged = rw.new_variable(f"{first.output.name}_siblings", first.output, channels(first.axis, wide))
        written = emit.write(rw, stacked, first, first.source, merged, first.axis)
        new, became = (
            list(written.nodes),
            {s.output.name: merged.name for s, t in zip(siblings, tails, strict=True) if t},
        )
        result: Tensor = merged
        for step in tails[0]:
            after = rw.new_variable(f"{step.output.name}_siblings", step.output, channels(first.axis, wide))
            new += repeated(rw, step, result, after)
            result = after
        if concat is None:
            new.append(_split(rw, result, ends, first.axis or 0, [s.geometry.out_channels for s in siblings]))
        leader = min(old, key=rw.position)  # whoever reads a result comes later than the first of them
        reason = f"{count} maps of {first.source.name!r}, {widths}, are one map"
        done = rw.replace([*(n for n in old if n is not leader), leader], new, reason, written.residual)
        if concat is None:
            return replace(
                done, became=tuple(became.items()), signature=f"{describe_map(rw, first, widths)} into Split"
            )
        inputs = [t for t in concat.inputs if all(t is not e for e in ends[1:])]
        joined = Node(
            "Concat", concat.name, dict(concat.attrs), [result if t is ends[0] else t for t in inputs], concat.outputs
        )
        rw.replace([concat], [joined], reason)
        became |= {e.name: result.name for e in ends}
        return replace(
            done,
            reason=f"{reason}, and their Concat takes its result",
            became=tuple(became.items()),
            signature=f"{describe_map(rw, first, widths)} into Concat",
        )


def _shape_only(g: Geometry) -> Geometry:
    return replace(g, out_channels=0, biased=False)


def _sibling(rw: Rewriter, node: Node, reading: Reading) -> Reading | None:
    """The map of `node`, if it has the form and the geometry of `reading`."""
    other = forms.weighted(rw, node)
    if other is None or other.source is not reading.source:
        return None
    g = other.geometry
    alike = (other.kind, other.axis, _shape_only(g)) == (reading.kind, reading.axis, _shape_only(reading.geometry))
    return other if alike and g.groups == 1 else None


def _nodes(sibling: Reading, tail: Sequence[Step]) -> list[Node]:
    return [*sibling.nodes, *(n for step in tail for n in step.nodes)]


def _equal_tails(rw: Rewriter, siblings: Sequence[Reading]) -> list[list[Step]]:
    """The activations that follow all siblings alike."""
    tails: list[list[Step]] = [[] for _ in siblings]
    tensors = [s.output for s in siblings]
    while True:
        steps = [activation(rw, t) for t in tensors]
        if any(s is None for s in steps) or len({s.signature for s in steps if s is not None}) > 1:
            return tails
        for tail, step in zip(tails, steps, strict=True):
            assert step is not None
            tail.append(step)
        tensors = [s.output for s in steps if s is not None]


def _common_concat(rw: Rewriter, ends: Sequence[Tensor], axis: int | None) -> Node | None:
    """The Concat along `axis` that takes all of `ends`, side by side, and is their only reader."""
    node = rw.sole_reader(ends[0])
    if not rw.is_a(node, "Concat") or any(rw.sole_reader(t) is not node for t in ends):
        return None
    rank = rw.rank(ends[0])
    places = sorted(_place(node, t) for t in ends)
    once = all(sum(t is e for t in node.inputs) == 1 for e in ends)
    aligned = rank is not None and node.attrs["axis"] % rank == axis
    return node if once and aligned and places == list(range(places[0], places[0] + len(ends))) else None


def _place(concat: Node, tensor: Tensor) -> int:
    return next(i for i, t in enumerate(concat.inputs) if t is tensor)


def _split(rw: Rewriter, source: Tensor, ends: Sequence[Tensor], axis: int, sizes: Sequence[int]) -> Node:
    name = rw.node_name(f"{source.name}", "_split")
    if rw.opset < 13:
        return Node("Split", name, {"axis": axis, "split": list(sizes)}, [source], list(ends))
    counts = rw.new_constant(f"{source.name}_sizes", np.array(sizes, np.int64))
    return Node("Split", name, {"axis": axis}, [source, counts], list(ends))
