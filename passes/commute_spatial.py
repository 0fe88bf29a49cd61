"""Commuting with spatial operators (code motion): pointwise maps move to where there are fewest positions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pwopt.algebra.geometry import pointwise_geometry
from pwopt.algebra.linear import LinearMap, split_inputs
from pwopt.graph.dtypes import range_of
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.reasons import Reason
from pwopt.graph.shapes import set_channels
from pwopt.maps import commute, emit, forms, selections
from pwopt.maps.cost import ELEMENT
from pwopt.maps.forms import Reading
from pwopt.rewriting.builder import Builder
from pwopt.rewriting.driver import Pass, Rewriter, describe
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.wording import format_count

#: Linear operators that treat all channels alike and change the number of positions, with their work per element that
#: they read or write, relative to copying it.
SPATIAL = {
    "AveragePool": 2.0, "GlobalAveragePool": 1.0, "ReduceMean": 1.0, "ReduceSum": 1.0, "Slice": 1.0,
    "Resize": 3.0, "Upsample": 3.0, "Expand": 1.0, "Tile": 1.0, "Pad": 1.0, "MatMul": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Mover:
    """A spatial operator, and what its cost depends on.

    Attributes
    ----------
    node : Node
    data : int
        Index of its data input: 1 for a MatMul, whose first input is a constant matrix, else 0.
    rule : commute.Rule
    reads, writes : int
        Positions per channel.
    broadcasts : bool
        Whether it only repeats a single position.
    terms : int
        Multiply-adds per element that a MatMul writes; 0 for other operators.
    """

    node: Node
    data: int
    rule: commute.Rule
    reads: int
    writes: int
    broadcasts: bool
    terms: int

    def work(self, count: int) -> float:
        """Cost on this many channels, in multiply-adds."""
        if self.terms:
            return float(count * self.writes * self.terms)
        if self.node.op == "Slice":  # it does not read what it leaves out
            return ELEMENT * count * 2.0 * self.writes
        return ELEMENT * SPATIAL[self.node.op] * count * (self.reads + self.writes)

    @property
    def source(self) -> Tensor:
        return self.node.inputs[self.data]

    @property
    def shrinks(self) -> bool:
        """Whether maps may be cheaper after it. Always true for a matrix."""
        return self.writes < self.reads or self.terms > 0

    @property
    def grows(self) -> bool:
        """Whether maps may be cheaper before it. Always true for a matrix."""
        return self.writes > self.reads or self.terms > 0

    @property
    def output(self) -> Tensor:
        return self.node.outputs[0]


class CommuteSpatial(Pass):
    """P(Wx + b) = W(Px) + b for pointwise W and a linear spatial operator P that treats all channels alike

    * If b ≠ 0, P must keep constants. Interpolation, cropping, broadcasting, and average pooling that does not count
      its padding do; zero padding does not. A matrix does if its rows sum to one.
    * Nothing else reads the tensor between W and P, and the weight is not shared.
    * The cost decreases, in multiply-adds and moved elements.

    Three variants: through a Concat, only the upsampled part moves, W·concat(Pa, b) = P(Wₐa) + W_b b. P may be a
    constant matrix that mixes positions, M(xW) = (Mx)W, and then runs where there are fewest channels. A bias may
    follow the matrix, (Mx + c)W = M(xW) + cW.

    DenseNet's transitions pool after a map (Huang et al., 2017). Feature pyramids (Lin et al., 2017), U-Nets and YOLO's
    necks map what they have just upsampled. Graph networks have maps on both sides of an adjacency matrix (Kipf and
    Welling, 2017).
    """

    name = "commute-spatial"
    operators = forms.WEIGHTED_TYPES | frozenset(SPATIAL)
    policy = "if cheaper"

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        if rw.opset < 7:  # older sums do not broadcast
            return None
        done = self._sink(rw, node) if rw.op(node) in SPATIAL else None
        return done if isinstance(done, Rewrite) else self._lift(rw, node) or done

    def _lift(self, rw: Rewriter, node: Node) -> Rewrite | Skip | None:
        """Move a map before the operator that computes its input."""
        reading = _read_pointwise(rw, node)
        if reading is None or reading.nodes[0] is not node:
            return None
        maker = rw.producer(reading.source)
        if rw.is_a(maker, "Concat"):
            return self._lift_parts(rw, reading, maker)
        if rw.is_a(maker, "Add") and reading.kind == "matmul":
            return self._lift_past_bias(rw, reading, maker)
        return self._lift_past_spatial(rw, reading, maker) if maker is not None and rw.op(maker) in SPATIAL else None

    def _sink(self, rw: Rewriter, node: Node) -> Rewrite | Skip | None:
        """P(Wx) becomes W(Px) if P has fewer outputs than inputs."""
        tensor = node.inputs[_data_index(rw, node)]
        reading = _read_pointwise(rw, rw.producer(tensor))
        if reading is None or reading.output is not tensor:
            return None
        mover = _read_mover(rw, node, reading.axis)
        if mover is None or not mover.shrinks:
            return None
        return self._exchange(rw, mover, reading, "after")

    def _lift_past_spatial(self, rw: Rewriter, reading: Reading, node: Node) -> Rewrite | Skip | None:
        """W(Px) becomes P(Wx) if P has more outputs than inputs."""
        mover = _read_mover(rw, node, reading.axis)
        if mover is None or not mover.grows:
            return None
        product = forms.linear(rw, reading.nodes[0])
        if reading.geometry.biased and not mover.rule.shift and product is not None:
            reading = product  # the Add with the bias of a MatMul stays where it is
        return self._exchange(rw, mover, reading, "before")

    @staticmethod
    def _exchange(rw: Rewriter, mover: Mover, reading: Reading, where: str) -> Rewrite | Skip:
        """Run the map "after" or "before" the spatial operator, which is its neighbour."""
        g, axis, sinks = reading.geometry, reading.axis or 0, where == "after"
        refusal = _find_obstacle(rw, mover, reading, reading.output if sinks else reading.source)
        if refusal:
            return Skip(refusal)
        places = (mover.reads, mover.writes) if sinks else (mover.writes, mover.reads)
        counts = (g.out_channels, g.in_channels) if sinks else (g.in_channels, g.out_channels)
        cost_before, cost_after = (g.weights * p + mover.work(c) for p, c in zip(places, counts, strict=True))
        if cost_after >= cost_before:
            return Skip(_explain_cost(where, mover, counts))
        source: Tensor
        output: Tensor
        if sinks:
            between = rw.new_variable(f"{mover.output.name}_input", mover.output, set_channels(axis, g.in_channels))
            source, output = between, mover.output
            spatial = _copy(rw, mover.node, reading.source, between, axis, *counts)
        else:
            between = rw.new_variable(f"{reading.output.name}_small", mover.source, set_channels(axis, g.out_channels))
            source, output = mover.source, between
            spatial = _copy(rw, mover.node, between, reading.output, axis, *counts)
        if spatial is None:
            return Skip(FIXED_SIZE)
        written = emit.write(rw, reading.load(), reading, source, output, axis)
        reason = f"{reading.channels} runs {where} {mover.node.op}, at {format_count(min(places), 'position')}"
        reason += f" instead of {max(places):,}"
        if mover.terms:
            wide, narrow = counts
            reason = (
                f"{reading.channels} runs {where} a constant matrix, which then mixes {narrow} channels, not {wide}"
            )
        new = [spatial, *written.nodes] if sinks else [*written.nodes, spatial]
        old = [*reading.nodes, mover.node] if sinks else [mover.node, *reading.nodes]
        return rw.replace(old, new, reason, written.residual)

    @staticmethod
    def _lift_past_bias(rw: Rewriter, reading: Reading, node: Node) -> Rewrite | Skip | None:
        """W(Mx + c) becomes M(Wx) + Wc for a matrix M: a map of the next graph layer, after the bias of this layer."""
        add, product = forms.linear(rw, node), forms.linear(rw, reading.nodes[0])
        if add is None or product is None or add.kind != "diagonal" or add.axis != reading.axis:
            return None
        maker = rw.producer(add.source)
        mover = _read_mover(rw, maker, reading.axis) if rw.is_a(maker, "MatMul") else None
        if mover is None:
            return None
        refusal = rw.other_uses(product.source) or _find_obstacle(rw, mover, product, add.source)
        if refusal:
            return Skip(refusal)
        g, dtype, linear, constant = product.geometry, rw.dtype(product.weight_input), product.load(), add.load()
        if g.weights * mover.reads + mover.work(g.out_channels) >= g.weights * mover.writes + mover.work(g.in_channels):
            return Skip(_explain_cost("before", mover, (g.in_channels, g.out_channels)))
        if dtype is None:
            return None
        shift = linear.weight.reshape(g.out_channels, -1) @ constant.bias
        range_of(dtype).require_shift(shift)
        bias = emit.round_values(shift, dtype)
        mapped = rw.new_variable(
            f"{product.output.name}_small", mover.source, set_channels(reading.axis, g.out_channels)
        )
        mixed = rw.new_variable(f"{product.output.name}_mixed", product.output)
        written = emit.write(rw, linear, product, mover.source, mapped, reading.axis)
        matrix = mover.node
        mix = Node("MatMul", matrix.name, dict(matrix.attrs), [matrix.inputs[0], mapped], [mixed])
        offset = rw.new_constant(f"{product.output.name}_bias", bias)
        last = Node("Add", node.name, {}, [mixed, offset], [product.output])
        mixes = f"which then mixes {g.out_channels} channels, not {g.in_channels}"
        reason = f"{product.channels} runs before a constant matrix and its bias, {mixes}"
        old = [matrix, node, *product.nodes]
        return rw.replace(old, [*written.nodes, mix, last], reason, written.residual)

    def _lift_parts(self, rw: Rewriter, reading: Reading, concat: Node) -> Rewrite | Skip | None:
        """W·concat(Pa, b, …) becomes P(Wₐa) + W_b·concat(b, …)."""
        parts, g = selections.read_concat(rw, concat), reading.geometry
        if parts is None or parts[0].axis != reading.axis or g.groups > 1 or len(set(concat.inputs)) < len(parts):
            return None
        movers = [
            self._find_mover(rw, reading, t, p.geometry.in_channels) for t, p in zip(concat.inputs, parts, strict=True)
        ]
        if not any(isinstance(m, Mover) for m in movers):
            reasons = [m for m in movers if isinstance(m, str) and m]
            return Skip(reasons[0]) if reasons else None
        linear = forms.load_owned(rw, reading, reading.source)
        return self._write_parts(rw, reading, concat, linear, movers)

    @staticmethod
    def _find_mover(rw: Rewriter, reading: Reading, tensor: Tensor, count: int) -> Mover | str:
        """The upsampling that computes `tensor`, if a map before it is cheaper, else why not."""
        node = rw.producer(tensor)
        if node is None or rw.op(node) not in SPATIAL:
            return ""
        mover = _read_mover(rw, node, reading.axis)
        if mover is None or mover.writes <= mover.reads:
            return ""
        refusal = _find_obstacle(rw, mover, reading, tensor)
        out = reading.geometry.out_channels
        saved = count * out * (mover.writes - mover.reads) + mover.work(count) + 2 * ELEMENT * count * mover.writes
        spent = (0.0 if mover.broadcasts else mover.work(out)) + 3 * ELEMENT * out * mover.writes
        if refusal or saved > spent:
            return refusal or mover
        return f"mapping its {count} channels before {node.op} would save less than the additional sum costs"

    def _write_parts(
        self, rw: Rewriter, reading: Reading, concat: Node, linear: LinearMap, movers: list[Mover | str]
    ) -> Rewrite | Skip:
        axis, output, out = reading.axis or 0, reading.output, reading.geometry.out_channels
        sizes = [n for n in (rw.dim(t, axis) for t in concat.inputs) if isinstance(n, int)]
        pieces = split_inputs(LinearMap.of(linear.geometry, linear.weight), sizes)
        stay = [i for i, m in enumerate(movers) if not isinstance(m, Mover)]
        builder, terms, bias = Builder(rw), list[Tensor](), linear.bias
        groups = [stay, *([i] for i in range(len(movers)) if i not in stay)]
        for group in (g for g in groups if g):
            mover = movers[group[0]]
            weight = np.concatenate([pieces[i].weight for i in group], axis=1)
            inputs = [concat.inputs[i] for i in group]
            source = mover.source if isinstance(mover, Mover) else inputs[0]
            if len(group) > 1:
                source = rw.new_variable(f"{output.name}_inputs", inputs[0], set_channels(axis, weight.shape[1]))
                builder.nodes.append(Node("Concat", concat.name, dict(concat.attrs), inputs, [source]))
            term: Tensor = rw.new_variable(f"{output.name}_part", source, set_channels(axis, out))
            geometry = pointwise_geometry(out, weight.shape[1], rank=linear.geometry.rank)
            part = LinearMap.of(geometry, weight, bias)
            builder.add_map(part, reading, source, term, axis, inherit=not terms)
            bias = np.zeros(out)
            if isinstance(mover, Mover) and not (mover.broadcasts and terms):
                wide = rw.new_variable(f"{output.name}_large", output)
                spatial = _copy(rw, mover.node, term, wide, axis, sizes[group[0]], out)
                if spatial is None:
                    return Skip(FIXED_SIZE)
                builder.nodes.append(spatial)
                term = wide
            terms.append(term)
        total = terms[0]
        for i, term in enumerate(terms[1:], 2):
            after = output if i == len(terms) else rw.new_variable(f"{output.name}_sum", output)
            builder.nodes.append(Node("Add", rw.node_name(reading.node.name, "_sum"), {}, [total, term], [after]))
            total = after
        spatial_nodes = [m.node for m in movers if isinstance(m, Mover)]
        names = " and ".join(map(describe, spatial_nodes))
        reason = f"the part of a Concat that comes from {names} is mapped before it, {reading.channels} in parts"
        return rw.replace([*spatial_nodes, concat, *reading.nodes], builder.nodes, reason, builder.residual)


FIXED_SIZE = "its output size is computed while the model runs; make the input sizes static (--static)"


def _read_pointwise(rw: Rewriter, node: Node | None) -> Reading | None:
    """A convolution or product that acts on each position separately; None for any other node."""
    reading = forms.weighted(rw, node)
    return reading if reading is not None and reading.geometry.pointwise and reading.kind != "gemm" else None


def _count_positions(rw: Rewriter, tensor: Tensor, axis: int) -> int | None:
    size = rw.size_of(tensor)
    return None if size is None or not 0 <= axis < len(size) or size[axis] == 0 else math.prod(size) // size[axis]


def _explain_cost(where: str, mover: Mover, counts: tuple[int, int]) -> str:
    now, then = counts
    op = mover.node.op
    return f"{where} {op} it would not be cheaper, because {op} would process {then} channels instead of {now}"


def _data_index(rw: Rewriter, node: Node) -> int:
    """The index of a spatial operator's data input."""
    return 1 if rw.op(node) == "MatMul" else 0


def _read_mover(rw: Rewriter, node: Node, axis: int | None) -> Mover | None:
    """The spatial operator at `node`, if it keeps the channel axis."""
    data, product = _data_index(rw, node), rw.op(node) == "MatMul"
    source, output = node.inputs[data], node.outputs[0]
    if axis is None or rw.rank(source) is None or rw.rank(source) != rw.rank(output):
        return None
    rule = commute.product_rule(rw, node) if product else commute.rule(rw, node)
    reads, writes = _count_positions(rw, source, axis), _count_positions(rw, output, axis)
    if rule is None or rule.axes is None or rule.axes.get(axis) != axis or not reads or not writes:
        return None
    shape = rw.shape(source) or ()
    repeats = rw.op(node) in ("Expand", "Tile", "Resize", "Upsample")
    single = repeats and all(d == 1 for a, d in enumerate(shape) if a not in (0, axis))
    broadcasts = single and rw.dim(output, 0) == shape[0] and shape[0] is not None
    terms = rw.dim(source, -2) if product else 0
    return Mover(node, data, rule, reads, writes, broadcasts, terms) if isinstance(terms, int) else None


def _find_obstacle(rw: Rewriter, mover: Mover, reading: Reading, between: Tensor) -> str:
    """Why a map and a spatial operator cannot exchange places, else ""."""
    if reading.geometry.biased and not mover.rule.shift:
        return f"{mover.node.op} does not keep constants, and the map has a bias"
    if mover.node.op in ("ReduceSum", "MatMul") and str(rw.dtype(between)) == "float16":
        return f"{mover.node.op} would sum other numbers, which could overflow float16"
    other_uses = rw.other_uses(between)
    return other_uses or (
        Reason("the weight {!r} is shared", reading.weight_input.name) if rw.is_shared(reading.weight_input) else ""
    )


def _copy(rw: Rewriter, node: Node, source: Tensor, output: Tensor, axis: int, before: int, after: int) -> Node | None:
    """The spatial operator on another number of channels; None if its output size is not constant."""
    inputs = list(node.inputs)
    inputs[_data_index(rw, node)] = source
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
