"""Every figure against its definition, on arrays small and large."""

from __future__ import annotations

import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from helpers import normal

from pwopt.evidence import metrics
from pwopt.evidence.metrics import EDGES, agreement, ulps

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
