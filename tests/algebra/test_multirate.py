"""Maps between sampling rates are what their definitions say, or refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_maps import apply

from pwopt.algebra import Array
from pwopt.algebra.geometry import Geometry, Refusal, RefusedError
from pwopt.algebra.linear import LinearMap
from pwopt.algebra.multirate import (
    fractional,
    on_phases,
    phase,
    phase_counts,
    phases_geometry,
    through_subsampling,
    to_phases,
)


def repeat(x: Array, factors: tuple[int, ...]) -> Array:
    for axis, r in enumerate(factors):
        x = np.repeat(x, r, axis + 2)
    return x


def interleave(parts: list[Array], counts: tuple[int, ...]) -> Array:
    """y[R·q + j] = part_j[q]."""
    size = [n * r for n, r in zip(parts[0].shape[2:], counts, strict=True)]
    y = np.zeros((*parts[0].shape[:2], *size))
    for part, place in zip(parts, itertools.product(*map(range, counts)), strict=True):
        y[(..., *(slice(j, None, r) for j, r in zip(place, counts, strict=True)))] = part
    return y


@st.composite
def stencils(draw: st.DrawFn, inn: int = 4, strides: tuple[int, ...] = (1,), groups: bool = True) -> LinearMap:
    rank = draw(st.integers(1, 2))
    few = st.integers(0, 3)
    kernel = [draw(st.integers(1, 4)) for _ in range(rank)]
    dilations = [draw(st.sampled_from([1, 1, 2, 3])) for _ in range(rank)]
    pads = [draw(few) for _ in range(2 * rank)]
    steps = [draw(st.sampled_from(strides)) for _ in range(rank)]
    g = draw(st.sampled_from([1, 2, inn])) if groups else 1
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    weight = rng.normal(size=(2 * g, inn // g, *kernel))
    return LinearMap.conv(weight, rng.normal(size=2 * g), groups=g, strides=steps, dilations=dilations, pads=pads)


def size_for(draw: st.DataObject, linear: LinearMap, factors: tuple[int, ...]) -> list[int]:
    """Sizes for which the map has at least one output."""
    g = linear.geometry
    found = []
    for axis, r in enumerate(factors):
        reach = g.dilations[axis] * (g.kernel[axis] - 1) + 1 - g.pads[axis] - g.pads[axis + g.rank]
        found.append(draw.draw(st.integers(max(1, -(-reach // r)), max(1, -(-reach // r)) + 4)))
    return found


@given(st.data())
@settings(max_examples=300)
def test_phases_of_a_stencil_on_repeated_positions(data: st.DataObject) -> None:
    linear = data.draw(stencils(strides=(1, 1, 1, 2, 4)))
    g = linear.geometry
    factors = tuple(data.draw(st.integers(1, 4)) for _ in range(g.rank))
    x = np.random.default_rng(1).normal(size=(2, 4, *size_for(data, linear, factors)))
    expected = apply(linear, repeat(x, factors))
    counts = phase_counts(g, factors)
    if isinstance(counts, Refusal):
        return
    parts = []
    for place in itertools.product(*map(range, counts)):
        moved = phase(g, factors, counts, place)
        assert min(moved.geometry.pads) >= 0
        parts.append(apply(moved.load(linear), x))
        assert parts[-1].shape[2:] == tuple(n // r for n, r in zip(expected.shape[2:], counts, strict=True))
    np.testing.assert_allclose(interleave(parts, counts), expected, rtol=1e-12, atol=1e-12)


@given(st.data())
@settings(max_examples=300)
def test_phases_of_a_stencil_on_what_is_as_long(data: st.DataObject) -> None:
    """Beside what was repeated lie positions that were not: their phases have strides."""
    linear = data.draw(stencils())
    g = linear.geometry
    factors = tuple(data.draw(st.integers(1, 4)) for _ in range(g.rank))
    counts = phase_counts(g, factors)
    size = [n * r for n, r in zip(size_for(data, linear, factors), factors, strict=True)]
    x = np.random.default_rng(1).normal(size=(2, 4, *size))
    expected = apply(linear, x)
    if isinstance(counts, Refusal):
        return
    parts = []
    for place in itertools.product(*map(range, counts)):
        moved = phase(g, (1,) * g.rank, counts, place)
        parts.append(apply(moved.load(linear), x))
        assert parts[-1].shape[2:] == tuple(n // r for n, r in zip(expected.shape[2:], counts, strict=True))
    np.testing.assert_allclose(interleave(parts, counts), expected, rtol=1e-12, atol=1e-12)


@given(st.data())
@settings(max_examples=300)
def test_one_transposed_convolution(data: st.DataObject) -> None:
    linear = data.draw(stencils())
    g = linear.geometry
    factors = tuple(data.draw(st.integers(1, 4)) for _ in range(g.rank))
    x = np.random.default_rng(1).normal(size=(2, 4, *size_for(data, linear, factors)))
    moved = fractional(g, factors)
    assert not isinstance(moved, Refusal)
    found = apply(moved.load(linear), x)
    np.testing.assert_allclose(found, apply(linear, repeat(x, factors)), rtol=1e-12, atol=1e-12)


@given(st.data())
@settings(max_examples=300)
def test_a_stencil_on_subsampled_positions(data: st.DataObject) -> None:
    """For every length at which the blocks can be concatenated."""
    blocks = data.draw(st.integers(1, 4))
    linear = data.draw(stencils(inn=2 * blocks, strides=(1, 1, 2, 3), groups=False))
    g = linear.geometry
    steps = tuple(data.draw(st.integers(1, 4)) for _ in range(g.rank))
    offsets = [tuple(data.draw(st.integers(0, r - 1)) for r in steps) for _ in range(blocks)]
    inner = size_for(data, linear, (1,) * g.rank)
    size = []
    for axis, (n, r) in enumerate(zip(inner, steps, strict=True)):
        low, high = max(o[axis] for o in offsets) - r + 1, min(o[axis] for o in offsets)
        size.append(r * n + data.draw(st.integers(low, high)))
    x = np.random.default_rng(1).normal(size=(2, 2, *size))
    parts = [x[(..., *(slice(o, None, r) for o, r in zip(place, steps, strict=True)))] for place in offsets]
    assert {p.shape[2:] for p in parts} == {tuple(inner)}
    order = data.draw(st.permutations(range(2 * blocks)))
    found = through_subsampling(linear, steps, offsets, order)
    read = np.concatenate(parts, axis=1)[:, np.argsort(order)]  # input order[n] is channel n of the blocks
    np.testing.assert_allclose(apply(found, x), apply(linear, read), rtol=1e-12, atol=1e-12)


def transposed(kernel: tuple[int, ...], **changes: object) -> LinearMap:
    rng = np.random.default_rng(0)
    ones, rank = (1,) * len(kernel), len(kernel)
    geometry = Geometry(3, 4, 1, kernel, kernel, ones, (0,) * 2 * rank, transposed=True, output_padding=(0,) * rank)
    return LinearMap.of(replace(geometry, **changes), rng.normal(size=(3, 4, *kernel)), rng.normal(size=3))  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", [(2,), (2, 2), (3, 2), (1, 2), (2, 3, 2)])
def test_windows_side_by_side_are_a_pointwise_map_to_phases(kernel: tuple[int, ...]) -> None:
    linear = transposed(kernel)
    x = np.random.default_rng(1).normal(size=(2, 4, 3, 4, 2)[: 2 + len(kernel)])
    wide = to_phases(linear)
    assert wide.geometry.pointwise
    parts = np.split(apply(wide, x), int(np.prod(kernel)), axis=1)
    np.testing.assert_allclose(interleave(parts, kernel), apply(linear, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"strides": (1, 1)},
        {"pads": (0, 0, 1, 0)},
        {"output_padding": (1, 0)},
        {"dilations": (2, 1)},
        {"strides": (3, 2)},
    ],
)
def test_windows_that_overlap_or_are_cut_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(RefusedError, match="its windows overlap, or are cut"):
        to_phases(transposed((2, 2), **changes))


def test_a_single_tap_has_no_dilation() -> None:
    plain = transposed((1, 2)).geometry
    assert phases_geometry(replace(plain, dilations=(3, 1))) == phases_geometry(plain)
    assert not isinstance(phases_geometry(plain), Refusal)


def test_kernels_have_no_taps_that_are_always_zero() -> None:
    """Where all that are not lie apart, that is a dilation."""
    far = phase(Geometry(1, 1, 1, (3,), (1,), (4,), (4, 4)), (2,), (2,), (1,)).geometry
    assert (far.kernel, far.dilations, far.pads) == ((3,), (2,), (2, 2))
    linear = LinearMap.conv(np.ones((1, 1, 3)), pads=[1, 1])
    whole = through_subsampling(linear, (2,), [(0,)], [0])
    assert (whole.geometry.kernel, whole.geometry.dilations, whole.geometry.pads) == ((3,), (2,), (2, 2))


def test_an_ordinary_convolution_spreads_nothing() -> None:
    """It gathers, though its kernel is its stride as well."""
    g = replace(transposed((2, 2)).geometry, transposed=False)
    with pytest.raises(RefusedError, match="its windows overlap, or are cut"):
        to_phases(LinearMap.of(g, np.ones((g.out_channels, g.in_channels, 2, 2))))


def test_groups_of_windows_are_refused() -> None:
    g = replace(transposed((2, 2)).geometry, out_channels=4, groups=2)
    with pytest.raises(RefusedError, match="its windows overlap, or are cut"):
        to_phases(LinearMap.of(g, np.ones((4, 2, 2, 2))))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_pointwise_map_on_phases(groups: int) -> None:
    rng = np.random.default_rng(0)
    linear = LinearMap.conv(rng.normal(size=(6, 4 // groups, 1, 1)), rng.normal(size=6), groups=groups)
    phases = [rng.normal(size=(2, 4, 3, 5)) for _ in range(6)]
    found = np.split(apply(on_phases(linear, 6), np.concatenate(phases, axis=1)), 6, axis=1)
    expected = apply(linear, interleave(phases, (2, 3)))
    np.testing.assert_allclose(interleave(found, (2, 3)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"strides": (2,)}, "a stride of 2 reads 3 equal positions unevenly"),
        ({"pads": (1, 0)}, "its output does not have 3 positions for each one that was repeated"),
        ({"auto_pad": "SAME_UPPER"}, "automatic padding and transposed convolutions have no phases of a known size"),
        ({"transposed": True}, "automatic padding and transposed convolutions have no phases of a known size"),
    ],
)
def test_what_has_no_phases(changes: dict[str, object], reason: str) -> None:
    g = replace(Geometry(1, 1, 1, (3,), (1,), (1,), (1, 1)), **changes)  # type: ignore[arg-type]
    assert phase_counts(g, (3,)) == Refusal(reason)


@pytest.mark.parametrize("changes", [{"strides": (2,)}, {"auto_pad": "SAME_UPPER"}, {"transposed": True}])
def test_what_is_not_transposed(changes: dict[str, object]) -> None:
    g = replace(Geometry(1, 1, 1, (3,), (1,), (1,), (1, 1)), **changes)  # type: ignore[arg-type]
    assert isinstance(fractional(g, (2,)), Refusal)


@pytest.mark.parametrize("changes", [{"groups": 2, "in_channels": 8}, {"auto_pad": "SAME_UPPER"}, {"transposed": True}])
def test_what_does_not_read_all_blocks_is_refused(changes: dict[str, object]) -> None:
    g = replace(Geometry(2, 4, 1, (3,), (1,), (1,), (1, 1)), **changes)  # type: ignore[arg-type]
    with pytest.raises(RefusedError):
        through_subsampling(LinearMap.of(g, np.ones((2, 4, 3))), (2,), [(0,), (1,)], range(4))
    whole = LinearMap.of(replace(g, groups=1), np.ones((2, g.in_channels, 3)))
    with pytest.raises(RefusedError):
        through_subsampling(whole, (2,), [(0,)] * 3, range(4))
