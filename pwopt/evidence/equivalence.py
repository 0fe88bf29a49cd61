"""Equivalence: the same answers, measured against how far the original's own answers can be trusted.

Two figures of the original say that. Its *noise floor*: onnxruntime's disagreement with itself, with and without
graph optimisation. Its *sensitivity*: what rounding its inputs once more does to its outputs, since no
implementation can be held to more digits than its inputs have (Higham, "Accuracy and Stability of Numerical
Algorithms", 2002: a backward stable result is the exact one for slightly different inputs).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pwopt.algebra import Values
from pwopt.errors import ModelError
from pwopt.evidence.metrics import Agreement, Histogram, agreement, unsettled
from pwopt.graph.dtypes import floating
from pwopt.inputs.samples import Feeds, Sample
from pwopt.rewriting.records import Site
from pwopt.rewriting.wording import counted
from pwopt.running.session import Session

#: An output passes if its deviation is within this many times the original's noise floor or sensitivity.
FLOOR_FACTOR = 4.0
#: A tolerance that nobody asked for excuses no more than this many times those, or roundings of the largest value. Of
#: 200 equivalent pairs none deviates by more than 2 times them (benchmarks/error_rates.py), of 32 pairs of a real
#: model and its optimised form (by pwopt or another) none by more than 3.1, and on constant or huge inputs by 8.
EXCUSED = 32.0

#: Figures of an `Agreement` that an `OutputCheck` reports.
FIGURES = (
    "max_abs", "max_rel", "mean_abs", "mismatch", "scale", "resolution", "ulp", "ulp_p99", "cosine", "snr_db", "top1",
    "top5", "histogram", "scatter", "compared", "left_out",
)  # fmt: skip


@dataclass(frozen=True)
class OutputCheck:
    """How one output of two models agrees: the worst of every figure over all samples.

    Attributes
    ----------
    max_abs, max_rel, mean_abs, mismatch, ulp, ulp_p99, cosine, snr_db, top1, top5, histogram, scatter
        See `pwopt.evidence.metrics.Agreement`. The mismatch is the verdict for integer, bool and string outputs.
    scale, resolution : float
        Largest magnitude in the original's output, and the machine epsilon of its type there.
    floor, floor_mismatch : float
        max_abs and mismatch of the original against itself without graph optimisation.
    sensitivity : float
        max_abs of the original against itself with each input moved by one unit in the last place.
    noise : Agreement
        Every figure of the original against itself without graph optimisation, but no scatter.
    passed : bool
        Whether it passes in every sample.
    reason : str
        Which rule decided.
    sample : str
        The sample that decided.
    compared : int
        Elements held against each other, over all samples; 0 if shapes or types differ.
    left_out : int
        Elements that are no evidence, over all samples: NaN or infinite in one run of the original and not in another.
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

    @property
    def identical(self) -> bool:
        """Whether no element differs from the original's in any sample."""
        return self.passed and self.compared > 0 and self.max_abs == 0 and self.mismatch == 0

    def explain(self) -> str:
        """What it does, as the rest of a sentence about it."""
        if (self.mismatch and not self.max_abs) or not np.isfinite(self.max_abs):
            return f"differs ({self.reason})"
        return f"deviates by {self.max_abs:.3g} (noise floor {self.floor:.3g}): {self.reason}"


@dataclass(frozen=True)
class Difference:
    """Where two models begin to differ.

    Attributes
    ----------
    tensor : str
        The first tensor that both have, in topological order, whose values differ though everything that both
        compute it from agrees.
    node : str
        What produces it in the candidate, as "Op name".
    agreeing : tuple of str
        The last tensors before it that agree; graph inputs left out.
    region : tuple of str
        The candidate's operators between those and it: the fault is in one of them.
    check : OutputCheck
        How the tensor differs.
    sites : tuple of Site
        Rewrites that made something of the region, for ``--deny``; empty where no records are known.
    compared : int
        How many tensors were compared.
    """

    tensor: str
    node: str
    agreeing: tuple[str, ...]
    region: tuple[str, ...]
    check: OutputCheck
    sites: tuple[Site, ...]
    compared: int

    def explain(self) -> str:
        """Where, and what to do about it, in a sentence."""
        said = f"the first tensor that differs is {self.tensor!r}, made by {self.node}; it {self.check.explain()}"
        if not self.sites:
            return said
        sites = [str(site) for site in self.sites]
        return f"{said}; made by {', '.join(sites)}: try {' '.join(f'--deny {site!r}' for site in sites)}"


@dataclass(frozen=True)
class LawCheck:
    """The residual of an invariant in both models: 0 where it holds, some machine epsilons where it does to rounding.

    `law` is what was asked for, `formula` what it says.
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
        None where those of the type were used.
    inputs : tuple of str
        What each sample was: distribution or file, and sizes.
    elsewhere : dict
        Model ("original", "candidate") → other provider → operators that ran there, as "Op name".
    difference : Difference or None
        Where a candidate that did not pass begins to differ; None if it was not looked for or not found.
    laws : tuple of LawCheck
        Invariants that were asked for; they leave the verdict alone.
    """

    passed: bool
    outputs: tuple[OutputCheck, ...]
    samples: int
    shapes: dict[str, tuple[int, ...]]
    rtol: float | None
    atol: float | None
    inputs: tuple[str, ...] = ()
    elsewhere: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    difference: Difference | None = None
    laws: tuple[LawCheck, ...] = ()

    def remarks(self) -> Iterator[str]:
        """What the verdicts leave out, in a sentence for each output concerned."""
        for o in self.outputs:
            if o.left_out:
                yield (
                    f"Output {o.name!r}: {counted(o.left_out, 'element')} left out, beside {o.compared:,} compared; "
                    "the original is NaN or infinite there in one run and not in another."
                )

    def worst(self) -> OutputCheck | None:
        return max(
            self.outputs, key=lambda o: (not o.passed, o.max_abs / o.floor if o.floor else o.max_abs), default=None
        )


def judge(
    candidate: Agreement, floor: Agreement, moved: Agreement, discrete: bool, asked: bool = False
) -> tuple[bool, str]:
    """The rule for one output in one sample, and which part of it decided.

    Within `FLOOR_FACTOR` times noise floor or sensitivity; or within the tolerance, and unless that was asked for,
    within `EXCUSED` times noise floor, sensitivity or resolution. Discrete outputs by mismatch.
    """
    if candidate.note:
        return False, candidate.note
    nothing = Agreement()  # an original that disagrees with itself about shapes is no yardstick
    floor, moved = (nothing if a.note else a for a in (floor, moved))
    own = max(floor.mismatch, moved.mismatch)
    if discrete:
        shares = f"{candidate.mismatch:.2%} of elements differ, {own:.2%} in the original against itself"
        return candidate.mismatch <= FLOOR_FACTOR * own, shares
    if candidate.max_abs <= FLOOR_FACTOR * floor.max_abs:
        return True, f"within {FLOOR_FACTOR:g}× the noise floor"
    if candidate.max_abs <= FLOOR_FACTOR * moved.max_abs:
        return True, f"within {FLOOR_FACTOR:g}× the effect of rounding the inputs"
    if not candidate.within:
        return False, f"beyond the tolerance and {FLOOR_FACTOR:g}× the noise floor and sensitivity"
    excused = EXCUSED * max(floor.max_abs, moved.max_abs, candidate.resolution)
    if asked or candidate.max_abs <= excused:
        return True, "within the tolerance"
    return False, f"within the tolerance, but beyond {EXCUSED:g}× the noise floor and sensitivity"


@dataclass
class _Tally:
    """One output over the samples so far."""

    name: str
    asked: bool
    found: Agreement = field(default_factory=Agreement)
    floor: Agreement = field(default_factory=Agreement)
    moved: Agreement = field(default_factory=Agreement)
    deciding: tuple[bool, float, str, str] = (True, -1.0, "", "")

    def add(self, label: str, discrete: bool, found: Agreement, floor: Agreement, moved: Agreement) -> None:
        self.found, self.floor, self.moved = found.worse(self.found), floor.worse(self.floor), moved.worse(self.moved)
        if found.note or found.compared:
            passed, reason = judge(found, floor, moved, discrete, self.asked)
            weight = found.mismatch if discrete else found.max_abs
            worst_passed, worst_weight, _, _ = self.deciding
            if (not passed, weight) > (not worst_passed, worst_weight):
                self.deciding = (passed, weight, reason, label)

    def check(self) -> OutputCheck:
        passed, weight, reason, label = self.deciding
        if weight < 0:
            passed = not self.found.size
            reason = "empty in every sample, so nothing was compared"
            if self.found.size:
                reason = "no finite value to compare in any sample; give other inputs with --shape or --input"
        shared = {figure: getattr(self.found, figure) for figure in FIGURES}
        return OutputCheck(
            name=self.name, floor=self.floor.max_abs, floor_mismatch=self.floor.mismatch,
            sensitivity=self.moved.max_abs, noise=replace(self.floor, scatter=()), passed=passed, reason=reason,
            sample=label, **shared,
        )  # fmt: skip


def compare(
    original: Session,
    plain: Session,
    candidate: Session,
    samples: Sequence[Sample],
    rtol: float | None = None,
    atol: float | None = None,
    *,
    brief: bool = False,
) -> Equivalence:
    """Run three sessions on the same inputs: the original, the original without graph optimisation, the candidate.

    Outputs are matched by name. A candidate that does not run where the original does is not equivalent.
    `brief` leaves out the figures that no verdict needs.
    """
    for what in ("inputs", "outputs"):
        a, b = getattr(original, what), getattr(candidate, what)
        if sorted(a) != sorted(b):
            raise ModelError(f"the models' {what} differ: {', '.join(a)} against {', '.join(b)}")
    asked = rtol is not None or atol is not None
    tallies = {name: _Tally(name, asked) for name in original.outputs}
    for sample in samples:
        reference, bare = _named(original, sample.feeds), _named(plain, sample.feeds)
        near = _named(original, nudge(sample.feeds))
        without = {name: unsettled(value, bare[name], near[name]) for name, value in reference.items()}
        against = functools.partial(_agreements, reference, rtol=rtol, atol=atol, without=without)
        floor, moved = against(bare, brief=brief), against(near, brief=True)
        try:
            found = against(_named(candidate, sample.feeds), brief=brief)
        except ModelError as error:
            found = dict.fromkeys(reference, Agreement.none(f"the candidate fails where the original runs: {error}"))
        for name, value in reference.items():
            discrete = not (isinstance(value, np.ndarray) and floating(value.dtype))
            tallies[name].add(sample.label, discrete, found[name], floor[name], moved[name])
    checks = tuple(t.check() for t in tallies.values())
    shapes = {name: value.shape for name, value in samples[0].feeds.items()}
    labels = tuple(s.label for s in samples)
    return Equivalence(all(c.passed for c in checks), checks, len(samples), shapes, rtol, atol, labels)


def _named(session: Session, feeds: Feeds) -> dict[str, Any]:
    return dict(zip(session.outputs, session.run(feeds), strict=True))


def _agreements(
    reference: dict[str, Any],
    values: dict[str, Any],
    *,
    rtol: float | None,
    atol: float | None,
    brief: bool,
    without: Mapping[str, Values | None],
) -> dict[str, Agreement]:
    return {
        name: agreement(value, values[name], rtol, atol, brief=brief, without=without[name])
        for name, value in reference.items()
    }


def nudge(feeds: Feeds) -> Feeds:
    """Floating-point inputs moved by one unit in the last place, up or down at random; zeros stay."""
    rng = np.random.default_rng(0)
    moved = dict(feeds)
    for name, value in feeds.items():
        if value.dtype.kind == "f":
            away = np.where(rng.random(value.shape) < 0.5, -np.inf, np.inf).astype(value.dtype)
            moved[name] = np.where(value == 0, value, np.nextafter(value, away))
    return moved
