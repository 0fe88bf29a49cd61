"""Quantiles of Student's distribution ("The probable error of a mean", Biometrika 6, 1908)."""

from __future__ import annotations

import functools
import math
import statistics


@functools.lru_cache(maxsize=4096)
def student_quantile(freedom: int, confidence: float) -> float:
    """How many standard errors around a mean hold it with this confidence, for so many degrees of freedom."""
    if freedom > 400:
        return statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    low, high = 0.0, 1e9
    for _ in range(100):
        middle = (low + high) / 2 if high - low < 1 or low > 0 else math.sqrt(max(high, 1.0))
        low, high = (middle, high) if _student_mass(middle, freedom) < confidence else (low, middle)
    return high


def _student_mass(t: float, freedom: int) -> float:
    """The probability that a variable of Student's distribution lies between −t and t (Abramowitz and Stegun, 26.7)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(freedom // 2):
        total += term
        term *= cosine**2 * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
