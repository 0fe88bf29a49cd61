"""Depthwise multiplier splitting: a convolution with m filters per channel becomes m plain depthwise ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pwopt.algebra.linear import LinearMap
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.reasons import Reason
from pwopt.graph.shapes import set_channels
from pwopt.maps import forms
from pwopt.maps.channels import Analysis, Channels, has_multiplier
from pwopt.maps.forms import Reading
from pwopt.maps.scans import Unread
from pwopt.rewriting.builder import Builder
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.rechannel import find_runs, rechannel
from pwopt.rewriting.records import Rewrite, Skip


class SplitMultiplier(Pass):
    """W ∗ x = P·concat(W₁ ∗ x, …, Wₘ ∗ x) where Wⱼ holds the j-th filter of each channel

    * The permutation P of channels moves through operators that act on channels one by one, into the columns of the
      next dense maps (`pwopt.maps.channels`).
    * No operator on this way splits the channels or sums only some of them. No weight is shared.

    Execution providers have fast kernels for depthwise convolutions with one filter per channel. Patch embeddings and
    downsampling layers with m filters per channel run on slow ones.
    """

    name = "split-multiplier"
    operators = frozenset({"Conv"})
    policy = "measured"
    pays_on = frozenset({"cpu", "other"})  # graphics cards have no blocked layout

    def start(self, rw: Rewriter) -> None:
        self._places: dict[Tensor, tuple[list[Channels], Analysis]] = {}
        if not any(_read_multiplier(rw, n) for n in rw.nodes()):
            return
        analysis = Analysis(rw, Unread())
        for component in analysis.components():
            self._places.update({c.tensor: (component, analysis) for c in component})

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        reading = _read_multiplier(rw, node)
        if reading is None:
            return None
        what = f"{reading.channels} depthwise"
        if reading.output not in self._places:
            return Skip(f"{what}: its weight is shared")
        component, analysis = self._places[reading.output]
        places = find_runs(analysis, component)
        first, count = places[reading.output][0], reading.geometry.out_channels
        obstacle = analysis.held(component, but=reading.output)
        if obstacle or first.stop < count:
            obstacle = obstacle or "they are split, or some of them are summed"
            return Skip(Reason("{}: its channels cannot be reordered, because {}", what, obstacle))
        if not self.eager:
            return Skip(f"{what} could be several plain depthwise convolutions; only measuring can tell")
        linear = reading.load()
        order = np.arange(count).reshape(reading.geometry.groups, -1).T.reshape(-1)
        takes = {
            t: np.concatenate(
                [r.start + (order if r.kind == first.kind else np.arange(r.stop - r.start)) for r in parts]
            )
            for t, parts in places.items()
        }
        reordered = rechannel(rw, analysis, component, takes, "", "_reordered", but=node)
        for c in component:
            self._places.pop(c.tensor)
        split = self._split(rw, reading, linear)
        parts = len(split.added) - 1
        done = Rewrite.of(f"{what} runs as {parts} with {reading.geometry.groups} channels each", [reordered, split])
        return done.with_signature(f"{what} at {rw.size_of(reading.output)}")

    def _split(self, rw: Rewriter, reading: Reading, linear: LinearMap) -> Rewrite:
        g, output = linear.geometry, reading.output
        multiplier, narrow = g.out_channels // g.groups, replace(g, out_channels=g.groups)
        builder = Builder(rw)
        for j in range(multiplier):
            part = rw.new_variable(f"{output.name}_part", output, set_channels(1, g.groups))
            one = LinearMap.of(narrow, linear.weight[j::multiplier], linear.bias[j::multiplier])
            builder.add_map(one, reading, reading.source, part)
        parts = [n.outputs[0] for n in builder.nodes]
        builder.nodes.append(Node("Concat", reading.node.name, {"axis": 1}, parts, [output]))
        return rw.replace(reading.nodes, builder.nodes, "", builder.residual)


def _read_multiplier(rw: Rewriter, node: Node) -> Reading | None:
    """A depthwise convolution with a channel multiplier; None for any other node."""
    reading = forms.linear(rw, node) if rw.is_a(node, "Conv") else None
    return reading if reading is not None and has_multiplier(reading) else None
