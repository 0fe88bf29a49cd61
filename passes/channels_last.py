"""A softmax over the channels and the map after it run channels-last."""

from __future__ import annotations

from dataclasses import replace

import onnx_graphsurgeon as gs

from pwopt import emit, forms
from pwopt.linear import Refusal
from pwopt.rewrite import Pass, Rewrite, Rewriter, Skip

#: Channels to the end, and back.
LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


class ChannelsLast(Pass):
    """W·softmax(x, axis 1) = Tᵀ(softmax(Tx, axis −1)·Wᵀ) for T, which moves the channels to the end.

    A softmax across channels strides through memory; along the last axis it runs at full speed, and a pointwise map is
    a matrix product there. A Transpose before it takes T over. The distribution heads of YOLOv8, v9 and v11 (Li et
    al., "Generalized Focal Loss", 2020) take the expectation of a softmax so.
    """

    name = "channels-last"
    policy = "measured"

    def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | Skip | None:
        reading = forms.linear(rw, node)
        if reading is None or reading.kind != "conv" or not reading.geometry.pointwise or reading.geometry.groups > 1:
            return None
        softmax = rw.producer(reading.source)
        if not rw.is_a(softmax, "Softmax") or rw.opset < 13 or rw.rank(reading.source) != 4:
            return None
        if softmax.attrs.get("axis", -1) not in (1, -3):
            return None
        if not self.eager:
            return Skip("a softmax over channels and the map after it could run channels-last; only measuring can tell")
        linear = forms.owned(rw, reading, reading.source)
        if isinstance(linear, Refusal):
            return Skip(linear.reason)
        source, perm, old = softmax.inputs[0], LAST, [softmax, node]
        before = rw.producer(source)
        if rw.is_a(before, "Transpose") and not rw.crowd(source) and len(before.attrs.get("perm", ())) == 4:
            first = before.attrs["perm"]
            source, perm, old = before.inputs[0], tuple(first[p] for p in LAST), [before, *old]
        last = softmax.inputs[0]
        moved = rw.new_variable(f"{last.name}_last", last, lambda s: tuple(s[p] for p in LAST))
        soft = rw.new_variable(f"{reading.source.name}_last", moved)
        out = reading.geometry.out_channels
        mapped = rw.new_variable(f"{reading.output.name}_last", moved, lambda s: (*s[:3], out))
        written = emit.write(rw, linear.at_rank(0), replace(reading, kind="matmul"), soft, mapped, 3)
        if isinstance(written, Refusal):
            return Skip(written.reason)
        new = [
            gs.Node("Transpose", rw.node_name(softmax.name, "_last"), {"perm": list(perm)}, [source], [moved]),
            gs.Node("Softmax", softmax.name, {"axis": -1}, [moved], [soft]),
            *written.nodes,
            gs.Node("Transpose", rw.node_name(node.name, "_first"), {"perm": list(FIRST)}, [mapped], [reading.output]),
        ]
        done = rw.replace(old, new, f"softmax and {reading.channels} run channels-last", written.residual)
        return done.signed(f"softmax, {reading.channels} at {rw.size_of(reading.output)}")
