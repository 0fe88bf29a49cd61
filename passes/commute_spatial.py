"""Pointwise maps run where the feature map is smallest: behind pooling, before upsampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pwopt.algebra.geometry import Refusal, pointwise_geometry
from pwopt.algebra.linear import LinearMap, split_inputs
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.shapes import channels
from pwopt.maps import commute, emit, forms, selections
from pwopt.maps.cost import ELEMENT
from pwopt.maps.forms import Reading
from pwopt.rewriting.driver import Pass, Rewriter, describe
from pwopt.rewriting.records import Rewrite, Skip

#: Operators that act on every channel alike, linearly, and change the number of positions; each with how many
#: elements' worth of work it does per element it reads or writes.
SPATIAL = {
    "AveragePool": 2.0, "GlobalAveragePool": 1.0, "ReduceMean": 1.0, "ReduceSum": 1.0, "Slice": 1.0,
    "Resize": 3.0, "Upsample": 3.0, "Expand": 1.0, "Tile": 1.0, "Pad": 1.0, "MatMul": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Mover:
    """A spatial operator, and what it means to move it.

    Attributes
    ----------
    node : Node
    data : int
        The input that it moves; a MatMul's is the second one, its first is a constant matrix.
    rule : commute.Rule
    reads, writes : int
        Positions per channel.
    broadcasts : bool
        Whether it only repeats one position.
    terms : int
        Multiply-adds per element that it writes, of a matrix.
    """

    node: Node
    data: int
    rule: commute.Rule
    reads: int
    writes: int
    broadcasts: bool
    terms: int

    def work(self, count: int) -> float:
        """In multiply-adds."""
        if self.terms:
            return float(count * self.writes * self.terms)
        if self.node.op == "Slice":  # what it leaves out is not even read
            return ELEMENT * count * 2.0 * self.writes
        return ELEMENT * SPATIAL[self.node.op] * count * (self.reads + self.writes)

    @property
    def source(self) -> Tensor:
        return self.node.inputs[self.data]

    @property
    def shrinks(self) -> bool:
        """Whether maps may be cheaper behind it; both sides of a matrix have to be compared."""
        return self.writes < self.reads or self.terms > 0

    @property
    def grows(self) -> bool:
        """Whether maps may be cheaper before it."""
        return self.writes > self.reads or self.terms > 0

    @property
    def output(self) -> Tensor:
        return self.node.outputs[0]


class CommuteSpatial(Pass):
    """P(Wx + b) = W(Px) + b for pointwise W and a spatial operator P that treats every channel alike, linearly.

    With b ≠ 0 only if P keeps constants: average pooling that leaves its padding out, interpolation, cropping,
    broadcasting; not zero padding. Through a Concat only what was upsampled moves: W·concat(Pa, b) = P(Wₐa) + W_b b. P
    may be a constant matrix, M(xW) = (Mx)W, perhaps with a bias behind it, (Mx + c)W = M(xW) + cW: it mixes positions
    or nodes where there are fewest channels, and keeps constants if its rows sum to one. Decided by multiply-adds and
    by elements moved. DenseNet's transitions (Huang et al., 2017) pool after a map; feature pyramids (Lin et al.,
    2017), U-Nets and YOLO's necks map what they just upsampled; graph networks (Kipf and Welling, 2017) have maps on
    both sides of an adjacency.
    """

    name = "commute-spatial"
    policy = "if cheaper"

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        if rw.opset < 7:  # sums broadcast since
            return None
        done = self._sink(rw, node) if rw.op(node) in SPATIAL else None
        return done if isinstance(done, Rewrite) else self._lift_above(rw, node) or done

    def _lift_above(self, rw: Rewriter, node: Node) -> Rewrite | Skip | None:
        """A map moves before what makes its input."""
        reading = _pointwise(rw, node)
        if reading is None or reading.nodes[0] is not node:
            return None
        maker = rw.producer(reading.source)
        if rw.is_a(maker, "Concat"):
            return self._lift_parts(rw, reading, maker)
        if rw.is_a(maker, "Add") and reading.kind == "matmul":
            return self._lift_past_bias(rw, reading, maker)
        return self._lift(rw, reading, maker) if maker is not None and rw.op(maker) in SPATIAL else None

    def _sink(self, rw: Rewriter, node: Node) -> Rewrite | Skip | None:
        """P∘W becomes W∘P, where P leaves fewer positions."""
        tensor = node.inputs[_data(rw, node)]
        reading = _pointwise(rw, rw.producer(tensor))
        if reading is None or reading.output is not tensor:
            return None
        mover = _mover(rw, node, reading.axis)
        if mover is None or not mover.shrinks:
            return None
        refusal = _refusal(rw, mover, reading, reading.output)
        if refusal:
            return Skip(refusal)
        g = reading.geometry
        before = g.weights * mover.reads + mover.work(g.out_channels)
        after = g.weights * mover.writes + mover.work(g.in_channels)
        if after >= before:
            return Skip(_dearer("behind", mover, g.in_channels, g.out_channels))
        moved = rw.new_variable(f"{mover.output.name}_input", mover.output, channels(reading.axis, g.in_channels))
        return self._write(rw, mover, reading, (reading.source, moved), (moved, mover.output), "behind")

    def _lift(self, rw: Rewriter, reading: Reading, node: Node) -> Rewrite | Skip | None:
        """W∘P becomes P∘W, where P adds positions."""
        mover = _mover(rw, node, reading.axis)
        if mover is None or not mover.grows:
            return None
        product = forms.linear(rw, reading.nodes[0])
        if reading.geometry.biased and not mover.rule.shift and product is not None:
            reading = product  # the Add that is a MatMul's bias stays behind
        refusal = _refusal(rw, mover, reading, reading.source)
        if refusal:
            return Skip(refusal)
        g = reading.geometry
        before = g.weights * mover.writes + mover.work(g.in_channels)
        after = g.weights * mover.reads + mover.work(g.out_channels)
        if after >= before:
            return Skip(_dearer("before", mover, g.out_channels, g.in_channels))
        mapped = rw.new_variable(f"{reading.output.name}_small", mover.source, channels(reading.axis, g.out_channels))
        return self._write(rw, mover, reading, (mapped, reading.output), (mover.source, mapped), "before")

    @staticmethod
    def _lift_past_bias(rw: Rewriter, reading: Reading, node: Node) -> Rewrite | Skip | None:
        """W(Mx + c) becomes M(Wx) + Wc, for a matrix M: the next graph layer's map after this layer's bias."""
        shift, product = forms.linear(rw, node), forms.linear(rw, reading.nodes[0])
        if shift is None or product is None or shift.kind != "diagonal" or shift.axis != reading.axis:
            return None
        maker = rw.producer(shift.source)
        mover = _mover(rw, maker, reading.axis) if rw.is_a(maker, "MatMul") else None
        if mover is None:
            return None
        refusal = rw.crowd(product.source) or _refusal(rw, mover, product, shift.source)
        if refusal:
            return Skip(refusal)
        g, dtype, linear, constant = product.geometry, rw.dtype(product.weight_input), product.load(), shift.load()
        if g.weights * mover.reads + mover.work(g.out_channels) >= g.weights * mover.writes + mover.work(g.in_channels):
            return Skip(_dearer("before", mover, g.out_channels, g.in_channels))
        if isinstance(linear, Refusal) or isinstance(constant, Refusal) or dtype is None:
            return None
        bias = emit.rounded(linear.weight.reshape(g.out_channels, -1) @ constant.bias, dtype)
        mapped = rw.new_variable(f"{product.output.name}_small", mover.source, channels(reading.axis, g.out_channels))
        mixed = rw.new_variable(f"{product.output.name}_mixed", product.output)
        moved = _copy(rw, mover.node, mapped, mixed, reading.axis or 0, g.in_channels, g.out_channels)
        written = emit.write(rw, linear, product, mover.source, mapped, reading.axis)
        if isinstance(written, Refusal) or isinstance(bias, Refusal) or moved is None:
            return Skip(next(r.reason for r in (written, bias) if isinstance(r, Refusal)))
        held = rw.new_constant(f"{product.output.name}_bias", bias)
        add = Node("Add", node.name, {}, [mixed, held], [product.output])
        reason = (
            f"{product.channels} runs before a constant matrix and its bias, and {g.out_channels} channels are mixed"
        )
        old = [mover.node, node, *product.nodes]
        return rw.replace(old, [*written.nodes, moved, add], f"{reason}, not {g.in_channels}", written.residual)

    @staticmethod
    def _write(
        rw: Rewriter,
        mover: Mover,
        reading: Reading,
        moves: tuple[Tensor, Tensor],
        maps: tuple[Tensor, Tensor],
        where: str,
    ) -> Rewrite | Skip:
        g = reading.geometry
        counts = (g.out_channels, g.in_channels) if where == "behind" else (g.in_channels, g.out_channels)
        spatial = _copy(rw, mover.node, *moves, reading.axis or 0, *counts)
        linear = reading.load()
        if spatial is None or isinstance(linear, Refusal):
            return Skip(NOT_FITTING if spatial is None else getattr(linear, "reason", ""))
        written = emit.write(rw, linear, reading, *maps, reading.axis)
        if isinstance(written, Refusal):
            return Skip(written.reason)
        small, large = sorted((mover.reads, mover.writes))
        places = f"{small:,} positions" if small > 1 else "1 position"
        reason = f"{reading.channels} runs {where} {mover.node.op}, at {places} instead of {large:,}"
        if mover.terms:
            wide, narrow = counts
            reason = (
                f"{reading.channels} runs {where} a constant matrix, which then mixes {narrow} channels, not {wide}"
            )
        new = [spatial, *written.nodes] if where == "behind" else [*written.nodes, spatial]
        old = [*reading.nodes, mover.node] if where == "behind" else [mover.node, *reading.nodes]
        return rw.replace(old, new, reason, written.residual)

    def _lift_parts(self, rw: Rewriter, reading: Reading, concat: Node) -> Rewrite | Skip | None:
        """W·concat(Pa, b, …) becomes P(Wₐa) + W_b·concat(b, …)."""
        parts, g = selections.read_concat(rw, concat), reading.geometry
        if parts is None or parts[0].axis != reading.axis or g.groups > 1:
            return None
        if len(set(concat.inputs)) < len(parts):
            return None
        movers = [
            self._lifted(rw, reading, t, p.geometry.in_channels) for t, p in zip(concat.inputs, parts, strict=True)
        ]
        if not any(isinstance(m, Mover) for m in movers):
            refused = [m for m in movers if isinstance(m, str) and m]
            return Skip(refused[0]) if refused else None
        linear = forms.owned(rw, reading, reading.source)
        if isinstance(linear, Refusal):
            return Skip(linear.reason)
        return self._write_parts(rw, reading, concat, linear, movers)

    @staticmethod
    def _lifted(rw: Rewriter, reading: Reading, tensor: Tensor, count: int) -> Mover | str:
        """The upsampling that makes `tensor`, if a map before it is cheaper; else why not."""
        node = rw.producer(tensor)
        if node is None or rw.op(node) not in SPATIAL:
            return ""
        mover = _mover(rw, node, reading.axis)
        if mover is None or mover.writes <= mover.reads:
            return ""
        refusal = _refusal(rw, mover, reading, tensor)
        out = reading.geometry.out_channels
        saved = count * out * (mover.writes - mover.reads) + mover.work(count) + 2 * ELEMENT * count * mover.writes
        spent = (0.0 if mover.broadcasts else mover.work(out)) + 3 * ELEMENT * out * mover.writes
        if refusal or saved > spent:
            return refusal or mover
        return f"mapping its {count} channels before {node.op} would not be cheaper than the sum that it takes"

    def _write_parts(
        self, rw: Rewriter, reading: Reading, concat: Node, linear: LinearMap, movers: list[Mover | str]
    ) -> Rewrite | Skip:
        axis, output, out = reading.axis or 0, reading.output, reading.geometry.out_channels
        sizes = [n for n in (rw.dim(t, axis) for t in concat.inputs) if isinstance(n, int)]
        pieces = split_inputs(LinearMap.of(linear.geometry, linear.weight), sizes)
        stay = [i for i, m in enumerate(movers) if not isinstance(m, Mover)]
        new: list[Node] = []
        terms: list[Tensor] = []
        residual, biased = 0.0, linear.bias
        groups = [stay, *([i] for i in range(len(movers)) if i not in stay)]
        for group in (g for g in groups if g):
            mover = movers[group[0]]
            weight = np.concatenate([pieces[i].weight for i in group], axis=1)
            inputs = [concat.inputs[i] for i in group]
            source = mover.source if isinstance(mover, Mover) else inputs[0]
            if len(group) > 1:
                source = rw.new_variable(f"{output.name}_inputs", inputs[0], channels(axis, weight.shape[1]))
                new.append(Node("Concat", concat.name, dict(concat.attrs), inputs, [source]))
            term: Tensor = rw.new_variable(f"{output.name}_part", source, channels(axis, out))
            geometry = pointwise_geometry(out, weight.shape[1], rank=linear.geometry.rank)
            written = emit.write(
                rw, LinearMap.of(geometry, weight, biased), reading, source, term, axis, inherit=not terms
            )
            biased = np.zeros(out)
            if isinstance(written, Refusal):
                return Skip(written.reason)
            new += written.nodes
            residual = max(residual, written.residual)
            if isinstance(mover, Mover) and not (mover.broadcasts and terms):
                wide = rw.new_variable(f"{output.name}_large", output)
                spatial = _copy(rw, mover.node, term, wide, axis, sizes[group[0]], out)
                if spatial is None:
                    return Skip(NOT_FITTING)
                new.append(spatial)
                term = wide
            terms.append(term)
        total = terms[0]
        for i, term in enumerate(terms[1:], 2):
            last = i == len(terms)
            after = output if last else rw.new_variable(f"{output.name}_sum", output)
            new.append(Node("Add", rw.node_name(reading.node.name, "_sum"), {}, [total, term], [after]))
            total = after
        gone = [m.node for m in movers if isinstance(m, Mover)]
        names = " and ".join(describe(n) for n in gone)
        reason = f"the part of a Concat that comes from {names} is mapped before it, {reading.channels} in parts"
        return rw.replace([*gone, concat, *reading.nodes], new, reason, residual)


NOT_FITTING = "its size is computed while the model runs, for the present number of channels; --static settles it"


def _pointwise(rw: Rewriter, node: Node | None) -> Reading | None:
    """A convolution or product that acts on each position alone."""
    reading = forms.weighted(rw, node)
    return reading if reading is not None and reading.geometry.pointwise and reading.kind != "gemm" else None


def _places(rw: Rewriter, tensor: Tensor, axis: int) -> int | None:
    size = rw.size_of(tensor)
    return None if size is None or not 0 <= axis < len(size) or size[axis] == 0 else math.prod(size) // size[axis]


def _dearer(where: str, mover: Mover, moved: int, now: int) -> str:
    return f"{where} {mover.node.op} it would not be cheaper: {moved} channels to move, not {now}"


def _data(rw: Rewriter, node: Node) -> int:
    """The input of a spatial operator that it moves."""
    return 1 if rw.op(node) == "MatMul" else 0


def _mover(rw: Rewriter, node: Node, axis: int | None) -> Mover | None:
    """A spatial operator that leaves the channel axis alone."""
    data, product = _data(rw, node), rw.op(node) == "MatMul"
    source, output = node.inputs[data], node.outputs[0]
    if axis is None or rw.rank(source) is None or rw.rank(source) != rw.rank(output):
        return None
    rule = commute.product_rule(rw, node) if product else commute.rule(rw, node)
    reads, writes = _places(rw, source, axis), _places(rw, output, axis)
    if rule is None or rule.axes is None or rule.axes.get(axis) != axis or not reads or not writes:
        return None
    shape = rw.shape(source) or ()
    repeats = rw.op(node) in ("Expand", "Tile", "Resize", "Upsample")
    single = repeats and all(d == 1 for a, d in enumerate(shape) if a not in (0, axis))
    broadcasts = single and rw.dim(output, 0) == shape[0] and shape[0] is not None
    terms = rw.dim(source, -2) if product else 0
    return Mover(node, data, rule, reads, writes, broadcasts, terms) if isinstance(terms, int) else None


def _refusal(rw: Rewriter, mover: Mover, reading: Reading, between: Tensor) -> str:
    if reading.geometry.biased and not mover.rule.shift:
        return f"{mover.node.op} does not keep constants, and the map has a bias"
    if mover.node.op in ("ReduceSum", "MatMul") and str(rw.dtype(between)) == "float16":
        return "a sum of other numbers could overflow float16"
    crowd = rw.crowd(between)
    return crowd or (f"the weight {reading.weight_input.name!r} is shared" if rw.shared(reading.weight_input) else "")


def _copy(rw: Rewriter, node: Node, source: Tensor, output: Tensor, axis: int, before: int, after: int) -> Node | None:
    """The spatial operator on another number of channels; None if its arguments name the present one for good."""
    inputs = list(node.inputs)
    inputs[_data(rw, node)] = source
    index = {"Expand": 1, "Resize": 3}.get(node.op)
    if index is not None and len(inputs) > index and inputs[index].name:
        sizes, rank = rw.integers(inputs[index]), rw.rank(node.inputs[0]) or 0
        if sizes is None:
            return None
        axes = [a % rank for a in node.attrs.get("axes", range(rank - len(sizes), rank))]
        changed = [after if a == axis and s == before else s for a, s in zip(axes, sizes, strict=True)]
        if changed != sizes:
            inputs[index] = rw.new_constant(f"{output.name}_shape", np.array(changed, np.int64))
    return Node(node.op, node.name, dict(node.attrs), inputs, [output], domain=node.domain)
