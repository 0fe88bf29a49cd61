"""Scale folding along residual streams: the scale of a stream moves into the maps that read it and write to it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pwopt.algebra.geometry import RefusedError
from pwopt.algebra.linear import LinearMap, compose
from pwopt.graph.dtypes import WIDE
from pwopt.graph.ir import Node, Tensor
from pwopt.maps import emit, forms
from pwopt.maps.emit import Written
from pwopt.maps.forms import Reading
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip

#: The stream without its scale may be larger or smaller than with it by this factor.
MAX_FACTOR = 2.0**20


class FoldStreams(Pass):
    """l(k·s + Wv) = lk(s + (W/k)v), and C(k·s) = (kC)s for all other readers

    * k and l are numbers. Every other reader of k·s is a map with weights, and nothing else reads the tensors between.
    * W and the readers' weights are not shared.
    * k is finite and not zero, and stays between 2⁻²⁰ and 2²⁰: along a deep stream, the factors of all blocks multiply,
      and the stream without its scale must neither overflow nor underflow. The type is float32 or float64.

    One scale is left at the end of a stream of any depth. Networks with gated convolutions scale the sum in every
    block, often by √½: van den Oord et al., "WaveNet" (2016).
    """

    name = "fold-streams"

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        block = _read_block(rw, node)
        if block is None:
            return None
        reason = block.find_obstacle(rw)
        if reason:
            return Skip(reason)
        if _is_behind(rw, block):
            return None  # scales are folded in the order of the stream: this node is offered again after the one before
        return block.rewrite(rw)


@dataclass(frozen=True)
class _Block:
    """One block of a stream: y = factor·source, read by `maps` and by `total`, which adds the result of `added`.

    Attributes
    ----------
    scale, total, last : Node
        The scale of the stream, the sum in this block, and the scale after it.
    source : Tensor
    maps : tuple of Reading
    added : Reading
    factor, product : float
        The scale before, and both scales together.
    """

    scale: Node
    total: Node
    last: Node
    source: Tensor
    maps: tuple[Reading, ...]
    added: Reading
    factor: float
    product: float

    def find_obstacle(self, rw: Rewriter) -> str:
        """Why the scale must stay, as a clause, else ""."""
        if not 1 / MAX_FACTOR <= abs(self.factor) <= MAX_FACTOR:
            return f"the stream would be {abs(1 / self.factor):.2g} times as large without its scale"
        shared = (m.weight_input.name for m in (self.added, *self.maps) if rw.is_shared(m.weight_input))
        return next((f"the weight {name!r} is shared" for name in shared), "")

    def rewrite(self, rw: Rewriter) -> Rewrite:
        written = [_scale(rw, m, self.source, m.output, inputs=self.factor) for m in self.maps]
        part = rw.new_variable(f"{self.added.output.name}_unscaled", self.added.output)
        addend = _scale(rw, self.added, self.added.source, part, outputs=1 / self.factor)
        dtype = rw.dtype(self.source)
        factor = rw.new_constant(f"{self.last.outputs[0].name}_factor", np.array(self.product, dtype))
        if not np.isfinite(factor.values) or not factor.values:
            raise RefusedError(f"the scale of the stream is no number of {dtype}")
        summed = rw.new_variable(f"{self.total.outputs[0].name}_unscaled", self.total.outputs[0])
        new = [
            Node("Add", self.total.name, {}, [self.source, part], [summed]),
            Node("Mul", self.last.name, {}, [summed, factor], list(self.last.outputs)),
        ]
        reason = f"the scale {self.factor:.4g} of a residual stream moves into its readers and writers"
        records = [rw.replace(m.nodes, w.nodes, reason) for m, w in zip(self.maps, written, strict=True)]
        records.append(rw.replace(self.added.nodes, addend.nodes, reason))
        records.append(rw.replace([self.total, self.last], new, reason))
        records.append(rw.replace([self.scale], [], reason))
        residual = max(w.residual for w in (*written, addend))
        return replace(Rewrite.of(reason, records), residual=residual)


def _is_behind(rw: Rewriter, block: _Block) -> bool:
    """Whether the scale of the block before can be folded."""
    total = rw.producer(block.source)
    if not rw.is_a(total, "Add"):
        return False
    before = [_read_block(rw, n) for t in total.inputs if (n := rw.producer(t)) is not None]
    return any(b is not None and b.last is block.scale and not b.find_obstacle(rw) for b in before)


def _scale(
    rw: Rewriter, reading: Reading, source: Tensor, output: Tensor, *, inputs: float = 1.0, outputs: float = 1.0
) -> Written:
    """Write outputs·W(inputs·x).

    Raises
    ------
    RefusedError
        If the numbers do not fit their type.
    """
    linear = compose(LinearMap.diagonal([outputs]), compose(reading.load(), LinearMap.diagonal([inputs])))
    return emit.write(rw, linear, reading, source, output, reading.axis)


def _read_block(rw: Rewriter, scale: Node) -> _Block | None:
    first = _read_scalar(rw, scale)
    stream = scale.outputs[0]
    if first is None or rw.must_keep(stream) or rw.dtype(stream) not in WIDE or rw.opset < 7:
        return None
    readers = rw.readers(stream)
    sums = [n for n in readers if rw.is_a(n, "Add")]
    if len(sums) != 1 or len(readers) < 2 or len(set(sums[0].inputs)) != 2:
        return None
    (other,) = (t for t in sums[0].inputs if t is not stream)
    last = rw.sole_reader(sums[0].outputs[0])
    second = _read_scalar(rw, last) if last is not None else None
    added = forms.weighted(rw, rw.producer(other))
    maps = [forms.weighted(rw, n) for n in readers if n is not sums[0]]
    if last is None or second is None or added is None or added.output is not other:
        return None
    if rw.sole_reader(other) is not sums[0] or rw.shape(other) is None or rw.rank(other) != rw.rank(stream):
        return None
    found = tuple(m for m in maps if m is not None and m.source is stream)
    if len(found) < len(maps):
        return None
    factor, source = first
    return _Block(scale, sums[0], last, source, found, added, factor, factor * second[0])


def _read_scalar(rw: Rewriter, node: Node) -> tuple[float, Tensor] | None:
    """(k, x) of a node that computes k·x; None for any other."""
    reading = forms.linear(rw, node)
    if reading is None or reading.kind != "diagonal" or reading.axis is not None or reading.node is not node:
        return None
    linear = reading.try_load()
    if linear is None or linear.geometry.biased:
        return None
    factor = float(linear.scale[0])
    return (factor, reading.source) if factor and np.isfinite(factor) else None
