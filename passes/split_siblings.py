"""Horizontal splitting: a map whose result is split becomes several maps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pwopt.algebra.linear import LinearMap
from pwopt.graph import attributes
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.operators import ACTIVATIONS, ARITHMETIC
from pwopt.graph.reasons import Reason
from pwopt.graph.shapes import set_channels
from pwopt.maps import commute, emit, forms, selections
from pwopt.maps.forms import Reading, describe_map
from pwopt.rewriting.builder import Builder
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip

#: The largest number of operators between the maps and the Split. Each is repeated for every part.
MAX_BETWEEN = 32


class SplitSiblings(Pass):
    """split(f((W₁; W₂; …)x)) = (f(W₁x), f(W₂x), …) for any f that acts on channels one by one

    * Dense maps compute everything that reaches the Split, and f consists of activations, sums of several maps, pooling
      and upsampling.
    * Nothing else reads the tensors between them, and no weight is shared.
    * Slices that read separate channels of one tensor count as one Split.

    This is the inverse of `merge-siblings`. A Split leaves the provider's blocked layout, and so does the Concat that
    often follows. The blocks of CSPNet (Wang et al., 2020), and C2f and C3k2 of YOLOv8 and v11, split the result of a
    1×1 convolution, work on one half, and join all parts again. In gated units, as in WaveNet, one
    half passes Tanh and the other Sigmoid, which fuse into convolutions of their own.
    """

    name = "split-siblings"
    operators = frozenset({"Slice", "Split"})
    policy = "measured"

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        cut = _read_cut(rw, node)
        if cut is None:
            return None
        axis, counts = cut.axis, [rows.stop - rows.start for rows in cut.rows]
        found = _find_sources(rw, cut.tensor, axis, cut.channels)
        if found is None:
            return None
        maps = [f for f in found if isinstance(f, Reading) and f.geometry.groups == 1 and f.weighted]
        inside = {n for f in found for n in (f.nodes if isinstance(f, Reading) else (f,))} | {*cut.nodes}
        widths = f"{maps[0].geometry.in_channels}→({', '.join(map(str, counts))})"
        for f in found:
            tensor = f.output if isinstance(f, Reading) else f.outputs[0]
            if rw.must_keep(tensor) or any(n not in inside for n in rw.readers(tensor)):
                return None
        shared = [m.weight_input.name for m in maps if rw.is_shared(m.weight_input)]
        if shared:
            return Skip(Reason("{}: the weight {!r} is shared", widths, shared[0]))
        if not self.eager:
            return Skip(f"{widths} could be separate maps, without the {node.op}; only measuring can tell")
        reason = f"{widths} runs as separate maps, without the {node.op}"
        old = [n for f in found for n in (f.nodes if isinstance(f, Reading) else (f,))]
        parts: dict[Node, Builder] = {}
        for output, rows, reader in zip(cut.outputs, cut.rows, cut.nodes, strict=True):
            builder = parts.setdefault(reader, Builder(rw))
            if rw.readers(output) or rw.must_keep(output):
                _add_part(builder, found, axis, rows, cut.tensor, output)
        records = [  # each Slice is replaced where it stands
            rw.replace([*(old if reader is cut.nodes[-1] else ()), reader], builder.nodes, reason, builder.residual)
            for reader, builder in parts.items()
        ]
        return Rewrite.of(reason, records).with_signature(f"split results: {describe_map(rw, maps[0], widths)}")


@dataclass(frozen=True)
class _Cut:
    """A tensor whose channels are cut into ranges, by one Split or by several Slices.

    Attributes
    ----------
    tensor : Tensor
    axis, channels : int
    outputs : tuple of Tensor
    rows : tuple of slice
        The range of channels of each output.
    nodes : tuple of Node
        The operator that computes each output.
    """

    tensor: Tensor
    axis: int
    channels: int
    outputs: tuple[Tensor, ...]
    rows: tuple[slice, ...]
    nodes: tuple[Node, ...]


def _read_cut(rw: Rewriter, node: Node) -> _Cut | None:
    """The cut to which a Split or the first of several Slices belongs."""
    if rw.is_a(node, "Slice"):
        return _read_slices(rw, node)
    parts = selections.read_split(rw, node) if rw.is_a(node, "Split") else None
    if parts is None or parts[0].axis is None:
        return None
    ends = list(itertools.accumulate(p.geometry.out_channels for p in parts))
    rows = tuple(slice(end - p.geometry.out_channels, end) for end, p in zip(ends, parts, strict=True))
    return _Cut(node.inputs[0], parts[0].axis, ends[-1], tuple(node.outputs), rows, (node,) * len(rows))


def _read_slices(rw: Rewriter, first: Node) -> _Cut | None:
    """Slices that are all readers of a tensor, and read no more channels together than it has."""
    tensor = first.inputs[0]
    readers = rw.readers(tensor)
    if len(readers) < 2 or readers[0] is not first or not all(rw.is_a(n, "Slice") for n in readers):
        return None
    found = [attributes.read_slice_parameters(rw, n) for n in readers]
    axes = {p[0][0] for p in found if p is not None and len(p) == 1 and p[0][3] == 1}
    channels = rw.dim(tensor, axis) if len(axes) == 1 and (axis := next(iter(axes))) else None
    if not isinstance(channels, int) or any(p is None or len(p) != 1 or p[0][3] != 1 for p in found):
        return None
    rows = tuple(slice(*slice(start, end).indices(channels)[:2]) for p in found if p for _, start, end, _ in p)
    counts = [r.stop - r.start for r in rows]
    if min(counts) < 1 or sum(counts) > channels:
        return None
    return _Cut(tensor, axis, channels, tuple(n.outputs[0] for n in readers), rows, tuple(readers))


def _find_sources(rw: Rewriter, tensor: Tensor, axis: int, count: int) -> list[Reading | Node] | None:
    """The dense maps from which a tensor is computed and all operators after them, in order; None if others are."""
    found: dict[Node, Reading | Node] = {}
    pending = [tensor]
    while pending:
        t = pending.pop()
        maker = rw.producer(t)
        if maker is None or rw.dim(t, axis) != count or len(found) > MAX_BETWEEN:
            return None
        if maker in found:
            continue
        reading = forms.linear(rw, maker)
        if reading is not None and reading.output is t and reading.axis == axis and _has_separate_rows(reading, count):
            found[maker] = reading
            pending += [] if reading.geometry.groups == 1 else [reading.source]
            continue
        sources = _find_operands(rw, maker, axis)
        if sources is None:
            return None
        found[maker] = maker
        pending += sources
    return sorted(found.values(), key=lambda f: rw.position(f.node if isinstance(f, Reading) else f))


def _has_separate_rows(reading: Reading, count: int) -> bool:
    """Whether the outputs of a map can be computed separately: it is dense, or acts on channels one by one."""
    g = reading.geometry
    dense = reading.weighted and g.groups == 1
    single = reading.kind in emit.WRITERS and g.groups == g.in_channels == count > 1
    return dense or single


def _find_operands(rw: Rewriter, node: Node, axis: int) -> list[Tensor] | None:
    """The data inputs of an operator that treats all channels alike, one by one; None for any other node."""
    op, first = rw.op(node), node.inputs[:1]
    if op in ARITHMETIC and rw.opset >= 7:
        rank, computed = rw.rank(node.outputs[0]), [t for t in node.inputs if rw.constant(t) is None]
        if len(computed) == len(node.inputs) and all(rw.rank(t) == rank for t in node.inputs):
            return list(node.inputs)
        return computed if len(computed) == 1 and all(rw.elements(t) in (None, 1) for t in node.inputs) else None
    if len([t for t in node.outputs if t.name]) != 1 or not first:
        return None
    if op in ACTIVATIONS:
        return list(first) if all(rw.elements(t) == 1 for t in node.inputs[1:] if t.name) else None
    rule = commute.rule(rw, node)
    kept = rule is not None and (rule.axes is None or rule.axes.get(axis) == axis)
    named = op in ("Reshape", "Expand", "Tile", "PRelu", "Squeeze", "Unsqueeze", "Flatten", "Transpose")
    return list(first) if kept and not named and not attributes.is_resized_by_sizes(rw, node) else None


def _add_part(
    builder: Builder,
    found: Sequence[Reading | Node],
    axis: int,
    rows: slice,
    split: Tensor,
    output: Tensor,
) -> None:
    """Add the operators that compute some channels of the input of a Split as one of its outputs."""
    rw, count = builder.rw, rows.stop - rows.start
    parts: dict[Tensor, Tensor] = {split: output}
    for f in found:
        tensor = f.output if isinstance(f, Reading) else f.outputs[0]
        if tensor not in parts:
            parts[tensor] = rw.new_variable(f"{tensor.name}_part", tensor, set_channels(axis, count))
        result = parts[tensor]
        if isinstance(f, Node):
            inputs = [parts.get(t, t) for t in f.inputs]
            builder.nodes.append(Node(f.op, rw.node_name(f.name, "_part"), dict(f.attrs), inputs, [result]))
            continue
        linear = f.load()
        g = replace(linear.geometry, out_channels=count)
        g = g if g.groups == 1 else replace(g, in_channels=count, groups=count)
        part = LinearMap.of(g, np.asarray(linear.weight)[rows], linear.bias[rows])
        source = f.source if g.groups == 1 and f.geometry.groups == 1 else parts[f.source]
        builder.add_map(part, f, source, result, f.axis)
