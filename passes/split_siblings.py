"""A map whose result is split becomes several maps."""

from __future__ import annotations

from dataclasses import replace

import onnx_graphsurgeon as gs

from pwopt import emit, forms
from pwopt.forms import Reading, describe_map
from pwopt.linear import LinearMap, Refusal
from pwopt.rewrite import Pass, Rewrite, Rewriter, Skip
from pwopt.shapes import channels
from pwopt.steps import Step, activation, repeated


class SplitSiblings(Pass):
    """split(f((W₁; W₂; …)x)) = (f(W₁x), f(W₂x), …) for an elementwise f: merge-siblings backwards.

    A Split takes its input out of the provider's blocked layout, and with it the Concat that so often follows: the
    blocks of CSPNet (Wang et al., 2020), C2f and C3k2 of YOLOv8 and v11, split what a 1×1 convolution makes, work on
    one half, and join all again.
    """

    name = "split-siblings"
    policy = "measured"

    def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | Skip | None:
        reading = forms.weighted(rw, node)
        if reading is None or reading.nodes[0] is not node or reading.geometry.groups > 1:
            return None
        steps: list[Step] = []
        while True:
            tensor = steps[-1].output if steps else reading.output
            split = rw.sole_reader(tensor)
            if rw.is_a(split, "Split"):
                break
            step = activation(rw, tensor)
            if step is None:
                return None
            steps.append(step)
        parts = forms.read_split(rw, split)
        if parts is None or parts[0].axis != reading.axis:
            return None
        counts = [p.geometry.out_channels for p in parts]
        widths = f"{reading.geometry.in_channels}→({', '.join(map(str, counts))})"
        if rw.shared(reading.weight_input):
            return Skip(f"{widths}: the weight {reading.weight_input.name!r} is shared")
        if not self.eager:
            return Skip(f"{widths} could be maps of their own, instead of one and a Split; only measuring can tell")
        linear = reading.load()
        if isinstance(linear, Refusal):
            return Skip(linear.reason)
        new: list[gs.Node] = []
        residual, start = 0.0, 0
        for output, count in zip(split.outputs, counts, strict=True):
            rows, start = slice(start, start + count), start + count
            if not rw.readers(output) and not rw.pinned(output):
                continue
            made = self._part(rw, reading, linear, rows, steps, output)
            if isinstance(made, Refusal):
                return Skip(made.reason)
            new += made[0]
            residual = max(residual, made[1])
        old = [*reading.nodes, *(n for step in steps for n in step.nodes), split]
        done = rw.replace(old, new, f"{widths} as maps of their own, instead of one and a Split", residual)
        kept = tuple((str(t.name), str(t.name)) for t in split.outputs if t.name)
        return replace(done, became=kept).signed(f"split results: {describe_map(rw, reading, widths)}")

    def _part(
        self, rw: Rewriter, reading: Reading, linear: LinearMap, rows: slice, steps: list[Step], output: gs.Tensor
    ) -> tuple[list[gs.Node], float] | Refusal:
        """Nodes for one part of the result, and what rounding did to its weights."""
        count = rows.stop - rows.start
        part = LinearMap.of(replace(linear.geometry, out_channels=count), linear.weight[rows], linear.bias[rows])
        axis = reading.axis or 0
        ends = [rw.new_variable(f"{s.output.name}_part", s.output, channels(axis, count)) for s in steps[:-1]]
        first = (
            rw.new_variable(f"{reading.output.name}_part", reading.output, channels(axis, count)) if steps else output
        )
        written = emit.write(rw, part, reading, reading.source, first, reading.axis, inherit=False)
        if isinstance(written, Refusal):
            return written
        nodes, last = list(written.nodes), first
        for step, end in zip(steps, [*ends, output], strict=False):
            nodes += repeated(rw, step, last, end)
            last = end
        return nodes, written.residual
