"""Magnitudes of weights: which rows and columns of a matrix are too small to matter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pwopt.algebra import Array
from pwopt.graph.view import View
from pwopt.maps.forms import Reading

Mask = NDArray[np.bool_]
#: The largest activation for which small weights are proven not to matter.
LARGEST_INPUT = 2.0**20
#: A term that is smaller than the others by this factor cannot change their sum in float32 (2⁻²⁵, with a margin of
#: 2⁻²⁰).
NEGLIGIBLE = 2.0**-45
#: The smallest normal number of each type. Processors are many times slower below it. In float16, such numbers still
#: matter.
SMALLEST_NORMAL = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float64": 2.0**-1022}
#: Subnormal weights are noise only if the largest weight exceeds the smallest normal number by this factor.
ORDINARY = 2.0**60


def flush_subnormals(weight: Array, dtype: object) -> Array:
    """A weight with zeros in place of subnormal numbers, if its largest number is of ordinary size."""
    tiny = SMALLEST_NORMAL.get(str(dtype), 0.0)
    small = np.abs(weight) < tiny
    return np.where(small, 0.0, weight) if np.max(np.abs(weight), initial=0.0) > tiny * ORDINARY else weight


@dataclass(frozen=True)
class Scan:
    """The magnitudes of a map's weights: Σ|w| of each row, the largest Σ_k |w| of each column, and the number of
    subnormals. `flushed` is the Σ|w| of each row's subnormals, which the other figures count as zeros."""

    rows: Array
    columns: Array
    subnormal: int
    flushed: Array

    @property
    def dead(self) -> bool:
        """Whether a row or a column is too small to matter."""
        return bool(np.any(vanishing(self.rows)) or np.any(vanishing(self.columns)))


def vanishing(sizes: Array) -> Mask:
    return np.asarray(sizes * LARGEST_INPUT <= NEGLIGIBLE * np.max(sizes, initial=0.0))


class Scanner:
    """Scans weights, and remembers the result for each weight and form."""

    def __init__(self) -> None:
        self._done: dict[tuple[object, ...], tuple[object, Scan | None]] = {}
        self._sound: dict[int, object] = {}

    def sound(self, view: View, reading: Reading) -> bool:
        """Whether all weights are of similar magnitude, so that no row or column is dead; cheaper than a scan."""
        if reading.weight is None:
            return True
        content = view.stored_value(reading.weight)
        raw = None if content is None or id(content) in self._sound else view.raw(reading.weight)
        if raw is None:
            return True
        size = np.abs(raw)
        if size.size and size.min() > NEGLIGIBLE * size.max():
            self._sound[id(content)] = content
        return id(content) in self._sound

    def __call__(self, view: View, reading: Reading, *, flush: bool = True) -> Scan | None:
        """None where the numbers are not finite; without `flush`, subnormals are no zeros."""
        held = view.constant(reading.weight) if reading.weight is not None else None
        if held is None:
            return None
        attrs = reading.nodes[0].attrs
        key = (id(held), reading.kind, reading.geometry, attrs.get("transB", 0), attrs.get("alpha", 1.0), flush)
        if key not in self._done:
            self._done[key] = (held, self._scan(reading, held.dtype if flush else None))
        return self._done[key][1]

    @staticmethod
    def _scan(reading: Reading, dtype: object) -> Scan | None:
        linear = reading.try_load()
        if linear is None:
            return None
        weight = flush_subnormals(linear.weight, dtype)
        magnitude = np.abs(weight).reshape(*weight.shape[:2], -1).sum(-1)
        flushed = np.abs(linear.weight - weight).reshape(len(weight), -1).sum(1)
        subnormal = int(np.sum((weight == 0) & (linear.weight != 0)))
        return Scan(magnitude.sum(1), magnitude.max(0), subnormal, flushed)


class Unread(Scanner):
    """Assumes that every row and column matters, without reading the weight."""

    def __call__(self, view: View, reading: Reading, *, flush: bool = True) -> Scan:
        g = reading.geometry
        return Scan(np.ones(g.out_channels), np.ones(g.in_channels // g.groups), 0, np.zeros(g.out_channels))
