"""Reductions and softmaxes over the channels, and what follows them, run channels-last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from pwopt.algebra import Values
from pwopt.algebra.linear import LinearMap
from pwopt.algebra.unions import Unions
from pwopt.graph import attributes
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.shapes import Shape
from pwopt.maps import emit, forms
from pwopt.maps.forms import Reading
from pwopt.rewriting.carry import BY_AXES, Member, See, along, carry, data, reduces_since, rewritten
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.wording import counted

#: Channels to the end, and back, of feature maps.
LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
#: Operators that combine all channels at each position.
SOFTMAXES = ("Softmax", "LogSoftmax", "Hardmax")
PICKS = ("ArgMax", "ArgMin")
REDUCTIONS = tuple(op for op in BY_AXES if op.startswith("Reduce"))


@dataclass(frozen=True)
class Last:
    """(N, C, *space) seen as (N, *space, C)."""

    rank: int
    suffix = "_last"

    @property
    def perm(self) -> list[int]:
        return [0, *range(2, self.rank), 1]

    def axis(self, axis: int) -> int:
        return self.perm.index(axis % self.rank)

    def operand(self, shape: Sequence[int]) -> tuple[int, ...]:
        full = (*(1,) * (self.rank - len(shape)), *shape)
        moved = [full[a] for a in self.perm]
        return tuple(moved[next((i for i, d in enumerate(moved) if d != 1), self.rank) :])

    def turned(self, values: Values) -> Values:
        full = values.reshape((1,) * (self.rank - values.ndim) + values.shape)
        return np.ascontiguousarray(full.transpose(self.perm)).reshape(self.operand(values.shape))

    def shape(self, shape: Shape) -> Shape:
        return tuple(shape[a] for a in self.perm)

    def change(self, rw: Rewriter, source: Tensor, output: Tensor, *, enter: bool) -> list[Node]:
        perm = self.perm if enter else [self.perm.index(a) for a in range(self.rank)]
        return [Node("Transpose", rw.node_name(str(output.name), "_transpose"), {"perm": perm}, [source], [output])]


@dataclass
class Region:
    """Operators that run channels-last together, and those among them that combine channels."""

    members: list[Member[Last]] = field(default_factory=list)
    anchors: list[Node] = field(default_factory=list)


class ChannelsLast(Pass):
    """f(x, axis 1) = Tᵀ(f(Tx, axis −1)) for T, which moves the channels to the end, and regions f of operators.

    A reduction or a softmax across channels strides through memory; along the last axis it runs at full speed, and a
    pointwise map is a matrix product there. What combines channels is carried over together with all that follows it
    and can be (elementwise operators, pointwise maps, sums), with one T on each way in and one on each way out; a
    Transpose that is there takes T over (`clean-up`). The distribution heads of YOLOv8, v9 and v11 take the expectation
    of a softmax so (Li et al., "Generalized Focal Loss", 2020); normalisations over channels (Ba et al., "Layer
    Normalization", 2016) on feature maps, in ConvNeXt, NAFNet and the neck of Segment Anything, are nine operators,
    which providers fuse along the last axis only; segmentation heads end in a softmax or an ArgMax.
    """

    name = "channels-last"
    policy = "measured"

    def start(self, rw: Rewriter) -> None:
        self._roots = {r.members[0][0]: r for r in _regions(rw)}

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        region = self._roots.pop(node, None)
        if region is None:
            return None
        what = counted(len(region.anchors), "operator") + " over channels"
        if not self.eager:
            return Skip(f"{what} could run channels-last; only measuring can tell")

        kinds = ", ".join(f"{n} {op}" for op, n in sorted(Counter(rw.op(a) for a in region.anchors).items()))
        size = rw.size_of(region.anchors[0].inputs[0])
        others = counted(len(region.members) - len(region.anchors), "other")
        done = carry(rw, region.members, partial(_written, rw), f"{what} and {others} run channels-last")
        return done.signed(f"{kinds} over channels: with {others} at {size}")


def _regions(rw: Rewriter) -> list[Region]:
    """What combines channels, with all that follows it and can be carried over."""
    found: dict[Node, Member[Last]] = {}
    anchors: dict[Node, None] = {}
    made: set[Tensor] = set()
    nodes = rw.nodes()
    for node in nodes:
        last = _last(rw, node)
        if last is None:
            continue
        combines = _anchor(rw, node)
        if not (combines or any(t in made for t in node.inputs)) or not _moves(rw, node, last):
            continue
        found[node] = (node, last)
        made.update(t for t in node.outputs if rw.rank(t) == last.rank)
        if combines:
            anchors[node] = None
    if not found:
        return []
    entered = {t for node, _ in found.values() for t in data(rw, node)}
    for node in reversed(nodes):  # x² before its mean, where x itself comes in as well: one way in instead of two
        last = _last(rw, node) if node not in found and rw.op(node) in BY_AXES else None
        if last is None or not _moves(rw, node, last):
            continue
        readers = [r for t in node.outputs for r in rw.readers(t)]
        inside = readers and all(r in found for r in readers)
        if inside and any(t in entered for t in node.inputs):
            found[node] = (node, last)
    return list(_connected(rw, [found[n] for n in nodes if n in found], anchors))


def _connected(rw: Rewriter, members: Iterable[Member[Last]], anchors: dict[Node, None]) -> Iterator[Region]:
    """Members that share a tensor, in order."""
    members, sets = list(members), Unions[Node | Tensor]()
    for node, last in members:
        for t in (*data(rw, node), *node.outputs):
            if t.name and rw.rank(t) == last.rank:
                sets.join(node, t)
    regions: dict[Node | Tensor, Region] = {}
    for node, last in members:
        region = regions.setdefault(sets.root(node), Region())
        region.members.append((node, last))
        region.anchors += [node] if node in anchors else []
    return iter(r for r in regions.values() if r.anchors)


def _last(rw: Rewriter, node: Node) -> Last | None:
    """The view of what a node computes from; None if there are several ranks, or no space besides channels."""
    ranks = {rw.rank(t) for t in data(rw, node)}
    rank = ranks.pop() if len(ranks) == 1 else None
    return Last(rank) if rank is not None and rank >= 3 else None


def _anchor(rw: Rewriter, node: Node) -> bool:
    """Whether an operator combines the channels, several of them, and nothing else."""
    op, axes = rw.op(node), None
    if op in SOFTMAXES:
        axes = [node.attrs.get("axis", -1)]
    elif op in PICKS:
        axes = [node.attrs.get("axis", 0)]
    elif op in REDUCTIONS:
        axes = attributes.axes_of(rw, node, reduces_since(node))
    shape = rw.shape(node.inputs[0]) or ()
    if [a % len(shape) for a in axes or ()] != [1]:
        return False
    return isinstance(shape[1], int) and shape[1] > 1 and any(d != 1 for d in shape[2:])


def _map(rw: Rewriter, node: Node) -> Reading | None:
    """A convolution that becomes a matrix product."""
    reading = forms.linear(rw, node) if rw.is_a(node, "Conv") else None
    return reading if reading is not None and reading.geometry.pointwise and reading.geometry.groups == 1 else None


def _moves(rw: Rewriter, node: Node, last: Last) -> bool:
    """Whether an operator can be carried over: its outputs are seen as its inputs are, or have lost the channels."""
    op, ranks = rw.op(node), {rw.rank(t) if t.name else None for t in node.outputs}
    if op in SOFTMAXES and rw.opset < 13:  # over all axes from there on
        return False
    if op in (*PICKS, *REDUCTIONS) and not node.attrs.get("keepdims", 1):
        return _anchor(rw, node)
    if ranks != {last.rank}:
        return False
    if op == "Conv":
        reading = _map(rw, node)
        if reading is None or rw.shared(reading.weight_input) or rw.opset < 7:  # the bias of a product broadcasts
            return False
        return isinstance(reading.load(), LinearMap)
    return op in PICKS or (op in BY_AXES and BY_AXES[op](rw, last, node) is not None)


def _written(rw: Rewriter, node: Node, last: Last, see: See, outputs: list[Tensor]) -> Sequence[Node]:
    op, channels = rw.op(node), last.rank - 1
    reading = _map(rw, node)
    if reading is not None:
        linear, source = reading.load(), see(reading.source)
        assert isinstance(linear, LinearMap)
        written = emit.write(rw, linear.at_rank(0), replace(reading, kind="matmul"), source, outputs[0], channels)
        assert isinstance(written, emit.Written)
        return written.nodes
    if op in PICKS:
        attrs = {**node.attrs, "axis": last.axis(node.attrs.get("axis", 0))}
        return [Node(op, node.name, attrs, [see(node.inputs[0])], outputs)]
    lost = not node.attrs.get("keepdims", 1)
    arguments = along(rw, node, [channels]) if lost else BY_AXES[op](rw, last, node)
    assert arguments is not None
    return rewritten(rw, node, arguments, last, see, outputs)
