"""Concat splitting: a map of a Concat becomes a sum of maps of its inputs."""

from __future__ import annotations

from pwopt.algebra.linear import split_inputs
from pwopt.graph import attributes
from pwopt.graph.ir import Node, Tensor
from pwopt.maps import forms, selections
from pwopt.rewriting.builder import Builder
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip


class SplitConcat(Pass):
    """W·concat(a, b, …) = Wₐa + W_b b + …

    * The map is dense, nothing else reads the Concat, and the weight is not shared.
    * The Concat joins channels, and no tensor twice.

    The number of multiply-adds stays the same. The copy of the inputs goes, and additions come, so only measuring can
    tell. `join-concat` is the inverse.
    """

    name = "split-concat"
    operators = forms.WEIGHTED_TYPES
    policy = "measured"

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        reading = forms.weighted(rw, node)
        if reading is None or reading.nodes[0] is not node:
            return None
        concat = rw.producer(reading.source)
        if not rw.is_a(concat, "Concat") or attributes.read_concat_axis(rw, concat) != reading.axis:
            return None
        parts = selections.read_concat(rw, concat)
        if parts is None or len(parts) < 2 or reading.geometry.groups > 1 or len(set(concat.inputs)) < len(parts):
            return None
        if not self.eager:
            return Skip("one map per input of its Concat would take as many multiply-adds; only measuring can tell")
        linear = forms.load_owned(rw, reading, reading.source)
        sizes = [p.geometry.in_channels for p in parts]
        builder, output = Builder(rw), reading.output
        total: Tensor | None = None
        for i, (part, tensor) in enumerate(zip(split_inputs(linear, sizes), concat.inputs, strict=True)):
            product: Tensor = rw.new_variable(f"{output.name}_part", output)
            builder.add_map(part, reading, tensor, product, reading.axis)
            last = i == len(parts) - 1
            if total is not None:
                after = output if last else rw.new_variable(f"{output.name}_sum", output)
                builder.nodes.append(Node("Add", reading.node.name if last else "", {}, [total, product], [after]))
                product = after
            total = product
        widths = " + ".join(map(str, sizes))
        reason = f"{widths} channels are mapped separately and summed, instead of joined and mapped"
        done = rw.replace([concat, *reading.nodes], builder.nodes, reason, builder.residual)
        return done.with_signature(f"{reading.kind} ({widths})→{reading.geometry.out_channels} at {rw.size_of(output)}")
