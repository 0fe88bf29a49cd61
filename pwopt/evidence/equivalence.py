"""Equivalence of two models: the same outputs, up to the accuracy of the original's own outputs.

Two figures describe that accuracy. The *noise floor* is the deviation between the original with and without graph
optimisation. The *sensitivity* is the deviation of the original when its inputs move by one unit in the last place:
no implementation can be more precise than its inputs (Higham, "Accuracy and Stability of Numerical Algorithms", 2002:
a backward stable result is the exact one for slightly different inputs).

An output that differs between two runs of the original on the same inputs is not comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from pwopt.evidence.metrics import Agreement, Histogram
from pwopt.evidence.outliers import Outliers
from pwopt.inputs.samples import SampleLabel
from pwopt.rewriting.records import Site
from pwopt.rewriting.wording import format_count

#: An output passes if its deviation is at most this many times the original's noise floor or sensitivity.
FLOOR_FACTOR = 4.0
#: A default tolerance accepts at most this many times the noise floor, the sensitivity or the rounding of the largest
#: value. Of 200 equivalent pairs, none deviates by more than 2 times these (benchmarks/error_rates.py). Of 32 pairs of
#: a real model and its optimised form (by pwopt or another tool), none deviates by more than 3.1 times, or 8 times on
#: constant or huge inputs.
EXCUSED = 32.0


@dataclass(frozen=True)
class OutputCheck:
    """Agreement of one output of two models: the worst value of every figure over all samples.

    Attributes
    ----------
    max_abs, max_rel, mean_abs, mismatch, ulp, ulp_p99, cosine, snr_db, top1, top5, histogram, scatter
        See `pwopt.evidence.metrics.Agreement`. The mismatch is the verdict for integer, bool and string outputs.
    scale, resolution : float
        Largest magnitude in the original's output, and the rounding error of its type at that magnitude.
    floor, floor_mismatch : float
        max_abs and mismatch of the original against itself without graph optimisation.
    sensitivity : float
        max_abs of the original against itself with each input moved by one unit in the last place.
    noise : Agreement
        Every figure except scatter for the original against itself without graph optimisation.
    passed : bool
        Whether the output passes in every sample; false if it is not comparable.
    reason : str
        The rule that decided.
    sample : str
        The sample that decided.
    compared : int
        Number of compared elements, over all samples; 0 if shapes or types differ.
    left_out : int
        Number of elements left out, over all samples: NaN or infinite in one run of the original and not in another.
    comparable : bool
        False if the original's own runs differ, or if it has no finite value.
    """

    name: str
    max_abs: float
    max_rel: float
    mean_abs: float
    mismatch: float
    floor: float
    floor_mismatch: float
    sensitivity: float
    passed: bool
    reason: str
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
    noise: Agreement = field(default_factory=Agreement)
    sample: str = ""
    compared: int = 0
    left_out: int = 0
    comparable: bool = True

    @property
    def identical(self) -> bool:
        """Whether no element differs from the original in any sample."""
        return self.passed and self.compared > 0 and self.max_abs == 0 and self.mismatch == 0

    def explain(self) -> str:
        """Complete a sentence that begins with the name of the output."""
        if not self.comparable:
            return f"cannot be compared: {self.reason}"
        if (self.mismatch and not self.max_abs) or not np.isfinite(self.max_abs):
            return f"differs ({self.reason})"
        return f"deviates by {self.max_abs:.3g} (noise floor {self.floor:.3g}): {self.reason}"


@dataclass(frozen=True)
class Difference:
    """Where two models begin to differ.

    Attributes
    ----------
    tensor : str
        The first tensor in topological order that both models have and whose values differ, although the tensors
        that it is computed from agree.
    node : str
        The operator that computes it in the candidate, as "Op name".
    agreeing : tuple of str
        The last tensors before it that agree, without graph inputs.
    region : tuple of str
        The candidate's operators between these tensors and the first one that differs. One of them is at fault.
    check : OutputCheck
        How the tensor differs.
    sites : tuple of Site
        Rewrites that created part of the region, for ``--deny``; empty if the rewrites are unknown.
    compared : int
        Number of compared tensors.
    """

    tensor: str
    node: str
    agreeing: tuple[str, ...]
    region: tuple[str, ...]
    check: OutputCheck
    sites: tuple[Site, ...]
    compared: int
    #: Whether the sites are those of a record that may be of another model.
    assumed: bool = False

    def explain(self) -> str:
        """Explain the difference, and how to avoid it, in one sentence."""
        text = f"the first tensor that differs is {self.tensor!r}, made by {self.node}; it {self.check.explain()}"
        if not self.sites:
            return text
        sites = [str(site) for site in self.sites]
        blamed, tried = ", ".join(sites), " ".join(f"--deny {site!r}" for site in sites)
        made = f"if pwopt wrote this model, {blamed} made it" if self.assumed else f"made by {blamed}"
        return f"{text}; {made}: try {tried}"


@dataclass(frozen=True)
class LawCheck:
    """The residual of an invariant in both models.

    The residual is 0 if the invariant holds exactly, and a few machine epsilons if it holds up to rounding. `law` is
    the name with its settings, as requested; `formula` is its formula.
    """

    law: str
    formula: str
    original: float
    candidate: float


@dataclass(frozen=True)
class Equivalence:
    """Verdict over all outputs.

    Attributes
    ----------
    passed : bool
    outputs : tuple of OutputCheck
    samples : int
    shapes : dict
        Input sizes of the first sample.
    rtol, atol : float or None
        None if the defaults of the type were used.
    inputs : tuple of SampleLabel
        The label of each sample.
    elsewhere : dict
        Model ("original", "candidate") → other provider → operators that ran there, as "Op name".
    difference : Difference or None
        Where a candidate that did not pass begins to differ; None if this was not searched or not found.
    laws : tuple of LawCheck
        The requested invariants; they do not affect the verdict.
    """

    passed: bool
    outputs: tuple[OutputCheck, ...]
    samples: int
    shapes: dict[str, tuple[int, ...]]
    rtol: float | None
    atol: float | None
    inputs: tuple[SampleLabel, ...] = ()
    elsewhere: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    difference: Difference | None = None
    laws: tuple[LawCheck, ...] = ()

    @property
    def verdict(self) -> str:
        """ "equivalent", "not equivalent", or "not comparable" if every comparable output passes but others exist."""
        if self.passed:
            return "equivalent"
        return "not equivalent" if any(o.comparable and not o.passed for o in self.outputs) else "not comparable"

    def remarks(self) -> Iterator[str]:
        """Yield a sentence for each output with elements that were not compared."""
        for o in self.outputs:
            if not o.comparable:
                yield f"Output {o.name!r} {o.explain()}."
            if o.left_out:
                yield (
                    f"Output {o.name!r}: {format_count(o.left_out, 'element')} left out, beside {o.compared:,} "
                    "compared; the original is NaN or infinite there in one run and not in another."
                )

    def worst(self) -> OutputCheck | None:
        return max(
            self.outputs,
            key=lambda o: (not o.passed, o.comparable, o.max_abs / o.floor if o.floor else o.max_abs),
            default=None,
        )


def judge(
    candidate: Agreement,
    floor: Agreement,
    moved: Agreement,
    discrete: bool,
    asked: bool = False,
    outliers: Callable[[], Outliers] | None = None,
) -> tuple[bool, str]:
    """Apply the rule to one output in one sample; return the verdict and the part of the rule that decided.

    An output passes if its deviation is at most `FLOOR_FACTOR` times the noise floor or the sensitivity. It also
    passes within the tolerance; for default tolerances the deviation must then be at most `EXCUSED` times the noise
    floor, the sensitivity or the resolution. Outputs that are not floating point are judged by their mismatch.

    Parameters
    ----------
    outliers : callable, optional
        Counts the elements beyond the tolerance. Called only if the noise would excuse a deviation beyond it.
    """
    if candidate.note:
        return False, candidate.note
    nothing = Agreement()  # an original whose own shapes differ gives no noise floor
    floor, moved = (nothing if a.note else a for a in (floor, moved))
    own = max(floor.mismatch, moved.mismatch)
    if discrete:
        shares = f"{candidate.mismatch:.2%} of elements differ, {own:.2%} in the original against itself"
        return candidate.mismatch <= FLOOR_FACTOR * own, shares
    noisy = candidate.max_abs <= FLOOR_FACTOR * floor.max_abs, candidate.max_abs <= FLOOR_FACTOR * moved.max_abs
    if any(noisy) and not candidate.within and outliers is not None and (outside := outliers()).excess:
        return False, (
            f"{format_count(outside.found, 'element')} outside the tolerance deviate by more than "
            f"{FLOOR_FACTOR * outside.size:.2g}, but the original deviates from itself by more than "
            f"{outside.size:.2g} in {format_count(outside.own, 'element')} only"
        )
    if noisy[0]:
        return True, f"within {FLOOR_FACTOR:g}× the noise floor"
    if noisy[1]:
        return True, f"within {FLOOR_FACTOR:g}× the effect of rounding the inputs"
    if not candidate.within:
        return False, f"beyond the tolerance and {FLOOR_FACTOR:g}× the noise floor and sensitivity"
    excused = EXCUSED * max(floor.max_abs, moved.max_abs, candidate.resolution)
    if asked or candidate.max_abs <= excused:
        return True, "within the tolerance"
    return False, f"within the tolerance, but beyond {EXCUSED:g}× the noise floor and sensitivity"
