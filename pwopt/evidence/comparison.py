"""Run two models on the same inputs and compare every output."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pwopt.algebra import Values
from pwopt.errors import ModelError
from pwopt.evidence.equivalence import FLOOR_FACTOR, Equivalence, OutputCheck, judge
from pwopt.evidence.leaves import find_leaves
from pwopt.evidence.metrics import Agreement, agreement, find_tolerance, find_unsettled
from pwopt.evidence.outliers import Outliers, count_outliers
from pwopt.graph.dtypes import epsilon, is_floating
from pwopt.inputs.feeds import Feeds
from pwopt.inputs.samples import Sample
from pwopt.running.session import Session

#: Two runs of the original may differ beyond the tolerance in at most this share of elements.
REPEATABLE = 0.01
#: Figures of an `Agreement` that an `OutputCheck` reports.
CHECKED_FIGURES = (
    "max_abs", "max_rel", "mean_abs", "mismatch", "scale", "resolution", "ulp", "ulp_p99", "cosine", "snr_db", "top1",
    "top5", "histogram", "scatter", "compared", "left_out",
)  # fmt: skip

#: Output name → the coarsest floating-point type on the way to it.
CoarsestTypes = Mapping[str, np.dtype[Any]]


@dataclass
class _Tally:
    """One output over the samples so far."""

    name: str
    rtol: float | None
    atol: float | None
    brief: bool
    coarsest: Callable[[], CoarsestTypes] | None
    comparable: bool = True
    found: Agreement = field(default_factory=Agreement)
    floor: Agreement = field(default_factory=Agreement)
    moved: Agreement = field(default_factory=Agreement)
    deciding: tuple[bool, float, str, str] = (True, -1.0, "", "")

    @property
    def has_tolerance(self) -> bool:
        return self.rtol is not None or self.atol is not None

    def repeats(self, first: Any, second: Any) -> bool:
        """Whether two runs of the original on the same inputs agree, up to a few elements at steps."""
        (structure, leaves), (other, others) = find_leaves(first), find_leaves(second)
        if structure != other:
            return False
        for a, b in zip(leaves, others, strict=True):
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                return False
            if np.array_equal(a, b):
                continue
            found = agreement(a, b, self.rtol, self.atol, brief=True, without=find_unsettled(a, b))
            if not is_floating(a.dtype) and found.mismatch > REPEATABLE:
                return False
            if is_floating(a.dtype) and not found.within and self._share_beyond(a, b) > REPEATABLE:
                return False
        return True

    def _share_beyond(self, a: Values, b: Values) -> float:
        without = find_unsettled(a, b)
        tolerance = find_tolerance(a, without, self.rtol, self.atol)
        return count_outliers(a, b, [], tolerance, without, 0.0).found / a.size

    def add(self, label: str, reference: Any, plain: Any, near: Any, candidate: Any) -> None:
        """Compare the output of one sample; a candidate that fails to run is given as a ModelError."""
        structure, leaves = find_leaves(reference)
        if isinstance(candidate, ModelError):
            self._decide(label, False, Agreement.disagree(f"the candidate fails where the original runs: {candidate}"))
            return
        form, values = find_leaves(candidate)
        if form != structure:
            self._decide(label, False, Agreement.disagree("the structure of the output differs"))
            return
        for i, (leaf, value) in enumerate(zip(leaves, values, strict=True)):
            own = [parts[i] if same == structure else None for same, parts in map(find_leaves, (plain, near))]
            self._add_tensor(label, leaf, own, value)

    def _add_tensor(self, label: str, reference: Values, own: Sequence[Values | None], candidate: Values) -> None:
        others = [o for o in own if o is not None]
        without = find_unsettled(reference, *others)
        against = functools.partial(agreement, reference, rtol=self.rtol, atol=self.atol, without=without)
        nothing = Agreement()
        floor = nothing if own[0] is None else against(own[0], brief=self.brief)
        moved = nothing if own[1] is None else against(own[1], brief=True)
        discrete = not is_floating(reference.dtype)
        kind: np.dtype[Any] | None = None

        def outliers() -> Outliers:
            tolerance = find_tolerance(reference, without, self.rtol, self.atol, kind)
            return count_outliers(reference, candidate, others, tolerance, without, FLOOR_FACTOR)

        found = against(candidate, brief=self.brief)
        passed, reason = judge(found, floor, moved, discrete, self.has_tolerance, outliers)
        if not passed and not discrete and not found.note and not self.has_tolerance and self.coarsest is not None:
            kind = self.coarsest().get(self.name)
            if kind is not None and epsilon(kind) > epsilon(reference.dtype):
                found = against(candidate, brief=self.brief, kind=kind)
                passed, reason = judge(found, floor, moved, discrete, self.has_tolerance, outliers)
                reason = f"{reason} (of {kind}, the coarsest type before this output)"
        self._decide(label, discrete, found, floor, moved, (passed, reason))

    def _decide(
        self,
        label: str,
        discrete: bool,
        found: Agreement,
        floor: Agreement | None = None,
        moved: Agreement | None = None,
        verdict: tuple[bool, str] | None = None,
    ) -> None:
        self.found = found.worse(self.found)
        self.floor, self.moved = (floor or Agreement()).worse(self.floor), (moved or Agreement()).worse(self.moved)
        if found.note or found.compared:
            passed, reason = verdict or (False, found.note)
            weight = found.mismatch if discrete else found.max_abs
            worst_passed, worst_weight, _, _ = self.deciding
            if (not passed, weight) > (not worst_passed, worst_weight):
                self.deciding = (passed, weight, reason, label)

    def check(self) -> OutputCheck:
        """Return the result over all samples."""
        passed, weight, reason, label = self.deciding
        comparable = self.comparable
        if not comparable:
            passed, label = False, ""
            reason = "the original gives different results in two runs on the same inputs"
        elif weight < 0:
            passed = comparable = not self.found.size
            reason = "empty in every sample, so nothing was compared"
            if self.found.size:
                reason = "the original has no finite value to compare in any sample; "
                reason += "give other inputs with --shape or --input"
        shared = {figure: getattr(self.found, figure) for figure in CHECKED_FIGURES}
        return OutputCheck(
            name=self.name, floor=self.floor.max_abs, floor_mismatch=self.floor.mismatch,
            sensitivity=self.moved.max_abs, noise=replace(self.floor, scatter=()), passed=passed, reason=reason,
            sample=label, comparable=comparable, **shared,
        )  # fmt: skip


class Recording:
    """What a session answered to a series of inputs. It takes less memory than the session of a large model.

    Parameters
    ----------
    session : Session
    series : iterable of dict of arrays
        The inputs, in the order in which `run` is called later.
    """

    def __init__(self, session: Session, series: Iterable[Feeds]) -> None:
        self.inputs, self.outputs = session.inputs, session.outputs
        self._answers: deque[list[Any] | ModelError] = deque()
        for feeds in series:
            try:
                self._answers.append(session.run(feeds))
            except ModelError as error:
                self._answers.append(error)

    def run(self, _feeds: Feeds) -> list[Any]:
        """Return the next answer; raise it if it is an error."""
        answer = self._answers.popleft()
        if isinstance(answer, ModelError):
            raise answer
        return answer


def list_runs(samples: Sequence[Sample]) -> Iterator[Feeds]:
    """Generate the inputs on which `compare` runs the original, in order."""
    for number, sample in enumerate(samples):
        yield from (sample.feeds, nudge(sample.feeds), *([] if number else [sample.feeds]))


def compare(
    original: Session | Recording,
    plain: Session | Recording,
    candidate: Session | Recording,
    samples: Sequence[Sample],
    rtol: float | None = None,
    atol: float | None = None,
    *,
    brief: bool = False,
    coarsest: Callable[[], CoarsestTypes] | None = None,
) -> Equivalence:
    """Run three sessions on the same inputs: the original, the original without graph optimisation, the candidate.

    Outputs are matched by name. A candidate that fails where the original runs is not equivalent. The original runs
    twice on the first sample; outputs that differ between these runs are not comparable.

    Parameters
    ----------
    brief : bool
        Omit the figures that the verdict does not need.
    coarsest : callable, optional
        Returns the coarsest type before each output. It is called if an output fails with the tolerance of its type.

    Raises
    ------
    ModelError
        If the models have different inputs or outputs, or if the original does not run.
    """
    for what in ("inputs", "outputs"):
        a, b = getattr(original, what), getattr(candidate, what)
        if sorted(a) != sorted(b):
            raise ModelError(f"the models' {what} differ: {', '.join(a)} against {', '.join(b)}")
    tallies = {name: _Tally(name, rtol, atol, brief, coarsest) for name in original.outputs}
    for number, sample in enumerate(samples):
        reference, bare = _run(original, sample.feeds), _run(plain, sample.feeds)
        near = _run(original, nudge(sample.feeds))
        try:
            found: dict[str, Any] = _run(candidate, sample.feeds)
        except ModelError as error:
            found = dict.fromkeys(reference, error)
        again = _run(original, sample.feeds) if not number else {}
        for name, value in reference.items():
            tally = tallies[name]
            tally.comparable = tally.comparable and (bool(number) or tally.repeats(value, again[name]))
            if tally.comparable:
                tally.add(str(sample.label), value, bare[name], near[name], found[name])
    checks = tuple(t.check() for t in tallies.values())
    shapes = {name: value.shape for name, value in samples[0].feeds.items()}
    labels = tuple(s.label for s in samples)
    return Equivalence(all(c.passed for c in checks), checks, len(samples), shapes, rtol, atol, labels)


def _run(session: Session | Recording, feeds: Feeds) -> dict[str, Any]:
    return dict(zip(session.outputs, session.run(feeds), strict=True))


def nudge(feeds: Feeds) -> Feeds:
    """Move floating-point inputs by one unit in the last place, up or down at random; zeros stay."""
    rng = np.random.default_rng(0)
    moved = dict(feeds)
    for name, value in feeds.items():
        if value.dtype.kind == "f":
            away = np.where(rng.random(value.shape) < 0.5, -np.inf, np.inf).astype(value.dtype)
            moved[name] = np.where(value == 0, value, np.nextafter(value, away))
    return moved
