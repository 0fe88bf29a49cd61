"""Later stages: the model is rewritten with certificates, verified against the original, and raced against it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from pwopt.errors import ModelError, NotEquivalentError, ProviderError
from pwopt.evidence.equivalence import Equivalence
from pwopt.evidence.localise import localise
from pwopt.evidence.verify import compared, placements
from pwopt.graph.functions import functions
from pwopt.graph.operators import QUANTISED
from pwopt.graph.storage import total_bytes
from pwopt.optimizing.bisection import alike, culprits
from pwopt.optimizing.budget import PROFILING, Budget
from pwopt.optimizing.layer_times import layers
from pwopt.optimizing.other_conditions import as_latency, others, respecting, timed
from pwopt.optimizing.preparation import Problem
from pwopt.optimizing.request import Request
from pwopt.reporting.report import ConditionLatency, Latency, Report
from pwopt.rewriting.records import Site
from pwopt.rewriting.wording import counted
from pwopt.running import bench, installation, timing
from pwopt.running.session import Session
from pwopt.running.worker import UnusableError
from pwopt.selecting.operator_matching import marked
from pwopt.selecting.rewrite_selection import DEFECT, Compilation, Environment, Selection
from pwopt.selecting.snapshot import select_passes

LOG = logging.getLogger(__name__)

#: How often rewriting starts anew without what was found wrong with its result.
MAX_ATTEMPTS = 8
#: Microseconds to start an operator on a graphics card, from the framework's call to the kernel's first instruction; a
#: launch alone takes 2 to 5 (NVIDIA, "Getting started with CUDA graphs", 2019).
LAUNCH = 10.0
#: The final race ends early when the speed-up is known to this part of it.
PRECISE = 0.005
#: Runs under the profiler, at least and at most.
PROFILED = 2, 10
#: Figures of the profiler and of the race that are this far apart are explained.
PROFILE_APART = 1.25

#: A model that grows by more than this fraction, and so many bytes, is told so.
UNSAID_GROWTH, UNSAID_BYTES = 0.1, 1 << 16


@dataclass(frozen=True)
class Attempt:
    """A rewritten model and the report on it."""

    proto: onnx.ModelProto
    report: Report

    @property
    def faster(self) -> bool:
        """Whether it was measured faster beyond doubt, and slower nowhere, or nothing was measured."""
        faster = self.report.latency is None or self.report.latency.faster
        return faster and not any(c.slower for c in self.report.conditions)

    def noted(self, *notes: str) -> Attempt:
        return replace(self, report=self.report.noted(*notes))


def attempt(subject: Problem, work: Compilation, choice: Selection, allowance: Budget, blank: Report) -> Attempt:
    """Rewrite, verify and race, again without whatever makes the result unusable, wrong or slower.

    Parameters
    ----------
    blank : Report
        With what is known of the model and the machine beforehand.

    Raises
    ------
    NotEquivalentError
        If the rewritten model deviates, whatever is left out.
    """
    for left in reversed(range(MAX_ATTEMPTS)):
        with allowance.paused():
            done = rewritten(subject, work, choice, allowance.request, blank)
        request = allowance.rest()
        if subject.arena is None or done.proto is subject.source.proto:
            return _unverified(done, work, request) if subject.arena is None else done
        pair = Pair(subject.original, work.file(done.proto), subject.arena)
        better = _usable(pair, done, work, choice, left)
        if better is work:
            report = verified(pair, done.report, request)
            better = _equivalent(pair, report, work, choice, left, request)
        slow: list[tuple[Environment, ConditionLatency]] = []
        if better is work and request.measured:
            try:
                report = raced(pair, report, request, (subject.source.proto, done.proto))
                report, slow = _elsewhere(pair, report, subject, request)
            except UnusableError as error:
                better = work.without(done.report.rewrites, f"the model fails when it is timed: {error}")
            if slow and left and not request.insists:
                better = respecting(
                    slow, pair.original, pair.candidate, work, report.rewrites, _builder(choice), request
                )
        if better is work:
            return replace(done, report=report)
        work = better
    report = replace(done.report, rewrites=(), after=done.report.before)
    return Attempt(subject.source.proto, report.noted(*work.notes[-1:], "The original is returned."))


def _builder(choice: Selection) -> Callable[[Compilation], Path]:
    return lambda work: work.file(work.rewrite(choice.allowed)[3])


def _unverified(done: Attempt, work: Compilation, request: Request) -> Attempt:
    """An attempt that nothing was run for; whether it loads is said all the same, where that can be known."""
    why = "as asked" if installation.is_available() or not request.verify else "onnxruntime is not installed"
    if request.output is not None and installation.is_available() and done.report.rewrites:
        try:
            Session(work.file(done.proto), request.execution_provider)
        except (ModelError, ProviderError) as error:
            return done.noted(f"Not verified ({why}). The result cannot be used: {error}.")
    return done.noted(f"Not verified ({why}).")


def _usable(pair: Pair, done: Attempt, work: Compilation, choice: Selection, left: int) -> Compilation:
    """The work without rewrites whose model does not load, crashes, or takes too much; itself if there are none."""
    arena, build = pair.arena, _builder(choice)
    if not done.report.rewrites or not arena.fault(pair.candidate):
        return work
    found = culprits(work, done.report.rewrites, lambda tried: arena.fault(build(tried))) if left > 1 else work
    return work.without(done.report.rewrites, "the model cannot be used with some of them") if found is work else found


def _equivalent(
    pair: Pair, report: Report, work: Compilation, choice: Selection, left: int, request: Request
) -> Compilation:
    """Leave out the rewrites that make the outputs differ, or all if the outputs cannot be compared.

    The first tensor that differs names the rewrites. If it does not, bisection finds them.

    Raises
    ------
    NotEquivalentError
        If the rewrites at fault are not found.
    """
    equivalence = report.equivalence
    if equivalence is None or equivalence.passed:
        return work
    worst = equivalence.worst()
    what = f"output {worst.name!r} {worst.explain()}" if worst is not None else ""
    if equivalence.verdict == "not comparable":
        return work.without(report.rewrites, f"{what}; --no-verify rewrites the model without a comparison")
    sites = equivalence.difference.sites if equivalence.difference is not None else ()
    guilty = [r for r in report.rewrites if r.site in sites]
    if left and guilty:
        reason = f"{what}; {DEFECT}" if what else DEFECT
        return work.without(alike(work, guilty, report.rewrites), reason)
    build = _builder(choice)
    arena, tolerances = pair.arena, (request.rtol, request.atol)

    def deviates(tried: Compilation) -> str:
        try:
            found = compared(pair.original, build(tried), arena.samples, arena.provider, arena.threads, *tolerances)
        except ModelError as error:
            return str(error)
        worst = found.worst()
        return "" if found.passed or worst is None else f"output {worst.name!r} {worst.explain()}"

    fewer = culprits(work, report.rewrites, deviates) if left > 1 else work
    if fewer is work:
        raise _not_equivalent(report)
    return fewer


def _elsewhere(
    pair: Pair, report: Report, subject: Problem, request: Request
) -> tuple[Report, list[tuple[Environment, ConditionLatency]]]:
    """The report with the latency under all other conditions, and those under which the result is slower."""
    if report.latency is None or (not report.latency.faster and not request.insists):
        return report, []  # which is not returned anyway
    with timing.exclusive():
        found = [(arena, timed(pair.original, pair.candidate, arena, request)) for arena in others(subject, request)]
    return replace(report, conditions=tuple(t for _, t in found)), [(a, t) for a, t in found if t.slower]


def rewritten(subject: Problem, work: Compilation, choice: Selection, request: Request, blank: Report) -> Attempt:
    """The model with every rewrite that was chosen and that its certificate does not refuse."""
    request.progress("rewriting", 0.0)
    before, outcome, after, proto, refused = work.certified(choice.allowed)
    left = (*(s for s in outcome.skips if s.site not in refused), *refused.values(), *choice.dropped)
    report = replace(blank, rewrites=outcome.rewrites, skips=left, before=before, after=after)
    uncertified = sum("refused by its certificate" in s.reason for s in refused.values())
    if uncertified:
        wrong = sorted(
            {s.pass_name for s in refused.values()} - {p.name for p in select_passes(work.passes) if p.builtin}
        )
        whose = f"the fault of {', '.join(wrong)}" if wrong else DEFECT
        report = report.noted(f"{counted(uncertified, 'rewrite')} refused by certificates: {whose}.")
    report = report.noted(*work.notes, *choice.notes)
    guessed = request.static and subject.guessed
    unseen = subject.guessed and subject.arena is None
    report = report.noted(*_notes(report, subject.source.proto, request.denied, guessed, unseen))
    report = report.noted(*_inlined(subject.source.proto, proto), *_growth(report, subject.source.proto, proto))
    unfit = work.unfit() if request.measured else []
    if unfit:
        report = report.noted(f"Not tried, since they serve another kind of provider: {', '.join(unfit)}.")
    return Attempt(proto, report)


@dataclass(frozen=True)
class Pair:
    """The original and its rewritten candidate in one arena."""

    original: Path
    candidate: Path
    arena: Environment

    def compared(self, rtol: float | None, atol: float | None) -> Equivalence:
        """How the answers of both agree, on every sample."""
        provider, threads, samples = self.arena.provider, self.arena.threads, self.arena.samples
        equivalence = compared(self.original, self.candidate, samples, provider, threads, rtol, atol)
        return replace(equivalence, elsewhere=placements({"candidate": self.candidate}, provider, threads, samples[0]))

    def profiled(self, report: Report, protos: tuple[onnx.ModelProto, onnx.ModelProto]) -> Report:
        """The report with where the time goes in both, by operator and by layer."""
        folder = self.candidate.parent
        copies = [marked(proto, folder / f"marked{k}" / "model.onnx") for k, proto in enumerate(protos)]
        files = [copy or path for copy, path in zip(copies, (self.original, self.candidate), strict=True)]
        provider, threads, feeds = self.arena.provider, self.arena.threads, self.arena.samples[0].feeds
        fewest, most = PROFILED
        each = (report.latency.before_ms + report.latency.after_ms) / 1e3 if report.latency is not None else PROFILING
        runs = max(fewest, min(most, int(PROFILING / each)))
        before, after = bench.time_nodes(files, provider, threads, feeds, runs)
        operators = {"before": bench.sum_by_operator(before), "after": bench.sum_by_operator(after)}
        listed = layers(*protos, report.rewrites, (before, after)) if all(copies) else None
        return replace(report, operators=operators, layers=listed)


def verified(pair: Pair, report: Report, request: Request) -> Report:
    """The report with the comparison of both models, and where they differ if they do."""
    request.progress("verifying", 0.0)
    equivalence = pair.compared(request.rtol, request.atol)
    for o in equivalence.outputs:
        LOG.info("output %r: %s", o.name, "identical" if o.identical else o.explain())
    if equivalence.passed:
        report = replace(report, equivalence=equivalence)
        return report.noted(*_placed(equivalence, report.provider))
    arena = pair.arena
    difference = localise(
        pair.original, pair.candidate, equivalence, arena.samples, arena.provider, arena.threads, report.rewrites
    )
    return replace(report, equivalence=replace(equivalence, difference=difference))


def raced(pair: Pair, report: Report, request: Request, protos: tuple[onnx.ModelProto, onnx.ModelProto]) -> Report:
    """The report with the latency of both models, and where it goes."""
    with timing.exclusive():
        race = pair.arena.race(
            [pair.original, pair.candidate, pair.original], request.race_seconds, request.progress,
            timing.Rules(precise=PRECISE),
        )  # fmt: skip
    LOG.info(
        "the whole model: %.3f× [%.3f, %.3f] over %d pairs of sessions",
        race.speedup(),
        *race.interval(),
        len(race.pairs),
    )
    latency = as_latency(race)
    request.progress("profiling", 1.0)
    report = pair.profiled(replace(report, latency=latency), protos)
    return report.noted(*_contradictions(latency, report.operators), *_launches(report, pair.arena))


def _contradictions(latency: Latency, operators: Mapping[str, Mapping[str, float]] | None) -> Iterator[str]:
    """Figures of the race that do not go together, each with why."""
    if latency.contradiction():
        yield latency.contradiction()
    before, after = (sum(operators[which].values()) for which in ("before", "after")) if operators else (0.0, 0.0)
    if not before or not after:
        return
    ratio = before / after / latency.speedup
    if max(ratio, 1 / ratio, before / latency.before_ms, after / latency.after_ms) > PROFILE_APART:
        yield (
            f"The operators' times add up to {before:.3g} → {after:.3g} ms, and runs take {latency.before_ms:.3g} → "
            f"{latency.after_ms:.3g} ms: the former are medians of a few other runs, under onnxruntime's "
            "profiler, which costs time at every operator. They say where the time goes, the latter how much less."
        )


def _launches(report: Report, arena: Environment) -> Iterator[str]:
    """Whether a graphics card spent its time starting operators, which hides what they compute."""
    if report.latency is None or arena.provider.kind != "gpu" or not report.after.nodes:
        return
    each = report.latency.after_ms * 1e3 / report.after.nodes
    if each < LAUNCH:
        yield (
            f"{each:.1f} µs for each of {report.after.nodes} operators is what it takes to start them: at these sizes "
            "the ratio says little of their arithmetic. Give a larger batch with --shape, or "
            "--provider-option enable_cuda_graph=1."
        )


def _placed(equivalence: Equivalence, provider: str) -> Iterator[str]:
    """Which operators the provider left to another one."""
    for places in equivalence.elsewhere.values():
        for other, names in places.items():
            some = ", ".join(names[:5]) + (" and more" if len(names) > 5 else "")
            yield f"{len(names)} operators ran on {other}, not on {provider}: {some}."


def _unknown(report: Report, unseen: bool) -> Iterator[str]:
    """What the count of multiply-adds leaves out, and whether other sizes could change that."""
    before, after = report.before.unknown, report.after.unknown
    if before:
        why = "; --shape may settle them" if unseen else ", whatever the inputs' sizes: they follow from values"
        yield f"Multiply-adds leave out {counted(before, 'operator')} whose sizes are not known{why}."
    if after != before:
        yield f"In the result they leave out {counted(after, 'operator')}, so the two counts are not of the same work."


def _notes(
    report: Report, proto: onnx.ModelProto, denied: Iterable[Site], guessed: bool, unseen: bool
) -> Iterator[str]:
    """What a user should know of a rewritten model; `unseen` are sizes that were guessed, and on which nothing ran."""
    yield from _unknown(report, unseen)
    found = Counter(n.op_type for n in proto.graph.node if n.op_type in QUANTISED or n.op_type.startswith("QLinear"))
    if found:
        listed = ", ".join(f"{count} {op}" for op, count in found.most_common())
        yield f"Not touched, since folding would round integers once more: {listed}, and the weights that they hold."
    if guessed:
        yield "Inputs fixed to likely sizes, since none were given; --shape chooses them."
    seen = {r.site for r in report.rewrites} | {s.site for s in report.skips}
    for site in denied:
        if site not in seen:
            yield f"No place is called {str(site)!r}; sites look like fold-chains:TENSOR and are listed by --details."


def _inlined(before: onnx.ModelProto, after: onnx.ModelProto) -> Iterator[str]:
    """Which functions are gone."""
    gone = [f"{domain}:{name}" for domain, name in functions(before) if (domain, name) not in functions(after)]
    if gone:
        names = ", ".join(gone[:5]) + (" and more" if len(gone) > 5 else "")
        yield f"Functions inlined, since rewrites reach into them: {names}."


def _growth(report: Report, before: onnx.ModelProto, after: onnx.ModelProto) -> Iterator[str]:
    """What made the model grow, if it did by more than goes unsaid."""
    sizes = total_bytes(before), total_bytes(after)
    if sizes[1] - sizes[0] <= max(UNSAID_GROWTH * sizes[0], UNSAID_BYTES):
        return
    grown: Counter[str] = Counter()
    for r in report.rewrites:
        grown[r.pass_name] += r.growth
    parts = ", ".join(f"{name} {size / 1e6:.2g} MB" for name, size in grown.most_common(3) if size > 0)
    told = f"The model grows by {sizes[1] / sizes[0] - 1:.0%}, from {sizes[0] / 1e6:.3g} to {sizes[1] / 1e6:.3g} MB"
    yield f"{told}{f' ({parts})' if parts else ''}; --max-growth bounds that."


def _not_equivalent(report: Report) -> NotEquivalentError:
    worst = report.equivalence.worst() if report.equivalence is not None else None
    where = report.equivalence.difference if report.equivalence is not None else None
    what = f"output {worst.name!r} {worst.explain()}; " if worst is not None else ""
    what += f"{where.explain()}; " if where is not None else ""
    hint = "nothing was written; leave rewrites out with --deny, or allow more with --rtol and --atol"
    return NotEquivalentError(what + hint, report)
