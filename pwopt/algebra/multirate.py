"""Maps between sampling rates: stencils on repeated and on subsampled positions, and the phases of their outputs.

Repetition by r is u[n] = x[⌊n/r⌋] for 0 ≤ n < r·N. Since ⌊n/r⌋ lies outside of 0 … N − 1 exactly where n lies outside
of 0 … r·N − 1, the zeros around x are the zeros around u, and u[n] = x[⌊n/r⌋] holds for every n. Phase j of R of a map
y is y[R·q + j]. All of it is separable: each spatial axis has factors of its own, and the proofs are about one axis,
with kernel k, dilation d, stride s and padding b, e before and after.

References
----------
Vaidyanathan, "Multirate Systems and Filter Banks", 1993: noble identities, polyphase form. Shi et al., "Real-Time
Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural Network", 2016.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pwopt.algebra.geometry import Geometry, Refusal, RefusedError, pointwise_geometry, require
from pwopt.algebra.linear import LinearMap

Index = tuple[Any, ...]


@dataclass(frozen=True)
class Moved:
    """A stencil whose taps move to other places; taps that move to the same place are added.

    Attributes
    ----------
    geometry : Geometry
    places : tuple of tuple of int
        For each axis, the first place on the new kernel that each tap moves to.
    width : tuple of int
        How many places along each axis a tap covers after the move.
    """

    geometry: Geometry
    places: tuple[tuple[int, ...], ...]
    width: tuple[int, ...]

    def load(self, linear: LinearMap) -> LinearMap:
        """Move the numbers; `linear` may have fewer inputs than the geometry, or no bias."""
        g = linear.geometry
        weight = np.zeros((*linear.weight.shape[:2], *self.geometry.kernel))
        for tap in itertools.product(*map(range, g.kernel)):
            begins = [places[t] for places, t in zip(self.places, tap, strict=True)]
            where: Index = (..., *(slice(p, p + n) for p, n in zip(begins, self.width, strict=True)))
            seen: Index = (..., *(slice(t, t + 1) for t in tap))
            weight[where] += linear.weight[seen]
        return LinearMap.of(replace(self.geometry, in_channels=g.in_channels), weight, linear.bias, linear.moved)


def phase_counts(geometry: Geometry, repeats: Sequence[int]) -> tuple[int, ...] | Refusal:
    """The number of phases along each axis of a stencil on repeated positions, all of equal size.

    There is one phase if the stride is a multiple of the factor r. There are r if the stride is 1 and r divides
    b + e − d(k − 1), by which the output is longer than the r·N positions of the input.
    """
    g = geometry
    if g.auto_pad or g.transposed:
        return Refusal("automatic padding and transposed convolutions have no phases of a known size")
    counts = []
    for axis, factor in enumerate(repeats):
        longer = g.pads[axis] + g.pads[axis + g.rank] - g.dilations[axis] * (g.kernel[axis] - 1)
        if g.strides[axis] % factor == 0:
            counts.append(1)
        elif g.strides[axis] > 1:
            return Refusal(f"a stride of {g.strides[axis]} reads {factor} equal positions unevenly")
        elif longer % factor:
            return Refusal(f"its output does not have {factor} positions for each one that was repeated")
        else:
            counts.append(factor)
    return tuple(counts)


def phase(geometry: Geometry, repeats: Sequence[int], counts: Sequence[int], place: Sequence[int]) -> Moved:
    """One phase of a stencil on repeated positions, as a stencil on the positions that are repeated.

    y[R·q + j] = Σ w[k]·u[s(R·q + j) + d·k − b], where u[n] = x[⌊n/r⌋] for every n. If r divides s·R, that is
    Σ w[k]·x[(s·R/r)·q + ⌊(s·j + d·k − b)/r⌋], a stencil of stride s·R/r. Taps that read the same position add up. Its
    padding after must be such that it has as many outputs as the phase, whatever N is; with `high` the last offset:

    * R = 1, r divides s: ⌊(r·N + b + e − d(k − 1) − 1)/s⌋ = ⌊(N + a)/(s/r)⌋ for a = ⌊(b + e − d(k − 1) − 1)/r⌋, so
      that the padding is a + 1 + high, which is not negative, since e is not.
    * s = 1, R = r: N + (b + e − d(k − 1))/r outputs take a padding of (b + e − d(k − 1))/r + high = ⌊(j + e)/r⌋.
    * s = r = 1, on a length R·N that others were repeated to: N + (b + e − d(k − 1))/R outputs take a padding between
      j + e − R + 1 and j + e.

    Parameters
    ----------
    geometry : Geometry
    repeats : sequence of int
        r for each axis: that of the input, or ones for what is as long as others are repeated.
    counts : sequence of int
        R for each axis, from `phase_counts` of what was repeated.
    place : sequence of int
        j for each axis.
    """
    g, rank = geometry, geometry.rank
    kernel, strides, dilations, begins, ends, places = [], [], [], [], [], []
    for axis, (r, count, j) in enumerate(zip(repeats, counts, place, strict=True)):
        k, d, s, b, e = g.kernel[axis], g.dilations[axis], g.strides[axis], g.pads[axis], g.pads[axis + rank]
        offsets = [(s * j + d * t - b) // r for t in range(k)]
        longer, high = b + e - d * (k - 1), max(offsets)
        if count == 1:
            after = (longer - 1) // r + 1 + high
        elif r == count:
            after = longer // r + high
        else:
            after = max(0, j + e - count + 1)
        low = min(0, *offsets)  # a stencil cannot begin behind where it is
        step = math.gcd(*(o - low for o in offsets)) or 1
        kernel.append((high - low) // step + 1)
        strides.append(s * count // r)
        dilations.append(step)
        begins.append(-low)
        ends.append(after)
        places.append(tuple((o - low) // step for o in offsets))
    moved = replace(g, kernel=tuple(kernel), strides=tuple(strides), dilations=tuple(dilations), pads=(*begins, *ends))
    return Moved(moved, tuple(places), (1,) * rank)


def fractional(geometry: Geometry, repeats: Sequence[int]) -> Moved | Refusal:
    """A stencil of stride 1 on repeated positions, as one transposed convolution of stride r.

    u[n] = Σ_q x[q]·[0 ≤ n − r·q < r], so y[p] = Σ_q x[q]·v[p − r·q] with v[t] = Σ_k w[k]·[0 ≤ t + d·k − b < r]: each
    tap covers r places from b − d·k on, of which there are r + d(k − 1). A transposed convolution with that kernel cuts
    d(k − 1) − b positions off before and d(k − 1) − e after, of either length; where that is negative, its kernel has
    as many zeros more on that side.
    """
    g, rank = geometry, geometry.rank
    if g.auto_pad or g.transposed:
        return Refusal("automatic padding and transposed convolutions are not transposed")
    if any(s > 1 for s in g.strides):
        return Refusal("a stride is left over")
    kernel, begins, ends, places = [], [], [], []
    for axis, r in enumerate(repeats):
        reach = g.dilations[axis] * (g.kernel[axis] - 1)
        before, after = reach - g.pads[axis], reach - g.pads[axis + rank]
        first = max(0, -before)
        kernel.append(first + reach + r + max(0, -after))
        begins.append(max(0, before))
        ends.append(max(0, after))
        places.append(tuple(first + reach - g.dilations[axis] * t for t in range(g.kernel[axis])))
    moved = replace(
        g,
        kernel=tuple(kernel),
        strides=tuple(repeats),
        dilations=(1,) * rank,
        pads=(*begins, *ends),
        transposed=True,
        output_padding=(0,) * rank,
    )
    return Moved(moved, tuple(places), tuple(repeats))


def through_subsampling(
    linear: LinearMap, steps: Sequence[int], offsets: Sequence[Sequence[int]], order: Sequence[int]
) -> LinearMap:
    """A stencil on the concatenation of z_j[q] = x[r·q + o_j], 0 ≤ o_j < r, as one stencil of stride r·s on x.

    z_j[q] = x[r·q + o_j] holds for every q, zeros included: r·q + o_j < 0 exactly where q < 0, and r·q + o_j ≥ N
    exactly where q ≥ ⌈(N − o_j)/r⌉, the length of z_j. So tap k of block j is tap r·d·k + o_j of a stencil of stride
    r·s with padding r·b before. All z_j have one length Q, which says N = r·Q + c with max o − r < c ≤ min o. With
    padding r·e after there are ⌊(r(Q + b + e − d(k − 1) − 1) + r + c − max o − 1)/(r·s)⌋ + 1 outputs, and r + c − max o
    − 1 lies between 0 and r − 1: as many as before.

    Parameters
    ----------
    linear : LinearMap
        Its inputs are as many blocks of equal width as there are offsets, in any order.
    steps : sequence of int
        r for each axis.
    offsets : sequence of sequence of int
        o for each block and axis.
    order : sequence of int
        Which inputs are those of the first block, of the second, and so on.
    """
    g, blocks = linear.geometry, len(offsets)
    if g.groups > 1 or g.in_channels % blocks:
        raise RefusedError("its groups do not read all of the blocks")
    if g.auto_pad or g.transposed:
        raise RefusedError("automatic padding depends on an input size that is not known")
    rank, kernel, dilations, begins, places = g.rank, [], [], [], []
    for axis, r in enumerate(steps):
        taps = [[r * (g.dilations[axis] * t - g.pads[axis]) + o[axis] for t in range(g.kernel[axis])] for o in offsets]
        low, high = min(0, *(min(row) for row in taps)), max(max(row) for row in taps)
        step = math.gcd(*(t - low for row in taps for t in row)) or 1
        kernel.append((high - low) // step + 1)
        dilations.append(step)
        begins.append(-low)
        places.append([[(t - low) // step for t in row] for row in taps])
    inn = g.in_channels // blocks
    weight = np.zeros((g.out_channels, inn, *kernel))
    parts = linear.weight[:, list(order)].reshape(g.out_channels, blocks, inn, *g.kernel)
    for block, tap in itertools.product(range(blocks), itertools.product(*map(range, g.kernel))):
        where: Index = (..., *(places[axis][block][t] for axis, t in enumerate(tap)))
        seen: Index = (slice(None), block, slice(None), *tap)
        weight[where] += parts[seen]
    ends = [r * e for r, e in zip(steps, g.pads[rank:], strict=True)]
    strides = tuple(r * s for r, s in zip(steps, g.strides, strict=True))
    geometry = Geometry(g.out_channels, inn, 1, tuple(kernel), strides, tuple(dilations), (*begins, *ends))
    return LinearMap.of(geometry, weight, linear.bias, linear.moved)


def phases_geometry(geometry: Geometry) -> Geometry | Refusal:
    """A transposed convolution whose windows neither overlap nor leave gaps, as a pointwise map to all phases.

    y[k·p + t] = W_t·x[p] + b where the kernel is as large as the stride: channel t·C + c of the pointwise map is
    channel c of phase t, the phases in the order of the kernel's taps.
    """
    g = geometry
    if not g.transposed or g.kernel != g.strides or g.padded or any(g.output_padding) or g.groups > 1:
        return Refusal("its windows overlap, or are cut")
    if any(d != 1 for d, k in zip(g.dilations, g.kernel, strict=True) if k > 1):
        return Refusal("its windows overlap, or are cut")
    return pointwise_geometry(g.out_channels * g.taps, g.in_channels, rank=g.rank, biased=g.biased)


def to_phases(linear: LinearMap) -> LinearMap:
    """The numbers of `phases_geometry`."""
    geometry, g = require(phases_geometry(linear.geometry)), linear.geometry
    weight = np.moveaxis(linear.weight.reshape(g.out_channels, g.in_channels, g.taps), 2, 0)
    return LinearMap.of(geometry, weight, np.tile(linear.bias, g.taps))


def on_phases(linear: LinearMap, count: int) -> LinearMap:
    """Apply a pointwise map to each of `count` phases, which are concatenated as channels.

    The map acts on each position alone, so it does the same to position R·q + j as to phase j at q. Each group of the
    map becomes a group of every phase.
    """
    g = linear.geometry
    geometry = replace(
        g, out_channels=count * g.out_channels, in_channels=count * g.in_channels, groups=count * g.groups
    )
    weight = np.tile(linear.weight, (count, *(1,) * (linear.weight.ndim - 1)))
    return LinearMap.of(geometry, weight, np.tile(linear.bias, count))


def over_time(linear: LinearMap) -> list[LinearMap]:
    """Split a stencil over an axis and a plane into one stencil of the plane per tap along the axis; the first has the
    bias.

    y[t, p] = Σ_j Σ_k W[j, k]·x[s·t + d·j − b, …] is a sum over j of stencils of the plane, each on the axis' positions
    s·t + d·j − b, with zeros where those lie outside.
    """
    g, rank = linear.geometry, linear.geometry.rank
    pads = (*g.pads[1:rank], *g.pads[rank + 1 :])
    plane = replace(g, kernel=g.kernel[1:], strides=g.strides[1:], dilations=g.dilations[1:], pads=pads)
    biases = [linear.bias, *(np.zeros_like(linear.bias) for _ in range(1, g.kernel[0]))]
    return [LinearMap.of(plane, linear.weight[:, :, j], bias) for j, bias in enumerate(biases)]
