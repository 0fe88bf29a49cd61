"""Channels-last layout: reductions and softmaxes over channels run along the last axis (layout propagation)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from pwopt.algebra import Values
from pwopt.graph import attributes
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.operators import REDUCTIONS, SOFTMAXES
from pwopt.graph.shapes import Shape
from pwopt.maps import emit, forms
from pwopt.maps.forms import Reading
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.layouts import BY_AXES, InLayout, data_inputs, propagate_layout, reduce_axes, rewrite_operator
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.regions import Region, find_regions
from pwopt.rewriting.wording import format_count

#: Permutations that move the channels of feature maps to the last axis, and back.
LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
#: Operators that combine all channels at each position.
PICKS = ("ArgMax", "ArgMin")


@dataclass(frozen=True)
class Last:
    """The layout (N, *space, C) for tensors (N, C, *space)."""

    rank: int
    suffix = "_last"

    @property
    def perm(self) -> list[int]:
        return [0, *range(2, self.rank), 1]

    def axis(self, axis: int) -> int:
        return self.perm.index(axis % self.rank)

    def operand_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        full = (*(1,) * (self.rank - len(shape)), *shape)
        moved = [full[a] for a in self.perm]
        return tuple(moved[next((i for i, d in enumerate(moved) if d != 1), self.rank) :])

    def convert(self, values: Values) -> Values:
        full = values.reshape((1,) * (self.rank - values.ndim) + values.shape)
        return np.ascontiguousarray(full.transpose(self.perm)).reshape(self.operand_shape(values.shape))

    def shape(self, shape: Shape) -> Shape:
        return tuple(shape[a] for a in self.perm)

    def write_conversion(self, rw: Rewriter, source: Tensor, output: Tensor, *, enter: bool) -> list[Node]:
        perm = self.perm if enter else [self.perm.index(a) for a in range(self.rank)]
        return [Node("Transpose", rw.node_name(str(output.name), "_transpose"), {"perm": perm}, [source], [output])]


class ChannelsLast(Pass):
    """f(x, axis 1) = Tᵀ(f(Tx, axis −1)) where T moves the channels to the last axis and f is a region of operators

    * Every region contains a reduction, softmax or ArgMax over several channels and over no other axis.
    * The operators after it join the region if they only need another axis: elementwise operators, sums, Concat,
      pointwise convolutions with their own weights (they become matrix products).
    * One Transpose stands at each entry and at each exit. `join-views` and `clean-up` remove those that meet others.

    A reduction over channels strides through memory; along the last axis it runs at full speed. The distribution heads
    of YOLOv8, v9 and v11 take the expectation of a softmax over channels (Li et al., "Generalized Focal Loss", 2020).
    Normalisations over the channels of feature maps, in ConvNeXt, NAFNet and the neck of Segment Anything, are nine
    operators that providers fuse only along the last axis (Ba et al., "Layer Normalization", 2016). Segmentation heads
    end in a softmax or an ArgMax.
    """

    name = "channels-last"
    policy = "measured"

    def start(self, rw: Rewriter) -> None:
        self._layouts = _find_members(rw)
        self._roots: dict[Node, tuple[Region, list[Node]]] = {}
        for region in find_regions({n: _find_shared(rw, n, last) for n, last in self._layouts.items()}):
            anchors = [n for n in region.nodes if _combines_channels(rw, n)]
            if anchors:
                self._roots[region.nodes[0]] = region, anchors

    def select_nodes(self, nodes: Sequence[Node]) -> Sequence[Node]:
        return [node for node in nodes if node in self._roots]

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        if node not in self._roots:
            return None
        region, anchors = self._roots.pop(node)
        what = format_count(len(anchors), "operator") + " over channels"
        if not self.eager:
            return Skip(f"{what} could run channels-last; only measuring can tell")

        kinds = ", ".join(f"{n} {op}" for op, n in sorted(Counter(rw.op(a) for a in anchors).items()))
        size = rw.size_of(anchors[0].inputs[0])
        others = format_count(len(region.nodes) - len(anchors), "other")
        members = [(n, self._layouts[n]) for n in region.nodes]
        done = propagate_layout(rw, members, partial(_write, rw), f"{what} and {others} run channels-last")
        return done.with_signature(f"{kinds} over channels: with {others} at {size}")


def _find_members(rw: Rewriter) -> dict[Node, Last]:
    """The operators that combine channels, with those after (and before) them that can run channels-last."""
    found: dict[Node, Last] = {}
    results: set[Tensor] = set()
    nodes = rw.nodes()
    for node in nodes:
        last = _find_layout(rw, node)
        if last is None:
            continue
        combines = _combines_channels(rw, node)
        if not (combines or any(t in results for t in node.inputs)) or not _can_run(rw, node, last):
            continue
        found[node] = last
        results.update(t for t in node.outputs if rw.rank(t) == last.rank)
    entered = {t for node in found for t in data_inputs(rw, node)}
    # An operator before the region joins it if the region reads its input too, such as x² before a mean where x is
    # read as well. That saves one of two entries.
    for node in reversed(nodes) if found else ():
        last = _find_layout(rw, node) if node not in found and rw.op(node) in BY_AXES else None
        if last is None or not _can_run(rw, node, last):
            continue
        readers = [r for t in node.outputs for r in rw.readers(t)]
        inside = readers and all(r in found for r in readers)
        if inside and any(t in entered for t in node.inputs):
            found[node] = last
    return {n: found[n] for n in nodes if n in found}


def _find_shared(rw: Rewriter, node: Node, last: Last) -> list[Tensor]:
    """The tensors of an operator that the layout changes."""
    return [t for t in (*data_inputs(rw, node), *node.outputs) if t.name and rw.rank(t) == last.rank]


def _find_layout(rw: Rewriter, node: Node) -> Last | None:
    """The layout for the inputs of a node; None if their ranks differ, or if they have no spatial axis."""
    ranks = {rw.rank(t) for t in data_inputs(rw, node)}
    rank = ranks.pop() if len(ranks) == 1 else None
    return Last(rank) if rank is not None and rank >= 3 else None


def _combines_channels(rw: Rewriter, node: Node) -> bool:
    """Whether an operator combines several channels, at each of several positions separately."""
    op, axes = rw.op(node), None
    if op in SOFTMAXES:
        axes = [node.attrs.get("axis", -1)]
    elif op in PICKS:
        axes = [node.attrs.get("axis", 0)]
    elif op in REDUCTIONS:
        axes = attributes.read_axes(rw, node)
    shape = rw.shape(node.inputs[0]) or ()
    if [a % len(shape) for a in axes or ()] != [1]:
        return False
    return isinstance(shape[1], int) and shape[1] > 1 and any(d != 1 for d in shape[2:])


def _read_pointwise(rw: Rewriter, node: Node) -> Reading | None:
    """A convolution that becomes a matrix product; None for any other node."""
    reading = forms.linear(rw, node) if rw.is_a(node, "Conv") else None
    return reading if reading is not None and reading.geometry.pointwise and reading.geometry.groups == 1 else None


def _can_run(rw: Rewriter, node: Node, last: Last) -> bool:
    """Whether an operator can run in the layout: its outputs have the layout of its inputs, or have no channels."""
    op, ranks = rw.op(node), {rw.rank(t) if t.name else None for t in node.outputs}
    if op in SOFTMAXES and rw.opset < 13:  # they normalise over all axes from `axis` on
        return False
    if op in (*PICKS, *REDUCTIONS) and not node.attrs.get("keepdims", 1):
        return _combines_channels(rw, node)
    if ranks != {last.rank}:
        return False
    if op == "Conv":
        reading = _read_pointwise(rw, node)
        if reading is None or rw.is_shared(reading.weight_input) or rw.opset < 7:  # its bias needs broadcasting
            return False
        return reading.try_load() is not None
    return op in PICKS or (op in BY_AXES and BY_AXES[op](rw, last, node) is not None)


def _write(rw: Rewriter, node: Node, last: Last, in_layout: InLayout, outputs: list[Tensor]) -> Sequence[Node]:
    """The operators that compute `node` in the layout."""
    op, channels = rw.op(node), last.rank - 1
    reading = _read_pointwise(rw, node)
    if reading is not None:
        linear, source = reading.load(), in_layout(reading.source)
        written = emit.write(rw, linear.at_rank(0), replace(reading, kind="matmul"), source, outputs[0], channels)
        return written.nodes
    if op in PICKS:
        attrs = {**node.attrs, "axis": last.axis(node.attrs.get("axis", 0))}
        return [Node(op, node.name, attrs, [in_layout(node.inputs[0])], outputs)]
    loses_channels = not node.attrs.get("keepdims", 1)
    arguments = reduce_axes(rw, node, [channels]) if loses_channels else BY_AXES[op](rw, last, node)
    assert arguments is not None
    return rewrite_operator(rw, node, arguments, last, in_layout, outputs)
