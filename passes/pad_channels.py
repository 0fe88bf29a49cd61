"""Channel padding: channels of zeros fill channel counts up to a multiple that the execution provider runs fast."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import ml_dtypes
import numpy as np

from pwopt.graph.ir import Node, Tensor
from pwopt.graph.operators import ACTIVATIONS, WHOLE_BLOCKS
from pwopt.graph.reasons import Reason
from pwopt.maps import commute, forms
from pwopt.maps.channels import Analysis, Channels, Flow
from pwopt.maps.scans import Unread
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.rechannel import Take, find_first_producer, find_runs, rechannel
from pwopt.rewriting.records import Rewrite, Skip

#: Channels per block of onnxruntime's CPU provider with AVX-512. With AVX2, it has 8.
BLOCK = 16
#: What operators that combine tensors elementwise do to two numbers. (Div is missing, because 0/0 is NaN.)
COMBINE: dict[str, Callable[[float, float], float]] = {
    "Add": operator.add, "Sum": operator.add, "Sub": operator.sub, "Mul": operator.mul,
}  # fmt: skip
#: Passes that turn convolutions of lines and videos into those of images, for which there is a blocked layout.
ENABLING = ("unroll-frames", "frames", "lower-rank")
#: The types that tensor cores multiply.
HALVES = frozenset((np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)))
#: The largest value that a new channel may hold, far below the overflow of any type.
MAX_PADDED_VALUE = 2.0**12


class PadChannels(Pass):
    """Wx = (W 0)·(x, 0): a channel of zeros with weights of zero has no effect

    * Filters of zeros compute the new channels. They pass activations, normalisations, depthwise convolutions, pooling,
      gates, residual sums and Concat (`pwopt.maps.channels`), up to the maps that multiply them by zero.
    * A new channel must stay small on its way, because infinity times a weight of zero is NaN.
    * All tensors are inside the model, so that the shapes of inputs and outputs stay.
    * Convolutions of lines and videos gain only together with a pass that writes them as convolutions of images.

    onnxruntime's CPU provider runs a convolution in its blocked layout only if it reads a multiple of 4 channels. Inner
    widths such as 27 or 162 get a few channels more.
    """

    name = "pad-channels"
    policy = "measured"
    pays_on = frozenset({"cpu", "other"})  # graphics cards have no blocked layout
    #: Channel counts become multiples of this number.
    multiple: ClassVar[int] = 4

    def start(self, rw: Rewriter) -> None:
        self._pending: dict[Tensor, tuple[list[Channels], set[Tensor], Analysis]] = {}
        self._unfollowed: dict[Tensor, Tensor] = {}
        uneven_inputs = [(n, t) for n in rw.nodes() for t in self._find_uneven(rw, n)]
        self._uneven = {t: t for _, t in uneven_inputs if rw.producer(t) is not None}
        self._images = {t for _, t in uneven_inputs if rw.rank(t) == 4}
        uneven = set(self._uneven)
        if not uneven or not self.eager:
            return
        analysis = Analysis(rw, Unread())
        for component in analysis.components():
            asking = uneven.intersection(c.tensor for c in component)
            first = find_first_producer(rw, component)
            if asking and first is not None:
                self._pending[first.outputs[0]] = (component, asking, analysis)
        self._unfollowed = {i: t for i, t in self._uneven.items() if i not in analysis.of}

    def select_nodes(self, nodes: Sequence[Node]) -> Sequence[Node]:
        known = self._pending.keys() | self._unfollowed.keys() | self._uneven.keys()
        return [node for node in nodes if not known.isdisjoint(node.outputs)]

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        for t in node.outputs:
            if t in self._pending:
                return self._pad(rw, *self._pending.pop(t))
            what = f"{rw.dim(t, 1)} channels could be padded to a multiple of {self.multiple}"
            if t in self._unfollowed:
                return Skip(Reason("{}, but pwopt cannot follow channels through {} {!r}", what, node.op, node.name))
            if t in self._uneven and not self.eager:
                return Skip(f"{what}; only measuring can tell")
        return None

    def _find_uneven(self, rw: Rewriter, node: Node) -> list[Tensor]:
        """The inputs of an operator that would run faster with more channels."""
        reading = forms.linear(rw, node) if rw.is_a(node, "Conv") else None
        if reading is None or reading.geometry.in_channels % self.multiple == 0:
            return []
        g = reading.geometry
        return [reading.source] if g.groups > 1 or g.in_channels > BLOCK else []

    def _pad(
        self, rw: Rewriter, component: list[Channels], uneven: Collection[Tensor], analysis: Analysis
    ) -> Rewrite | Skip:
        obstacle = analysis.held(component) or _find_overflow(rw, analysis, component)
        takes = _add_zeros(analysis, component, uneven, self.multiple)
        widths = sorted({(len(c.value), len(takes[c.tensor])) for c in component})
        change = ", ".join(f"{old}→{new}" for old, new in widths if old != new)
        if obstacle:
            return Skip(
                Reason("{} channels could be padded to multiples of {}, but {}", change, self.multiple, obstacle)
            )
        reason = f"channels of zeros added: {change} in {len(component)} tensors, for multiples of {self.multiple}"
        done = rechannel(rw, analysis, component, takes, reason, "_padded").with_signature(f"more channels: {change}")
        return done if self._images.intersection(uneven) else replace(done, enabled_by=ENABLING)


class FillBlocks(PadChannels):
    """Wx = (W 0)·(x, 0), for multiples of 16 channels

    As `pad-channels`, for poolings and Concats: onnxruntime's CPU provider runs them in its blocked layout only if all
    blocks of 16 channels are full.
    """

    name = "fill-blocks"
    multiple = BLOCK

    def _find_uneven(self, rw: Rewriter, node: Node) -> list[Tensor]:
        blocked = [t for t in node.inputs if rw.rank(t) == 4] if rw.is_a(node, *WHOLE_BLOCKS) else []
        return [t for t in blocked if isinstance(count := rw.dim(t, 1), int) and count % BLOCK]


class FillTensorCores(PadChannels):
    """Wx = (W 0)·(x, 0), for multiples of 8 channels in float16

    As `pad-channels`, for convolutions on NVIDIA's tensor cores. With other channel counts, they run on slower units or
    are padded at every run (NVIDIA Deep Learning Performance documentation, "Convolutional layers user's guide", on
    channels in and out).
    """

    name = "fill-tensor-cores"
    pays_on = frozenset({"gpu"})
    multiple = 8

    def _find_uneven(self, rw: Rewriter, node: Node) -> list[Tensor]:
        reading = forms.linear(rw, node) if rw.is_a(node, "Conv") else None
        if reading is None or len(reading.geometry.kernel) != 2 or rw.dtype(reading.output) not in HALVES:
            return []
        g = reading.geometry
        uneven = g.groups == 1 and g.in_channels > self.multiple and g.in_channels % self.multiple
        return [reading.source] if uneven else []


def _add_zeros(
    analysis: Analysis, component: Sequence[Channels], uneven: Collection[Tensor], multiple: int
) -> dict[Tensor, Take]:
    """The new channels of each tensor: zeros after every run of channels that some tensor needs as a multiple."""
    found = find_runs(analysis, component)
    kinds = {run.kind for tensor in uneven for run in found[tensor]}
    return {
        tensor: np.concatenate(
            [np.r_[r.start : r.stop, [-1] * (-(r.stop - r.start) % multiple * (r.kind in kinds))] for r in parts]
        ).astype(np.intp)
        for tensor, parts in found.items()
    }


def _find_overflow(rw: Rewriter, analysis: Analysis, component: Sequence[Channels]) -> str:
    """Why a new channel may not stay small on its way, else ""."""
    holds: dict[Tensor, set[float]] = {}
    for flow in analysis.flows_at(component):
        values = _find_values(rw, analysis, flow, holds)
        if values is None or any(not abs(v) <= MAX_PADDED_VALUE for v in values):
            return Reason("{} {!r} may turn zeros into large values", flow.node.op, flow.node.name)
        for t in flow.reading.nodes[-1].outputs if flow.reading is not None else flow.node.outputs:
            holds[t] = values
    return ""


def _find_values(rw: Rewriter, analysis: Analysis, flow: Flow, holds: Mapping[Tensor, set[float]]) -> set[float] | None:
    """The values of new channels after an operator, from those before it; None if they are not known."""
    node, reading = flow.node, flow.reading
    if reading is not None:
        step = reading.try_load() if reading.kind == "diagonal" else None
        known = analysis.of.get(reading.output)
        if step is None or known is None:
            return {0.0}
        if reading.axis is not None and len(step.weight) == len(
            known.value
        ):  # new channels get a scale and shift of zero
            return {0.0}
        return {float(step.scale[0] * v + step.bias[0]) for v in holds[reading.source]}
    parts = [holds[t] for t in node.inputs if t in holds]
    op = rw.op(node)
    if op in ("Concat", "Split"):
        return set().union(*parts)
    if op in COMBINE:
        return {float(functools.reduce(COMBINE[op], values)) for values in itertools.product(*parts)}
    if len(parts) != 1:
        return None
    if op in ACTIVATIONS:
        return {float(v) for v in analysis.evaluate(node, np.array(sorted(parts[0])))}
    rule = commute.rule(rw, node)
    return parts[0] if rule is not None and (rule.shift or parts[0] == {0.0}) else None
