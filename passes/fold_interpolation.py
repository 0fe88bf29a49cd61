"""Interpolation folding: a convolution of an interpolated image runs before the interpolation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from pwopt.algebra import Array
from pwopt.algebra.geometry import RefusedError, pointwise_geometry
from pwopt.algebra.interpolation import read_by_taps
from pwopt.algebra.linear import LinearMap
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.reasons import Reason
from pwopt.graph.shapes import set_channels
from pwopt.maps import emit
from pwopt.maps.cost import ELEMENT
from pwopt.maps.forms import Reading
from pwopt.maps.interpolations import Interpolated, read_interpolated
from pwopt.maps.positions import stencil
from pwopt.rewriting.builder import Builder
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip

#: The fixed cost of the new operators of one part, in multiply-adds: 5 µs each, at 50 G multiply-adds per second.
OPERATORS = 6 * 250_000
#: The largest number of parts of a Concat.
MAX_PARTS = 16


class FoldInterpolation(Pass):
    """W ∗ (A·X·Bᵀ) = Σⱼₖ Aⱼ·(Wⱼₖ·X)·Bₖᵀ for linear and cubic interpolation A·X·Bᵀ; tap j reads Aⱼ of the rows

    * The convolution has several taps and one group, and its weight is not shared. The type is float32.
    * A Resize to a fixed size interpolates its input, or some of the inputs of a Concat before it. Nothing else reads
      these tensors.
    * The inputs are finite: NaN and infinities spread over the image, because they meet weights of zero.
    * The new form takes fewer multiply-adds and movements of elements, by estimate.

    The weights of all taps act on the small image, as one pointwise map. Two matrix products then interpolate what each
    tap reads, and sum over the taps (`pwopt.algebra.interpolation.read_by_taps`). The zero padding of the convolution
    is part of these matrices, so the borders are exact. The products grow with the size of the image. So this pays
    for deep features and for large factors: decoders (Chen et al., "DeepLab v3+", 2018) and U-Nets with bilinear
    upsampling. For nearest upsampling, `polyphase` does better.
    """

    name = "fold-interpolation"
    operators = frozenset({"Conv"})
    policy = "measured"
    pays_on = frozenset({"cpu"})
    #: The smallest ratio of saved to additional cost for a race, and for a rewrite without measuring.
    min_gain: ClassVar[float] = 1.0
    sure_gain: ClassVar[float] = 2.0

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        reading = stencil(rw, node)
        if reading is None or reading.geometry.taps == 1 or reading.geometry.groups != 1 or reading.geometry.rank != 2:
            return None
        if str(rw.dtype(reading.source)) != "float32":
            return None
        folding = _find_parts(rw, reading, self.min_gain)
        if folding is None or not folding.terms:
            return None
        used = next((u for p in folding.terms if (u := rw.other_uses(p.tensor))), rw.other_uses(reading.source))
        if used:
            return Skip(used)
        if rw.is_shared(reading.weight_input):
            return Skip(Reason("the weight {!r} is shared", reading.weight_input.name))
        saved, spent = folding.cost()
        if not self.eager and saved <= self.sure_gain * spent:
            return Skip(f"{folding.what} could run before it; only measuring can tell")
        return folding.rewrite(rw)


@dataclass(frozen=True)
class _Part:
    """Consecutive channels of the input of a convolution.

    Attributes
    ----------
    tensor : Tensor
    channels : slice
    found : Interpolated or None
        The interpolation that computes them, if the convolution should run before it.
    """

    tensor: Tensor
    channels: slice
    found: Interpolated | None = None

    @property
    def count(self) -> int:
        return int(self.channels.stop - self.channels.start)


@dataclass(frozen=True)
class _Folding:
    """A convolution, and the parts of its input."""

    reading: Reading
    parts: tuple[_Part, ...]
    #: The Concat of the parts; None if there is one part.
    concat: Node | None

    @property
    def terms(self) -> list[_Part]:
        return [p for p in self.parts if p.found is not None]

    @property
    def rest(self) -> list[_Part]:
        return [p for p in self.parts if p.found is None]

    @property
    def what(self) -> str:
        kernel = "×".join(map(str, self.reading.geometry.kernel))
        what = " and ".join(dict.fromkeys(p.found.what for p in self.terms if p.found is not None))
        beside = sum(p.count for p in self.rest)
        return f"{kernel} {self.reading.channels} after {what}" + (f" ({beside} channels beside it)" if beside else "")

    def cost(self) -> tuple[float, float]:
        """What the rewrite saves and what it spends, in multiply-adds."""
        costs = [_estimate(self.reading, p.found, p.count) for p in self.terms if p.found is not None]
        return sum(saved for saved, _ in costs), sum(spent for _, spent in costs)

    def rewrite(self, rw: Rewriter) -> Rewrite:
        linear, output, builder = self.reading.load(), self.reading.output, Builder(rw)
        count = len(self.terms) + bool(self.rest)
        results = [output if count == 1 else rw.new_variable(f"{output.name}_part{i}", output) for i in range(count)]
        if self.rest:
            self._add_rest(builder, linear, results[0])
        for i, part in enumerate(self.terms, bool(self.rest)):
            part_map = _select(linear, [part], biased=i == 0)
            assert part.found is not None
            _add_term(builder, part_map, self.reading, part.found, results[i])
        total = results[0]
        for i, result in enumerate(results[1:], 2):
            joined = output if i == count else rw.new_variable(f"{output.name}_sum{i}", output)
            builder.add_node("Add", [total, result], joined)
            total = joined
        resizes = list(dict.fromkeys(p.found.node for p in self.terms if p.found is not None))
        old = [*resizes, *([self.concat] if self.concat is not None else []), self.reading.node]
        done = rw.replace(old, builder.nodes, f"{self.what} runs before it, as one pointwise map", builder.residual)
        return done.with_signature(f"convolutions of interpolated images: {self.what}")

    def _add_rest(self, builder: Builder, linear: LinearMap, output: Tensor) -> None:
        """The convolution of the other parts, with the bias."""
        rest, tensor = self.rest, self.rest[0].tensor
        if len(rest) > 1:
            tensor = builder.rw.new_variable(
                f"{output.name}_beside", tensor, set_channels(1, sum(p.count for p in rest))
            )
            builder.add_node("Concat", [p.tensor for p in rest], tensor, axis=1)
        builder.add_map(_select(linear, rest, biased=True), self.reading, tensor, output)


def _find_parts(rw: Rewriter, reading: Reading, min_gain: float) -> _Folding | None:
    """The parts of the input of a convolution, those to fold by estimate; None if their channels are not known."""
    maker = rw.producer(reading.source)
    concat = maker if rw.is_a(maker, "Concat") and maker is not None and maker.attrs.get("axis") in (1, -3) else None
    tensors = [reading.source] if concat is None else list(concat.inputs)
    if len(tensors) > MAX_PARTS:
        return None
    parts, start = [], 0
    for tensor in tensors:
        count = rw.dim(tensor, 1)
        if not isinstance(count, int):
            return None
        found = read_interpolated(rw, rw.producer(tensor)) if tensors.count(tensor) == 1 else None
        if found is not None:
            saved, spent = _estimate(reading, found, count)
            found = found if saved > max(0.0, min_gain * spent) else None
        parts.append(_Part(tensor, slice(start, start + count), found))
        start += count
    return _Folding(reading, tuple(parts), concat) if start == reading.geometry.in_channels else None


def _read_taps(reading: Reading, found: Interpolated) -> tuple[Array, Array]:
    """What each tap reads along both axes, each of shape (taps, outputs, positions before)."""
    g, rank = reading.geometry, reading.geometry.rank
    rows, columns = (
        read_by_taps(matrix, g.kernel[axis], g.strides[axis], g.dilations[axis], (g.pads[axis], g.pads[axis + rank]))
        for axis, matrix in enumerate(found.matrices())
    )
    return rows, columns


def _estimate(reading: Reading, found: Interpolated, channels: int) -> tuple[float, float]:
    """The multiply-adds of the convolution of an interpolated part, and those of the new form, for one image."""
    g = reading.geometry
    (tall, wide), before = g.kernel, (found.rows.count, found.columns.count)
    high, width = (
        max(0, (axis.size + sum(g.pads[i::2]) - g.dilations[i] * (g.kernel[i] - 1) - 1) // g.strides[i] + 1)
        for i, axis in enumerate((found.rows, found.columns))
    )
    maps = g.out_channels * g.taps * before[0] * before[1]  # elements
    half = g.out_channels * tall * before[0] * width
    products = half * wide * before[1] + g.out_channels * high * width * tall * before[0]
    saved = g.out_channels * g.taps * channels * high * width
    return saved, maps * channels + products + ELEMENT * (3 * maps + half) + OPERATORS


def _select(linear: LinearMap, parts: list[_Part], *, biased: bool) -> LinearMap:
    """The map of some parts."""
    channels = np.concatenate([np.arange(p.channels.start, p.channels.stop) for p in parts])
    geometry = replace(linear.geometry, in_channels=len(channels))
    return LinearMap.of(geometry, np.asarray(linear.weight)[:, channels], linear.bias if biased else None)


def _add_term(builder: Builder, linear: LinearMap, like: Reading, found: Interpolated, output: Tensor) -> None:
    """Add Σⱼₖ Aⱼ·(Wⱼₖ·X)·Bₖᵀ, with the bias in a map whose tap reads the image everywhere.

    Raises
    ------
    RefusedError
        If no tap does.
    """
    rw, x, g = builder.rw, found.source, linear.geometry
    (tall, wide), out = g.kernel, g.out_channels
    rows, columns = _read_taps(like, found)
    count, half_width = out * g.taps, columns.shape[1]
    bias = np.zeros((out, tall, wide))
    if linear.bias.any():
        full = [[k for k, m in enumerate(taps) if m.any(axis=1).all()] for taps in (rows, columns)]
        if not all(full):
            raise RefusedError("it has a bias, and no tap reads the image at every position")
        bias[:, full[0][0], full[1][0]] = linear.bias  # the weights of an interpolation sum to 1
    weight = np.asarray(linear.weight).transpose(0, 2, 3, 1).reshape(count, -1, 1, 1)
    pointwise = pointwise_geometry(count, g.in_channels, rank=2, biased=bool(bias.any()))
    maps = rw.new_variable(f"{output.name}_maps", x, set_channels(1, count))
    builder.add_map(LinearMap.of(pointwise, weight, bias.reshape(-1)), like, x, maps)
    h, w = found.rows.count, found.columns.count

    def add(op: str, inputs: list[Tensor], name: str, *shape: int, **attrs: object) -> Tensor:
        result = rw.new_variable(f"{output.name}_{name}", x, lambda s: (s[0], *shape))
        builder.add_node(op, inputs, result, **attrs)
        return result

    def sizes(name: str, *values: int) -> Tensor:
        return rw.new_constant(f"{output.name}_{name}", np.array([0, *values], np.int64))

    tensor = add("Reshape", [maps, sizes("taps_shape", out * tall, wide, h, w)], "taps", out * tall, wide, h, w)
    tensor = add("Transpose", [tensor], "turned", out * tall, h, wide, w, perm=[0, 1, 3, 2, 4])
    tensor = add("Reshape", [tensor, sizes("lines_shape", out, tall * h, wide * w)], "lines", out, tall * h, wide * w)
    left = rows.transpose(1, 0, 2).reshape(rows.shape[1], -1)
    right = columns.transpose(0, 2, 1).reshape(-1, half_width)
    low = [m.astype(np.float32) for m in (left, right)]
    builder.residual = max(builder.residual, *map(emit.relative_rounding, low, (left, right)))
    by_columns = [tensor, rw.new_constant(f"{output.name}_columns", low[1])]
    tensor = add("MatMul", by_columns, "half", out, tall * h, half_width)
    builder.add_node("MatMul", [rw.new_constant(f"{output.name}_rows", low[0]), tensor], output)
