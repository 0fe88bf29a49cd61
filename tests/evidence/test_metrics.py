"""Every figure against its definition, on arrays small and large."""

from __future__ import annotations

import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from helpers import normal

from pwopt.evidence import metrics
from pwopt.evidence.metrics import EDGES, agreement, find_unsettled, ulps

F = np.float32


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_rounding_steps_are_counted(dtype: type) -> None:
    one = np.array([1, -1, 0.5, 0], dtype)
    if dtype is ml_dtypes.bfloat16:
        up = (one.view(np.uint16) + np.uint16(1)).view(dtype)
    else:
        up = np.nextafter(one, np.array([np.inf, -np.inf, np.inf, np.inf], dtype))
    assert ulps(one, up).tolist() == [1, 1, 1, 1]
    assert ulps(up[3:], -up[3:]).tolist() == [2]  # the smallest number on either side of zero
    assert ulps(np.array([-0.0], dtype), np.array([0.0], dtype)).tolist() == [0]


def test_figures_of_known_deviations() -> None:
    x = np.array([[3.0, 4.0, 0.0, 1.0, 2.0, -1.0]], F)
    y = x + np.array([[0, 0, 0, 0, 0, 0.5]], F)
    a = agreement(x, y)
    assert (a.max_abs, a.mean_abs, a.max_rel) == (0.5, 0.5 / 6, 0.5)
    assert a.mismatch == pytest.approx(1 / 6)
    assert a.scale == 4
    assert a.cosine == pytest.approx(float(np.dot(x[0], y[0]) / np.linalg.norm(x) / np.linalg.norm(y)))
    assert a.snr_db == pytest.approx(10 * math.log10(31 / 0.25))
    assert (a.top1, a.top5) == (1.0, 1.0)
    assert a.histogram.zero == 5
    assert sum(a.histogram.counts) == 1
    assert a.histogram.counts[EDGES.index(-0.5)] == 1
    assert set(a.scatter) == {(float(p), float(q)) for p, q in zip(x[0], y[0], strict=True)}
    assert not a.within


def test_rankings_look_along_the_classes() -> None:
    x = normal(2, 7, 3, 4, dtype=F)
    y = x.copy()
    y[0, :, 1, 2] = x[0, ::-1, 1, 2]
    assert agreement(x, y).top1 == pytest.approx(1 - 1 / 24)
    flat = np.array([[1, 2, 3, 4, 5, 6, 7.0]], F)
    assert agreement(flat, flat[:, ::-1].copy()).top1 == 0
    assert agreement(flat, flat[:, ::-1].copy()).top5 == 3 / 5
    tied = np.array([[0, 1, 1, 0]], F)
    assert agreement(tied, np.array([[0, 1, 1.5, 0]], F)).top1 == 1  # either one is as large
    assert agreement(flat[:, :1].copy(), flat[:, :1].copy()).top1 is None
    assert agreement(np.arange(3), np.arange(3)).top1 is None


def test_identical_and_empty() -> None:
    x = normal(3, 9, dtype=F)
    a = agreement(x, x)
    assert (a.max_abs, a.ulp, a.cosine, a.snr_db, a.top1) == (0, 0, 1, math.inf, 1)
    zero = np.zeros((2, 3), F)
    assert agreement(zero, zero).cosine == 1
    assert agreement(zero, zero + F(1)).cosine == 0
    assert agreement(zero[:0], zero[:0]).size == 0


def test_nothing_overflows() -> None:
    x = np.array([1e300, -1e300, np.inf, np.nan], np.float64)
    a = agreement(x, x)
    assert (a.cosine, a.within, a.compared) == (pytest.approx(1), True, 2)


def test_at_the_edge_an_infinity_counts_as_the_smallest_number_that_overflows() -> None:
    """65,504 is float16's largest number, and from 65,520 on it rounds to infinity."""
    h = np.float16
    x, y = np.array([65504, np.inf, 1], h), np.array([np.inf, 65472, 1], h)
    for a, b in ((x, y), (y, x), (-x, -y)):
        found = agreement(a, b)
        assert (found.note, found.max_abs, found.ulp, found.compared) == ("", 48, 2, 3)
    assert agreement(np.array([32750, 1], h), np.array([np.inf, 1], h)).note  # not half of it
    assert agreement(np.array([60000, 1], h), np.array([np.inf, 1], h)).max_abs == 65520 - 60000
    for wrong in (-np.inf, np.nan):
        assert agreement(x, np.array([wrong, np.inf, 1], h)).note == "NaN or infinity at different places"
    top = np.array([np.finfo(F).max, 1], F)
    assert agreement(top, np.array([np.inf, 1], F)).max_abs == 2.0**103  # half a unit of float32's largest
    assert agreement(np.array([1e308, 1]), np.array([np.inf, 1])).max_abs == pytest.approx(0.797e308, rel=1e-3)


def test_what_is_unsettled() -> None:
    x = np.array([[1, np.inf, np.nan], [-np.inf, 4, 5]], np.float16)
    assert find_unsettled(x, x, x) is None
    y = np.array([[1.5, -np.inf, np.nan], [-np.inf, np.inf, 5]], np.float16)
    z = np.array([[np.nan, np.inf, 0], [-np.inf, 4, 5]], np.float16)
    found = find_unsettled(x, y, z)
    assert found is not None
    assert found.tolist() == [[True, True, True], [False, True, False]]
    assert find_unsettled(x, y[:1], y.astype(F)) is None  # another shape or type is another matter
    assert find_unsettled(np.arange(3), np.arange(3)) is None


def test_elements_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(4, 6, dtype=F), normal(4, 6, seed=1, dtype=F)
    without = np.zeros((4, 6), bool)
    without[1:3] = True
    y[1, :4], y[[0, 3]] = (np.nan, np.inf, -np.inf, 1e30), x[[0, 3]] + F(0.5)
    for piece in (1 << 18, 5):
        monkeypatch.setattr(metrics, "PIECE", piece)
        found = agreement(x, y, without=without)
        assert found.max_abs == pytest.approx(0.5, rel=1e-5)
        assert (found.size, found.compared, found.left_out, found.note) == (24, 12, 12, "")
        assert agreement(x, y).note
    nothing = agreement(x, y, without=np.ones((4, 6), bool))
    assert (nothing.compared, nothing.left_out) == (0, 24)


def test_the_absolute_tolerance_shrinks_with_the_output() -> None:
    """An output of 1e-6 must not pass for being small."""
    x = normal(100, dtype=F) * F(1e-6)
    assert not agreement(x, x * F(1.01)).within
    assert agreement(x, x * F(1.00001)).within
    assert agreement(x, x * F(1.01), atol=1e-5).within


def test_large_outputs_are_compared_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(3, 8, 25, 40, dtype=F)
    y = x + normal(3, 8, 25, 40, seed=1, dtype=F) * F(1e-3)
    whole = agreement(x, y)
    monkeypatch.setattr(metrics, "PIECE", 1000)
    pieces = agreement(x, y)
    assert pieces.histogram == whole.histogram
    for name in ("max_abs", "mean_abs", "max_rel", "ulp", "cosine", "snr_db", "top1", "top5"):
        assert getattr(pieces, name) == pytest.approx(getattr(whole, name))


def test_memory_does_not_grow_with_the_output() -> None:
    def peak(size: int) -> int:
        x = np.ones((1, 4, size, 1024), F)
        tracemalloc.start()
        agreement(x, x)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(1024) < 1.1 * peak(512)
