"""Linear maps, evaluated from their definition."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pwopt.algebra import Array
from pwopt.algebra.linear import LinearMap


def _last(index: Sequence[slice | int]) -> tuple[Any, ...]:
    """An index into the last axes."""
    return (Ellipsis, *index)


def _lattice(
    tap: Sequence[int], dilations: Sequence[int], strides: Sequence[int], counts: Sequence[int]
) -> tuple[Any, ...]:
    """The positions dilation·tap + stride·p for p below `counts`, per spatial axis."""
    parts = zip(tap, dilations, strides, counts, strict=True)
    return _last([slice(t * d, t * d + s * (count - 1) + 1, s) for t, d, s, count in parts])


def _contract(weight: Array, x: Array) -> Array:
    """Σ_i weight[g, o, i]·x[n, g, i, …]"""
    product: Array = np.einsum("goi,ngi...->ngo...", weight, x)
    return product


def apply(linear: LinearMap, x: ArrayLike) -> Array:
    """Evaluate on x (N, in_channels, *space) in float64; gives (N, out_channels, *space').

    The definition, written out.
    """
    g, x = linear.geometry, np.asarray(x, np.float64)
    if g.rank != x.ndim - 2 and g.pointwise:
        return apply(linear.at_rank(x.ndim - 2), x)
    if g.auto_pad:
        raise ValueError("a map with automatic padding has no definite output size")
    n, rank = x.shape[0], g.rank
    begins, ends = g.pads[:rank], g.pads[rank:]
    space = x.shape[2:]
    grouped_in = (n, g.groups, g.in_channels // g.groups)
    weight = linear.weight.reshape(g.groups, -1, g.in_channels // g.groups, *g.kernel)
    if g.transposed:
        full = [
            (s - 1) * g.strides[a] + (g.kernel[a] - 1) * g.dilations[a] + 1 + g.output_padding[a]
            for a, s in enumerate(space)
        ]
        y = np.zeros((n, g.out_channels, *full))
        for tap in itertools.product(*map(range, g.kernel)):
            part = _contract(weight[_last(tap)], x.reshape(*grouped_in, *space))
            y[_lattice(tap, g.dilations, g.strides, space)] += part.reshape(n, g.out_channels, *space)
        y = y[_last([slice(b, size - e) for b, e, size in zip(begins, ends, full, strict=True)])]
    else:
        x = np.pad(x, [(0, 0), (0, 0), *zip(begins, ends, strict=True)])
        out = [(x.shape[2 + a] - g.dilations[a] * (g.kernel[a] - 1) - 1) // g.strides[a] + 1 for a in range(rank)]
        y = np.zeros((n, g.out_channels, *out))
        for tap in itertools.product(*map(range, g.kernel)):
            seen = x[_lattice(tap, g.dilations, g.strides, out)].reshape(*grouped_in, *out)
            y += _contract(weight[_last(tap)], seen).reshape(n, g.out_channels, *out)
    return y + linear.bias.reshape(-1, *(1,) * rank)
