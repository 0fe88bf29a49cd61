"""Figures of the deviation between two arrays: error, units in the last place, cosine, signal to noise, ranking.

Arrays are processed in pieces, so that large outputs need little additional memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pwopt.algebra import Array, Values
from pwopt.evidence.rankings import compare_rankings
from pwopt.graph.dtypes import epsilon, is_floating, overflow

#: Number of elements in one piece. Its temporary arrays fit into the caches of a processor.
PIECE = 1 << 16
#: Maximum number of randomly selected elements for the 99th percentile of units in the last place.
MAX_SAMPLED = 1 << 17
#: Maximum number of pairs for a scatter plot.
MAX_SCATTER_PAIRS = 500
#: Bins of log₁₀ of the absolute error: half a decade each, from a tenth of float64's epsilon to far above any output.
EDGES = tuple(float(e) for e in np.arange(-17.0, 9.5, 0.5))
#: Default relative and absolute tolerance by type: a few hundred rounding errors.
TOLERANCES = {"float64": (1e-9, 1e-10), "float32": (1e-4, 1e-5), "float16": (1e-2, 1e-3), "bfloat16": (5e-2, 1e-2)}

#: Reason for outputs that are not finite at the same places.
NOT_FINITE_ALIKE = "NaN or infinity at different places"


@dataclass(frozen=True)
class Tolerance:
    """A deviation is within the tolerance if it is at most atol + rtol · |reference|."""

    rtol: float
    atol: float


@dataclass(frozen=True)
class Histogram:
    """Counts of log₁₀ of the absolute error between `edges`, those beyond in the outer bins; `zero` are exact."""

    edges: tuple[float, ...] = EDGES
    counts: tuple[int, ...] = (0,) * (len(EDGES) - 1)
    zero: int = 0

    def __add__(self, other: Histogram) -> Histogram:
        return replace(
            self,
            counts=tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)),
            zero=self.zero + other.zero,
        )


@dataclass(frozen=True)
class Agreement:
    """Deviation of a value from a reference of the same shape and type, over the finite elements.

    If one of them is infinite, and the other is finite, of the same sign, and at least half of the smallest number that
    overflows, the infinity counts as that number.

    Attributes
    ----------
    max_abs, mean_abs : float
        Largest and mean absolute deviation.
    max_rel : float
        Largest deviation relative to the reference's magnitude at that element.
    mismatch : float
        Fraction of unequal elements.
    scale, resolution : float
        Largest magnitude of the reference, and the machine epsilon of its type there.
    ulp, ulp_p99 : float or None
        Units in the last place between them, at most and for 99 % of (at most 131,072, randomly drawn) elements:
        how many numbers of the type lie between. Of values near zero it says little. None unless floating point.
    cosine : float or None
        Cosine of the angle between both, as vectors.
    snr_db : float or None
        Σ reference² / Σ deviation², in decibels; infinite if there is no deviation.
    top1, top5 : float or None
        Along the axis of classes (the last one; the second one of four and more), the fraction of positions
        where the largest entry is the same, and the mean overlap of the five largest. None where there is nothing to
        rank.
    histogram : Histogram
    scatter : tuple of (float, float)
        At most 500 randomly drawn pairs of reference and value.
    within : bool
        Whether every deviation is within the tolerance.
    note : str
        Why they cannot be compared at all, or "".
    size, compared, left_out : int
        Number of elements, of those that are finite, and of those that are no evidence (see `find_unsettled`).
    """

    max_abs: float = 0.0
    mean_abs: float = 0.0
    max_rel: float = 0.0
    mismatch: float = 0.0
    scale: float = 0.0
    resolution: float = 0.0
    ulp: float | None = None
    ulp_p99: float | None = None
    cosine: float | None = None
    snr_db: float | None = None
    top1: float | None = None
    top5: float | None = None
    histogram: Histogram = field(default_factory=Histogram, repr=False)
    scatter: tuple[tuple[float, float], ...] = field(default=(), repr=False)
    within: bool = True
    note: str = ""
    size: int = 0
    compared: int = 0
    left_out: int = 0

    def worse(self, other: Agreement) -> Agreement:
        """The worse of every figure of two samples."""
        return Agreement(
            max(self.max_abs, other.max_abs),
            max(self.mean_abs, other.mean_abs),
            max(self.max_rel, other.max_rel),
            max(self.mismatch, other.mismatch),
            max(self.scale, other.scale),
            max(self.resolution, other.resolution),
            _choose(max, self.ulp, other.ulp),
            _choose(max, self.ulp_p99, other.ulp_p99),
            _choose(min, self.cosine, other.cosine),
            _choose(min, self.snr_db, other.snr_db),
            _choose(min, self.top1, other.top1),
            _choose(min, self.top5, other.top5),
            self.histogram + other.histogram,
            max(self, other, key=lambda a: (a.max_abs, len(a.scatter))).scatter,
            self.within and other.within,
            self.note or other.note,
            self.size + other.size,
            self.compared + other.compared,
            self.left_out + other.left_out,
        )

    @classmethod
    def disagree(cls, note: str, size: int = 0) -> Agreement:
        """Return the result for arrays of `size` elements that cannot be compared because of `note`."""
        return cls(np.inf, np.inf, np.inf, 1.0, within=False, note=note, size=size, compared=size)


def _choose(choose: Callable[[float, float], float], a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else choose(a, b)


def find_unsettled(reference: Values, *others: Values) -> Values | None:
    """Find elements at which runs of one model disagree about NaN and infinities.

    They are no evidence against another model. An example are sums near the largest number of float16, 65,504, which
    overflow with one order of summation and not with another.

    Parameters
    ----------
    reference, others : array
        One output of each run. Others of a different shape or type are ignored.

    Returns
    -------
    array of bool or None
        Of the shape of `reference`; None if they agree everywhere.
    """
    if not is_floating(reference.dtype):
        return None
    form = reference.shape, reference.dtype
    alike = [o for o in others if (o.shape, o.dtype) == form]
    if all(bool(np.isfinite(p).all()) for pieces in _pieces(reference, *alike) for p in pieces):
        return None
    apart = np.zeros(reference.size, bool)
    for i, pieces in enumerate(_pieces(reference, *alike)):
        first, *rest = (_special(p.astype(np.float64)) for p in pieces)
        for other in rest:
            apart[i * PIECE : i * PIECE + first.size] |= ~((first == other) | (np.isnan(first) & np.isnan(other)))
    return apart.reshape(reference.shape) if apart.any() else None


def _special(x: Array) -> Array:
    """Keep NaN and infinities, and replace finite numbers by 0."""
    special: Array = np.where(np.isfinite(x), 0.0, x)
    return special


def agreement(
    reference: Values,
    value: Values,
    rtol: float | None = None,
    atol: float | None = None,
    *,
    brief: bool = False,
    without: Values | None = None,
    kind: np.dtype[Any] | None = None,
) -> Agreement:
    """Compare two outputs.

    Parameters
    ----------
    reference, value : array
    rtol, atol : float, optional
        |deviation| ≤ atol · s + rtol · |reference| is within the tolerance; by default those of `TOLERANCES`, and s the
        root mean square of the reference or 1 if that is smaller. A given `atol` is taken as it is, s = 1.
    brief : bool
        Omit what the verdict does not need: units in the last place, rankings, histogram and scatter.
    without : array of bool, optional
        Elements to leave out, as `find_unsettled` finds them.
    kind : dtype, optional
        The floating-point type whose tolerance and precision apply; by default that of the reference.
    """
    if reference.shape != value.shape or reference.dtype != value.dtype:
        became = f"{value.dtype}{list(value.shape)}"
        return Agreement.disagree(f"{reference.dtype}{list(reference.shape)} became {became}")
    if reference.size == 0:
        return Agreement()
    if not is_floating(reference.dtype):
        return _discrete(reference, value)
    arrays = (reference, value) if without is None else (reference, value, without)
    return _continuous(arrays, rtol, atol, brief, reference.dtype if kind is None else kind)


def finite_pieces(reference: Values, value: Values, without: Values | None) -> Iterator[tuple[Array, Array]]:
    """Yield the finite elements of two arrays in float64, piece by piece.

    Raises
    ------
    ValueError
        If NaN or infinities are at different places.
    """
    arrays = (reference, value) if without is None else (reference, value, without)
    for x, y, *_ in map(_finite, _pieces(*arrays)):
        yield x, y


def find_tolerance(
    reference: Values,
    without: Values | None,
    rtol: float | None = None,
    atol: float | None = None,
    kind: np.dtype[Any] | None = None,
) -> Tolerance:
    """Return the tolerance for one output; parameters as for `agreement`."""
    squares, compared, reach = 0.0, 0, 0.0
    for x, _ in finite_pieces(reference, reference, without):
        reach, compared = max(reach, float(np.max(np.abs(x), initial=0.0))), compared + x.size
    unit = reach or 1.0  # squares of float64's largest numbers would overflow
    for x, _ in finite_pieces(reference, reference, without):
        squares += float(np.sum((x / unit) ** 2))
    return _tolerance(rtol, atol, kind or reference.dtype, unit * math.sqrt(squares / max(1, compared)))


def _tolerance(rtol: float | None, atol: float | None, kind: np.dtype[Any], mean_square: float) -> Tolerance:
    default = TOLERANCES.get(str(kind), TOLERANCES["float32"])
    return Tolerance(default[0] if rtol is None else rtol, default[1] * min(1.0, mean_square) if atol is None else atol)


def _pieces(*arrays: Values) -> Iterator[tuple[Values, ...]]:
    flat = [a.reshape(-1) for a in arrays]
    for start in range(0, flat[0].size, PIECE):
        yield tuple(f[start : start + PIECE] for f in flat)


def _discrete(reference: Values, value: Values) -> Agreement:
    different, gap, total, scale = 0, 0.0, 0.0, 0.0
    for a, b in _pieces(reference, value):
        different += int(np.sum(a != b))
        if a.dtype.kind in "iu":
            x, y = a.astype(np.float64), b.astype(np.float64)
            gap, total = max(gap, float(np.max(np.abs(x - y)))), total + float(np.sum(np.abs(x - y)))
            scale = max(scale, float(np.max(np.abs(x))))
    mismatch = different / reference.size
    return Agreement(
        max_abs=gap, mean_abs=total / reference.size, mismatch=mismatch, scale=scale, within=not different,
        size=reference.size, compared=reference.size,
    )  # fmt: skip


def _finite(pieces: Sequence[Values]) -> tuple[Array, Array, Values, Values]:
    """Select the finite elements of two pieces, in float64 and unchanged; a third piece marks elements to leave out.

    Raises
    ------
    ValueError
        If NaN or infinities are at different places.
    """
    a, b = pieces[:2]
    if len(pieces) > 2:
        a, b = a[~pieces[2]], b[~pieces[2]]
    x, y = a.astype(np.float64), b.astype(np.float64)
    if np.isfinite(x).all() and np.isfinite(y).all():
        return x, y, a, b
    limit = overflow(a.dtype)
    edge = (np.isinf(x) != np.isinf(y)) & (np.sign(x) == np.sign(y)) & (np.minimum(np.abs(x), np.abs(y)) >= limit / 2)
    x, y = (np.where(edge, np.clip(v, -limit, limit), v) for v in (x, y))
    if not np.array_equal(_special(x), _special(y), equal_nan=True):
        raise ValueError
    finite = np.isfinite(x)
    return x[finite], y[finite], a[finite], b[finite]


@dataclass
class _Sums:
    """Sums and maxima over the finite pieces of two arrays so far. Values are divided by `unit` before squaring.

    `excess` is the largest deviation minus `rtol` times the magnitude of the reference.
    """

    rtol: float
    unit: float
    brief: bool
    scale: float = 0.0
    compared: int = 0
    worst: float = 0.0
    total: float = 0.0
    relative: float = 0.0
    excess: float = -math.inf
    unequal: int = 0
    squares: float = 0.0
    others: float = 0.0
    product: float = 0.0
    noise: float = 0.0
    steps: float = 0.0
    bins: Values = field(default_factory=lambda: np.zeros(len(EDGES) - 1, np.int64))

    def add(self, x: Array, y: Array, a: Values, b: Values) -> None:
        """Add a piece of the reference and of the value: in float64, and unchanged."""
        if not x.size:
            return
        size, error = np.abs(x), np.abs(x - y)
        self.compared += x.size
        self.scale, self.worst = max(self.scale, float(size.max())), max(self.worst, float(error.max()))
        self.total += float(error.sum())
        self.excess = max(self.excess, float(np.max(error - self.rtol * size)))
        self.relative = max(self.relative, float(np.max(error / np.maximum(size, np.finfo(np.float32).tiny))))
        self.unequal += int(np.count_nonzero(error))
        if not self.brief:
            self.steps = max(self.steps, float(np.max(ulps(a, b))))
            self.bins += _count_by_magnitude(error)
        if self.unit != 1.0:
            x, y, error = x / self.unit, y / self.unit, error / self.unit
        self.squares += float(np.einsum("i,i->", x, x))
        self.others += float(np.einsum("i,i->", y, y))
        self.product += float(np.einsum("i,i->", x, y))
        self.noise += float(np.einsum("i,i->", error, error))


def _count_by_magnitude(error: Array) -> Values:
    """Count the errors other than 0 in the bins between `EDGES`, which are equally wide."""
    wrong = error[error != 0]
    width = EDGES[1] - EDGES[0]
    places = np.clip((np.log10(wrong) - EDGES[0]) / width, 0, len(EDGES) - 2).astype(np.intp)
    counts: Values = np.bincount(places, minlength=len(EDGES) - 1)
    return counts


def _find_unit(arrays: tuple[Values, ...]) -> float:
    """Find a divisor that keeps squares finite: the largest magnitude in float64, and 1 for smaller types."""
    if arrays[0].dtype.itemsize < 8:
        return 1.0
    largest = (np.max(np.abs(v), initial=0.0) for x, y, *_ in map(_finite, _pieces(*arrays)) for v in (x, y))
    return float(max(largest, default=0.0)) or 1.0


def _continuous(
    arrays: tuple[Values, ...], rtol: float | None, atol: float | None, brief: bool, kind: np.dtype[Any]
) -> Agreement:
    reference, value = arrays[:2]
    left_out = int(np.sum(arrays[2])) if len(arrays) > 2 else 0
    try:
        unit = _find_unit(arrays)
        s = _Sums(_tolerance(rtol, atol, kind, 1.0).rtol, unit, brief)
        for x, y, a, b in map(_finite, _pieces(*arrays)):
            s.add(x, y, a, b)
    except ValueError:
        return replace(Agreement.disagree(NOT_FINITE_ALIKE, reference.size), left_out=left_out)
    if not s.compared:
        return Agreement(size=reference.size, left_out=left_out)
    tolerance = _tolerance(rtol, atol, kind, unit * math.sqrt(s.squares / s.compared))
    found = Agreement(
        max_abs=s.worst, mean_abs=s.total / s.compared, max_rel=s.relative, mismatch=s.unequal / reference.size,
        scale=s.scale, resolution=s.scale * epsilon(kind), cosine=_cosine(s.product, s.squares, s.others),
        snr_db=_decibels(s.squares, s.noise), within=s.excess <= tolerance.atol, size=reference.size,
        compared=s.compared, left_out=left_out,
    )  # fmt: skip
    if brief:
        return found
    xs, ys = _draw_pairs(reference, value, MAX_SAMPLED)
    pairs = [p.astype(np.float64).tolist() for p in _draw_pairs(reference, value, MAX_SCATTER_PAIRS)]
    top1, top5 = compare_rankings(reference, value, PIECE)
    return replace(
        found, ulp=s.steps, ulp_p99=float(np.percentile(ulps(xs, ys), 99)) if xs.size else None, top1=top1, top5=top5,
        histogram=Histogram(EDGES, tuple(s.bins.tolist()), s.compared - s.unequal),
        scatter=tuple(zip(*pairs, strict=True)),
    )  # fmt: skip


def _cosine(product: float, a: float, b: float) -> float | None:
    if not a or not b:
        return 1.0 if a == b else 0.0
    return max(-1.0, min(1.0, product / math.sqrt(a * b)))


def _decibels(signal: float, noise: float) -> float:
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _draw_pairs(reference: Values, value: Values, most: int) -> tuple[Values, Values]:
    """Draw up to `most` finite pairs, reproducibly."""
    a: Values = reference.reshape(-1)
    b: Values = value.reshape(-1)
    if a.size > most:
        picks = np.sort(np.random.default_rng(0).integers(0, a.size, most))
        a, b = a[picks], b[picks]
    finite = np.isfinite(a.astype(np.float64)) & np.isfinite(b.astype(np.float64))
    return a[finite], b[finite]


def ulps(a: Values, b: Values) -> Array:
    """The number of floating-point numbers between two arrays of finite numbers, element by element."""
    bits = np.dtype(f"i{a.dtype.itemsize}")
    x, y = np.ascontiguousarray(a).view(bits).astype(np.int64), np.ascontiguousarray(b).view(bits).astype(np.int64)
    largest = np.iinfo(bits).max
    p, q = x & largest, y & largest  # sign and magnitude, so that neighbours are consecutive
    apart: Array = np.where((x < 0) == (y < 0), np.abs(p - q).astype(np.float64), p.astype(np.float64) + q)
    return apart
