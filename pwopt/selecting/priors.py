"""How often each kind of measured rewrite paid before: an order in which to ask, and a guess, never a decision.

A table ships with the package, recorded by `benchmarks/priors.py` on machines that it names; what this machine's
cache holds is added to it.
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

#: A kind is not decided for any more if it gained less than this (a logarithm) for each of so many decisions.
LEAST_GAIN, ENOUGH_CASES = 0.001, 20
#: Instruction sets that make classes of processors, the best first.
CLASSES = (("avx512f", "avx512"), ("avx2", "avx2"), ("asimd", "neon"))


@dataclass(frozen=True)
class Prior:
    """What is known of one pass on one kind of provider and processor.

    Attributes
    ----------
    decided, kept : int
        How many groups of rewrites were decided, and how many were kept.
    gain : float
        The sum of the logarithms of their speed-ups, of those that were kept.
    """

    decided: int = 0
    kept: int = 0
    gain: float = 0.0

    def __add__(self, other: Prior) -> Prior:
        return Prior(self.decided + other.decided, self.kept + other.kept, self.gain + other.gain)

    @property
    def expected_gain(self) -> float:
        """The logarithm of the speed-up that a group will bring, with two groups of 2 % in favour of what is new."""
        return (self.gain + 0.04) / (self.decided + 2)

    @property
    def unprofitable(self) -> bool:
        """Whether it was decided for often, and hardly ever paid."""
        return self.decided >= ENOUGH_CASES and self.expected_gain < LEAST_GAIN


def classify_processor() -> str:
    """The class of this machine's processor: avx512, avx2, neon, or its architecture."""
    known = read_cpu_features().split()
    return next((name for flag, name in CLASSES if flag in known), platform.machine())


def count_decisions(entries: Iterable[TuningRecord]) -> dict[str, Prior]:
    """Pass → what decisions say of it; those in doubt say nothing."""
    found: dict[str, Prior] = {}
    for e in entries:
        if e.verdict != "in doubt":
            kept = e.verdict == "kept"
            found[e.pass_name] = found.get(e.pass_name, Prior()) + Prior(1, kept, math.log(e.speedup) if kept else 0.0)
    return found


def read_table() -> dict[str, Any]:
    """What ships with the package."""
    file = resources.files("pwopt.selecting").joinpath("priors.json")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def find_priors(kind: str, entries: Iterable[TuningRecord]) -> dict[str, Prior]:
    """Pass → what is known of it on a kind of provider: by the table, and by decisions of this machine."""
    recorded = read_table()["priors"].get(f"{kind} {classify_processor()}", {})
    own = count_decisions(entries)
    return {name: Prior(*recorded.get(name, ())) + own.get(name, Prior()) for name in {*recorded, *own}}
