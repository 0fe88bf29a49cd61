"""The algebra of maps that are linear across channels.

A map reads ``x`` of shape (N, in_channels, *space) and gives ``y`` of shape (N, out_channels, *space'):

    y[o, p] = b[o] + Σ_i Σ_k  W[o, i, k] · x[i, stride·p + dilation·k − pad]

where x is zero outside its bounds (ONNX ``Conv``). A pointwise map has one tap. Everything here is float64 numpy,
without ONNX. `Geometry` has *all exactness rules*, so a combination can be priced before anything is multiplied.
`LinearMap` adds the numbers. An operation that would not be exact for every input raises `RefusedError`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pwopt.algebra import Array
from pwopt.algebra.geometry import (
    Geometry,
    RefusedError,
    add_geometry,
    align_geometry,
    compose_geometry,
    homogeneous_geometry,
    pointwise_geometry,
    require,
    with_bias,
)
from pwopt.algebra.summaries import has_nonzero


def _last(index: Sequence[int | slice]) -> tuple[Any, ...]:
    """An index into the last axes."""
    return (Ellipsis, *index)


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A linear map across channels.

    Attributes
    ----------
    geometry : Geometry
    weight : array (out, in / groups, *kernel), float64
    bias : array (out,), float64
    moved : array (out,), float64, or None
        By how much its products may exceed the results of the maps it is combined from (`pwopt.algebra.overflow`);
        None for a map that was read.
    """

    geometry: Geometry
    weight: Array
    bias: Array
    moved: Array | None = None

    @classmethod
    def of(
        cls, geometry: Geometry, weight: ArrayLike, bias: ArrayLike | None = None, moved: Array | None = None
    ) -> LinearMap:
        """Build a map; `weight` is reshaped to the geometry, a missing bias is zero.

        Raises
        ------
        ValueError
            If the numbers do not fit the geometry.
        """
        g = geometry
        if g.groups < 1 or g.in_channels % g.groups or g.out_channels % g.groups:
            raise ValueError(f"{g.groups} groups do not divide {g.in_channels} inputs and {g.out_channels} outputs")
        w = np.asarray(weight, np.float64).reshape(g.out_channels, g.in_channels // g.groups, *g.kernel)
        b = np.zeros(g.out_channels) if bias is None else np.asarray(bias, np.float64).reshape(g.out_channels)
        return cls(with_bias(g, has_nonzero(b)), w, b, moved)

    @classmethod
    def conv(
        cls,
        weight: ArrayLike,
        bias: ArrayLike | None = None,
        *,
        groups: int = 1,
        strides: Sequence[int] | None = None,
        dilations: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
    ) -> LinearMap:
        """A convolution from its weight (out, in / groups, *kernel), with ONNX's defaults."""
        w = np.asarray(weight, np.float64)
        kernel = w.shape[2:]
        ones = (1,) * len(kernel)
        geometry = Geometry(
            w.shape[0], w.shape[1] * groups, groups, kernel,
            tuple(strides or ones), tuple(dilations or ones), tuple(pads or (0, 0) * len(kernel)),
        )  # fmt: skip
        return cls.of(geometry, w, bias)

    @classmethod
    def pointwise(cls, matrix: ArrayLike, bias: ArrayLike | None = None, rank: int = 0) -> LinearMap:
        """y = matrix @ x + bias at every position; matrix is (out, in)."""
        m = np.asarray(matrix, np.float64)
        return cls.of(pointwise_geometry(*m.shape, rank=rank), m, bias)

    @classmethod
    def diagonal(cls, scale: ArrayLike, shift: ArrayLike = 0.0, rank: int = 0) -> LinearMap:
        """y = scale · x + shift per channel; scale and shift broadcast to (channels,)."""
        s, t = np.asarray(scale, np.float64).reshape(-1), np.asarray(shift, np.float64)
        if s.shape != t.shape:
            s, t = np.broadcast_arrays(s, t)
        return cls.of(pointwise_geometry(s.size, s.size, groups=s.size, rank=rank), s, t)

    @classmethod
    def identity(cls, channels: int, rank: int = 0) -> LinearMap:
        return cls.diagonal(np.ones(channels), rank=rank)

    @classmethod
    def selection(cls, indices: Sequence[int], channels: int, rank: int = 0) -> LinearMap:
        """y[j] = x[indices[j]]: slices, permutations and copies of channels; index −1 gives a zero channel."""
        matrix = np.zeros((len(indices), channels))
        picks = np.asarray(indices, int)
        rows = np.flatnonzero(picks >= 0)
        matrix[rows, picks[rows]] = 1.0
        return cls.pointwise(matrix, rank=rank)

    def __neg__(self) -> LinearMap:
        return LinearMap(self.geometry, -self.weight, -self.bias, self.moved)

    @property
    def scale(self) -> Array:
        """The diagonal of a diagonal map, shape (channels,)."""
        return self.weight.reshape(self.geometry.out_channels)

    def at_rank(self, rank: int) -> LinearMap:
        """The same pointwise map over `rank` spatial axes."""
        if rank == self.geometry.rank:
            return self
        geometry = self.geometry.at_rank(rank)
        weight = self.weight.reshape(*self.weight.shape[:2], *geometry.kernel)
        return LinearMap(geometry, weight, self.bias, self.moved)

    def broadcast(self, channels: int) -> LinearMap:
        """Repeat a diagonal map of one channel for `channels` channels; any other map is returned unchanged."""
        wide = self.geometry.broadcast(channels)
        if wide is self.geometry:
            return self
        moved = None if self.moved is None else self.moved.repeat(channels)
        return LinearMap(wide, self.weight.repeat(channels, 0), self.bias.repeat(channels), moved)

    def homogeneous(self) -> LinearMap:
        """The same map of (x, 1), without a bias; see `homogeneous_geometry`."""
        geometry = require(homogeneous_geometry(self.geometry))
        bias = self.bias.reshape(-1, 1, *self.geometry.kernel)
        return LinearMap.of(geometry, np.concatenate([self.regroup(1).weight, bias], axis=1))

    def regroup(self, groups: int) -> LinearMap:
        """The same map in fewer groups, with zeros filled in; `groups` divides the present number."""
        g = self.geometry
        if groups == g.groups:
            return self
        blocks = g.groups // groups
        out, inn = g.out_channels // g.groups, g.in_channels // g.groups
        wide = np.zeros((groups, blocks, out, blocks, inn, *g.kernel))
        for j in range(blocks):
            wide[:, j, :, j] = self.weight.reshape(groups, blocks, out, inn, *g.kernel)[:, j]
        return LinearMap.of(replace(g, groups=groups), wide, self.bias, self.moved)

    def __matmul__(self, first: LinearMap) -> LinearMap:
        """``second @ first``: first, then second. Exact, or refused by `compose_geometry`."""
        geometry = require(compose_geometry(self.geometry, first.geometry))
        groups = geometry.groups
        # Block-diagonal structure is kept where one side has it; only coprime groupings are filled in.
        if first.geometry.groups > groups and self.geometry.groups > groups:
            first = first.regroup(groups)
        g1, g2 = first.geometry.at_rank(geometry.rank), self.geometry.at_rank(geometry.rank)
        blocks1, blocks2 = g1.groups // groups, g2.groups // groups
        blocks = blocks1 * blocks2
        middle = g2.in_channels // (groups * blocks)
        w1 = first.weight.reshape(groups, blocks, middle, -1)
        if blocks2 > 1 or blocks1 == 1:  # the second is block diagonal: its blocks are rows
            w2 = self.weight.reshape(groups, blocks, -1, middle, g2.taps)
        else:  # the first is block diagonal: its blocks are columns
            w2 = self.weight.reshape(groups, -1, blocks, middle, g2.taps).swapaxes(1, 2)
        inn = g1.in_channels // g1.groups
        kernel1 = g1.kernel
        weight = np.zeros((groups, blocks, w2.shape[2], inn, *geometry.kernel))
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused where it is written
            for flat, tap in enumerate(itertools.product(*map(range, g2.kernel))):
                places = []
                for axis, t in enumerate(tap):
                    step = geometry.dilations[axis]
                    start = t if g2.transposed else t * g1.strides[axis] * g2.dilations[axis] // step
                    hop = max(1, g1.dilations[axis] // step)
                    places.append(slice(start, start + hop * (kernel1[axis] - 1) + 1, hop))
                weight[_last(places)] += (w2[..., flat] @ w1).reshape(*weight.shape[:4], *kernel1)
            shift = _apply(self._sum_taps(), first.bias) if g1.biased else np.zeros(g2.out_channels)
            moved = np.abs(shift) + (0.0 if self.moved is None else self.moved)
        if blocks1 > 1:
            weight = weight.swapaxes(1, 2)
        return LinearMap.of(geometry, weight, self.bias + shift, moved)

    def _sum_taps(self) -> Array:
        """The weight (groups, out / groups, in / groups) for inputs that are the same at every position."""
        g = self.geometry
        taps = self.weight.reshape(g.groups, -1, g.in_channels // g.groups, g.taps)
        return taps[..., 0] if g.taps == 1 else taps.sum(-1)

    def _on(self, stencil: Geometry) -> Array:
        """The weight (out, in / groups, *stencil.kernel) on a wider stencil from `align_geometry`."""
        m = self.at_rank(stencil.rank)
        weight = np.zeros((*m.weight.shape[:2], *stencil.kernel))
        places = []
        for axis in range(stencil.rank):
            step = stencil.dilations[axis]
            start = (stencil.pads[axis] - m.geometry.pads[axis]) // step
            hop = max(1, m.geometry.dilations[axis] // step)
            places.append(slice(start, start + hop * (m.geometry.kernel[axis] - 1) + 1, hop))
        weight[_last(places)] = m.weight
        return weight

    def __add__(self, other: LinearMap) -> LinearMap:
        """Parallel maps of one input, outputs summed: kernels are aligned, so 3×3 + 1×1 + identity is one 3×3."""
        stencil = require(add_geometry([self.geometry, other.geometry]))
        weight = self.regroup(stencil.groups)._on(stencil) + other.regroup(stencil.groups)._on(stencil)
        bias = self.bias + other.bias
        return LinearMap.of(stencil, weight, bias, np.abs(bias))


def _apply(blocks: Array, values: Array) -> Array:
    """The product of a block-diagonal matrix, given as its blocks, with a vector."""
    return (blocks @ values.reshape(len(blocks), -1, 1)).reshape(-1)


def compose(second: LinearMap, first: LinearMap, precision: float = 0.0) -> LinearMap:
    """``second @ first`` for maps whose numbers were rounded to the type of a model.

    A diagonal map of one channel is broadcast to any number of channels. A bias that cancels to within `precision` of
    its terms becomes zero: the rest is the rounding of those terms to the type of the model. Whether the bias is zero
    decides whether a zero padding may follow (`compose_geometry`).
    """
    second, first = second.broadcast(first.geometry.out_channels), first.broadcast(second.geometry.in_channels)
    composed = second @ first
    if not precision or not composed.geometry.biased or not first.geometry.biased:
        return composed
    parts = np.abs(second.bias) + _apply(np.abs(second._sum_taps()), np.abs(first.bias))
    bias = np.where(np.abs(composed.bias) <= precision * parts, 0.0, composed.bias)
    return LinearMap.of(composed.geometry, composed.weight, bias, composed.moved)


def _align(maps: Sequence[LinearMap]) -> tuple[Geometry, list[Array]]:
    """The common stencil of maps of one stride, and their ungrouped weights on it."""
    stencil = require(align_geometry([m.geometry for m in maps]))
    return stencil, [m.regroup(1)._on(stencil) for m in maps]


def stack(*maps: LinearMap) -> LinearMap:
    """Maps of one input, outputs concatenated: (W₁; W₂; …)."""
    if len({m.geometry.in_channels for m in maps}) > 1:
        raise RefusedError("the input channels differ")
    stencil, weights = _align(maps)
    weight, bias = np.concatenate(weights), np.concatenate([m.bias for m in maps])
    moved = np.concatenate([np.zeros_like(m.bias) if m.moved is None else m.moved for m in maps])
    combined = any(m.moved is not None for m in maps)
    geometry = replace(stencil, groups=1, out_channels=len(weight))
    return LinearMap.of(geometry, weight, bias, moved if combined else None)


def hcat(*maps: LinearMap) -> LinearMap:
    """Inputs concatenated, outputs summed: (W₁ W₂ …)."""
    if len({m.geometry.out_channels for m in maps}) > 1:
        raise RefusedError("the output channels differ")
    stencil, weights = _align(maps)
    weight, bias = np.concatenate(weights, axis=1), np.sum([m.bias for m in maps], axis=0)
    return LinearMap.of(replace(stencil, groups=1, in_channels=weight.shape[1]), weight, bias, np.abs(bias))


def split_inputs(linear: LinearMap, sizes: Sequence[int]) -> list[LinearMap]:
    """The maps of consecutive input channels whose outputs sum to an ungrouped map's: `hcat`'s inverse."""
    ends = np.cumsum(sizes)
    weights = np.split(linear.weight, ends[:-1], axis=1)
    biases = [linear.bias, *(np.zeros_like(linear.bias) for _ in sizes[1:])]
    parts = zip(sizes, weights, biases, strict=True)
    return [LinearMap.of(replace(linear.geometry, in_channels=n), w, b) for n, w, b in parts]
