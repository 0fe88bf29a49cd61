"""Concat joining: a sum of maps of different tensors becomes one map of their Concat."""

from __future__ import annotations

from dataclasses import replace

from pwopt.algebra.linear import hcat
from pwopt.graph.ir import Node
from pwopt.graph.reasons import Reason
from pwopt.graph.shapes import set_channels
from pwopt.maps import emit, forms
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip


class JoinConcat(Pass):
    """Wₐa + W_b b = (Wₐ W_b)·concat(a, b)

    * Both maps are dense and have the same geometry but for the channels.
    * The shapes of a and b are known and differ in the channels only.
    * Nothing else reads Wₐa or W_b b, and no weight is shared.

    The number of multiply-adds stays the same. One addition goes, and a copy of the inputs comes, so only measuring can
    tell. `split-concat` is the inverse.
    """

    name = "join-concat"
    operators = frozenset({"Add"})
    policy = "measured"

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        if rw.op(node) != "Add":
            return None
        readings = [forms.linear(rw, rw.producer(t)) for t in node.inputs]
        maps = [
            r for r in readings if r is not None and r.weighted and r.geometry.groups == 1 and r.kind != "left-matmul"
        ]
        if len(maps) != 2 or maps[0].source is maps[1].source:
            return None
        a, b = maps
        if (a.kind, a.axis, _ignore_inputs(a)) != (b.kind, b.axis, _ignore_inputs(b)) or not _can_concatenate(rw, a, b):
            return None
        if not self.eager:
            return Skip("one map of a Concat would take as many multiply-adds; only measuring can tell")
        for r in maps:
            other_uses = rw.other_uses(r.output)
            if other_uses or rw.is_shared(r.weight_input):
                return Skip(other_uses or Reason("the weight {!r} is shared", r.weight_input.name))
        joined = hcat(a.load(), b.load())
        both = rw.new_variable(
            f"{node.outputs[0].name}_inputs", a.source, set_channels(a.axis, joined.geometry.in_channels)
        )
        written = emit.write(rw, joined, a, both, node.outputs[0], a.axis)
        concat = Node("Concat", rw.node_name(node.name, "_concat"), {"axis": a.axis}, [a.source, b.source], [both])
        reason = f"two maps that are summed, {a.channels} and {b.channels}, become one map of both inputs"
        done = rw.replace([*a.nodes, *b.nodes, node], [concat, *written.nodes], reason, written.residual)
        return done.with_signature(f"{a.kind} {a.channels} + {b.channels} at {rw.size_of(node.outputs[0])}")


def _ignore_inputs(reading: forms.Reading) -> object:
    """The geometry without what may differ between two maps of a sum."""
    return replace(reading.geometry, in_channels=0, biased=False)


def _can_concatenate(rw: Rewriter, a: forms.Reading, b: forms.Reading) -> bool:
    """Whether the shapes of both inputs are known and differ in the channels only."""
    x, y = rw.shape(a.source), rw.shape(b.source)
    return (
        x is not None
        and y is not None
        and len(x) == len(y)
        and all(p == q and p is not None for i, (p, q) in enumerate(zip(x, y, strict=True)) if i != a.axis)
    )
