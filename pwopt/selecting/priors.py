"""How often each measured pass paid before. Priors order the races and may skip a pass, but they never keep a rewrite.

The package contains a table that `benchmarks/priors.py` recorded; the table names the machines. The decisions in this
machine's cache are added.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from pwopt.selecting.tuning_cache import TuningRecord, read_cpu_features

#: A pass is skipped if it gains less than this logarithm of a speed-up on average, after at least so many decisions.
LEAST_GAIN, ENOUGH_CASES = 0.001, 20
#: Classes of processors by instruction set (flag, class), the best first.
CLASSES = (("avx512f", "avx512"), ("avx2", "avx2"), ("asimd", "neon"))


@dataclass(frozen=True)
class Prior:
    """Earlier decisions on one pass, on one kind of provider and processor.

    Attributes
    ----------
    decided, kept : int
        How many groups of rewrites were decided, and how many were kept.
    gain : float
        The sum of the logarithms of the speed-ups of the kept groups.
    """

    decided: int = 0
    kept: int = 0
    gain: float = 0.0

    def __add__(self, other: Prior) -> Prior:
        return Prior(self.decided + other.decided, self.kept + other.kept, self.gain + other.gain)

    @property
    def expected_gain(self) -> float:
        """The expected logarithm of the speed-up of a group. Two imaginary groups of 2 % favour passes without data."""
        return (self.gain + 0.04) / (self.decided + 2)

    @property
    def unprofitable(self) -> bool:
        """Whether the pass was decided often, and hardly ever paid."""
        return self.decided >= ENOUGH_CASES and self.expected_gain < LEAST_GAIN


def classify_processor() -> str:
    """Return the class of this machine's processor: avx512, avx2, neon, or its architecture."""
    known = read_cpu_features().split()
    return next((name for flag, name in CLASSES if flag in known), platform.machine())


def count_decisions(entries: Iterable[TuningRecord]) -> dict[str, Prior]:
    """Count the decisions on each pass, without those in doubt."""
    found: dict[str, Prior] = {}
    for e in entries:
        if e.verdict != "in doubt":
            kept = e.verdict == "kept"
            found[e.pass_name] = found.get(e.pass_name, Prior()) + Prior(1, kept, math.log(e.speedup) if kept else 0.0)
    return found


def read_table() -> dict[str, Any]:
    """Read the table in the package."""
    file = resources.files("pwopt.selecting").joinpath("priors.json")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def find_priors(kind: str, entries: Iterable[TuningRecord]) -> dict[str, Prior]:
    """Map each pass to its prior on a kind of provider, from the table and from decisions on this machine."""
    recorded = read_table()["priors"].get(f"{kind} {classify_processor()}", {})
    own = count_decisions(entries)
    return {name: Prior(*recorded.get(name, ())) + own.get(name, Prior()) for name in {*recorded, *own}}
