"""Rewrite, verify and race; repeat without the rewrites that make the result unusable, wrong or slow."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from pwopt.errors import ModelError, NotEquivalentError, ProviderError, PwoptError
from pwopt.evidence.equivalence import Equivalence
from pwopt.evidence.localise import localise
from pwopt.evidence.verify import compare_in_sessions, find_placements
from pwopt.graph.model import Model
from pwopt.graph.reasons import Reason
from pwopt.graph.storage import count_bytes
from pwopt.optimizing.bisection import add_repeated, leave_out_faulty, name_plugins
from pwopt.optimizing.budget import PROFILING_SECONDS, Budget
from pwopt.optimizing.layer_times import compare_layers
from pwopt.optimizing.other_conditions import (
    CONDITION_SHARE,
    ConditionRaces,
    compare_page_sizes,
    other_environments,
)
from pwopt.optimizing.preparation import Problem
from pwopt.optimizing.request import Limits, Request
from pwopt.reporting import notes
from pwopt.reporting.report import NEGLIGIBLE_SLOWDOWN, ConditionLatency, Latency, Report
from pwopt.rewriting.ratios import is_vague
from pwopt.running import bench, installation, memory, timing, turn
from pwopt.running.cold_start import measure_cold_starts
from pwopt.running.session import Session
from pwopt.running.timing import Race
from pwopt.running.worker import UnusableError
from pwopt.selecting.autotuning import WORTH
from pwopt.selecting.compilation import CERTIFICATE_DEFECT, Compilation
from pwopt.selecting.environment import Environment
from pwopt.selecting.profile_alignment import save_marked
from pwopt.selecting.rewrite_selection import Selection

LOG = logging.getLogger(__name__)

#: How often rewriting starts again without the rewrites at fault.
MAX_ATTEMPTS = 8
#: The final race ends early when the speed-up is known to this relative precision, or when the verdict is clear and the
#: speed-up is known to the second one (a large speed-up: `timing.PART_OF_GAIN`).
PRECISE, ROUGHLY = 0.005, 0.02
#: A second final race that only asks for a narrower interval ends at this relative precision.
NARROW = 0.1
#: The least and the greatest number of runs under the profiler.
PROFILED_RUNS = 2, 10


@dataclass(frozen=True)
class Attempt:
    """A rewritten model and the report on it."""

    proto: onnx.ModelProto
    report: Report

    @property
    def slower(self) -> bool:
        """Whether it is surely slower, under the first condition or another."""
        latency = self.report.latency
        return (latency is not None and latency.slower) or any(c.slower for c in self.report.conditions)

    def add_notes(self, *sentences: str) -> Attempt:
        return replace(self, report=self.report.add_notes(*sentences))


@dataclass(frozen=True)
class Attempts:
    """The state that all attempts at one problem share.

    Attributes
    ----------
    problem : Problem
    selection : Selection
        The measured rewrites to make.
    budget : Budget
    request : Request
    blank : Report
        What is known of the model and the machine beforehand.
    """

    problem: Problem
    selection: Selection
    budget: Budget
    request: Request
    blank: Report

    def run(self, compilation: Compilation) -> Attempt:
        """Rewrite, verify and race; repeat without the rewrites that make the result unusable, wrong or slower.

        Raises
        ------
        NotEquivalentError
            If the rewritten model deviates, whatever is left out.
        """
        source = self.problem.source.proto
        for left in reversed(range(MAX_ATTEMPTS)):
            with self.budget.pause():
                done = self.rewrite(compilation)
            memory.collect_garbage(count_bytes(source))
            if self.problem.environment is None:
                return self._skip_verification(done, compilation)
            if done.proto is source:
                return done
            pair = Pair(self.problem.original, compilation.write_file(done.proto), self.problem.environment)
            better, report = self._judge(pair, done, compilation, left)
            if better is compilation:
                return replace(done, report=report)
            compilation = better
        report = replace(done.report, rewrites=(), after=done.report.before)
        return Attempt(source, report.add_notes(*compilation.notes[-1:], notes.RETURNED))

    def _judge(self, pair: Pair, done: Attempt, compilation: Compilation, left: int) -> tuple[Compilation, Report]:
        """Try, verify and race a result; return a new compilation without the rewrites at fault."""
        seconds, report, peaks = self.budget.for_final_race(), done.report, None
        better = self._leave_out_unusable(pair, report, compilation, left)
        if better is compilation:
            report, peaks = self._verify_and_measure_memory(pair, report)
            better = self._leave_out_wrong(pair, report, compilation, left)
        if better is not compilation or not self.request.measured:
            return better, report
        races = ConditionRaces(pair.original, CONDITION_SHARE * seconds, self.request.progress)
        slow: list[tuple[Environment, ConditionLatency]] = []
        try:
            report, race = self._race(pair, report, seconds, (self.problem.source.proto, done.proto), peaks)
            races = races.learn(report.latency, race)
            report, slow = self._race_elsewhere(races, pair, report, race)
            if report.latency is not None and report.latency.slower:
                first = ConditionLatency(pair.environment.threads, report.shapes, report.latency, slower=True)
                slow = [(pair.environment, first), *slow]
        except UnusableError as error:
            better = compilation.leave_out(done.report.rewrites, f"the model fails when it is timed: {error}")
        if slow and left and not self.request.insists:
            better = races.leave_out_slow(slow, pair.candidate, compilation, report.rewrites, self._build)
        return better, report

    def rewrite(self, compilation: Compilation) -> Attempt:
        """Apply every selected rewrite that its certificate does not refuse."""
        request, source = self.request, self.problem.source.proto
        request.progress("rewriting", 0.0)
        done = compilation.rewrite_certified(self.selection.allowed)
        report = replace(
            self.blank, rewrites=done.rewrites, skips=(*done.skips, *self.selection.dropped), before=done.before,
            after=done.after,
        )  # fmt: skip
        builtin = [p.name for p in compilation.passes if p.builtin]
        guessed, unseen = self.problem.guessed, self.problem.environment is None
        report = report.add_notes(
            *notes.describe_failures(done.failed, builtin),
            *compilation.notes,
            *notes.describe_races(self.selection.decisions, self.selection.hint),
        )
        report = report.add_notes(
            *notes.describe_rewriting(report, source, request.denied, request.static and guessed, guessed and unseen),
            *notes.list_inlined(source, done.proto),
            *notes.describe_growth(report, source, done.proto),
        )
        unfit = compilation.unfit() if request.measured else []
        if unfit:
            report = report.add_notes(f"Not tried, since they serve another kind of provider: {', '.join(unfit)}.")
        return Attempt(done.proto, report)

    def _verify_and_measure_memory(self, pair: Pair, report: Report) -> tuple[Report, tuple[float, float] | None]:
        """Verify; also return the peak memory of both models if the report will have it.

        It is measured in other processes meanwhile, or afterwards if the model is large.
        """
        if not self.request.measured:
            return self.verify(pair, report), None
        if not pair.environment.together:
            report = self.verify(pair, report)
            passed = report.equivalence is None or report.equivalence.passed
            return report, pair.measure_memory() if passed else None
        with ThreadPoolExecutor(1) as pool:
            peaks = pool.submit(pair.measure_memory)
            report = self.verify(pair, report)
            return report, peaks.result()

    def verify(self, pair: Pair, report: Report) -> Report:
        """Compare both models; if they differ, find where the difference begins."""
        self.request.progress("verifying", 0.0)
        equivalence = pair.compare(self.request.limits)
        for o in equivalence.outputs:
            LOG.info("output %r: %s", o.name, "identical" if o.identical else o.explain())
        if equivalence.passed:
            report = replace(report, equivalence=equivalence)
            return report.add_notes(*notes.list_fallbacks(equivalence, report.provider))
        where = pair.environment
        difference = localise(
            pair.original, pair.candidate, equivalence, where.samples, where.provider, where.threads, report.rewrites
        )
        return replace(report, equivalence=replace(equivalence, difference=difference))

    def _build(self, compilation: Compilation) -> Path:
        return compilation.write_file(compilation.rewrite(self.selection.allowed).proto)

    def _skip_verification(self, done: Attempt, compilation: Compilation) -> Attempt:
        """Note that no model was run. The result is still loaded if onnxruntime is installed."""
        request = self.request
        if request.writing.dry_run:  # a note of its own says so
            return done
        available = installation.is_available()
        why = "as asked" if available or not request.verify else "onnxruntime is not installed"
        if request.output is not None and available and done.report.rewrites:
            try:
                Session(compilation.write_file(done.proto), request.execution_provider)
            except (ModelError, ProviderError) as error:
                return done.add_notes(f"Not verified ({why}). The result cannot be used: {error}.")
        return done.add_notes(f"Not verified ({why}).")

    def _leave_out_unusable(self, pair: Pair, report: Report, compilation: Compilation, left: int) -> Compilation:
        """Leave out rewrites whose model does not load, crashes, or takes too much."""
        environment = pair.environment
        if not report.rewrites or not environment.fault(pair.candidate):
            return compilation
        if left > 1:

            def find_fault(tried: Compilation) -> str:
                return environment.fault(self._build(tried))

            found = leave_out_faulty(compilation, report.rewrites, find_fault)
            if found is not compilation:
                return found
        plugins = name_plugins(compilation)
        whose = f", perhaps the fault of {', '.join(plugins)}" if plugins else ""
        return compilation.leave_out(report.rewrites, f"the model cannot be used with some of them{whose}")

    def _leave_out_wrong(self, pair: Pair, report: Report, compilation: Compilation, left: int) -> Compilation:
        """Leave out the rewrites that make the outputs differ, or all if the outputs cannot be compared.

        The first tensor that differs names the rewrites. If it does not, bisection finds them.

        Raises
        ------
        NotEquivalentError
            If the rewrites at fault are not found.
        """
        equivalence = report.equivalence
        if equivalence is None or equivalence.passed:
            return compilation
        worst = equivalence.worst()
        what = "" if worst is None else Reason("output {!r} {}", worst.name, worst.explain())
        if equivalence.verdict == "not comparable":
            why = Reason("{}; --no-verify rewrites the model without a comparison", what)
            return compilation.leave_out(report.rewrites, why)
        sites = equivalence.difference.sites if equivalence.difference is not None else ()
        guilty = [r for r in report.rewrites if r.site in sites]
        if left and guilty:
            reason = Reason("{}; {}", what, CERTIFICATE_DEFECT) if what else CERTIFICATE_DEFECT
            return compilation.leave_out(add_repeated(compilation, guilty, report.rewrites), reason)

        def find_deviation(tried: Compilation) -> str:
            try:
                found = replace(pair, candidate=self._build(tried)).compare_outputs(self.request.limits)
            except ModelError as error:
                return str(error)
            worst = found.worst()
            return "" if found.passed or worst is None else Reason("output {!r} {}", worst.name, worst.explain())

        fewer = leave_out_faulty(compilation, report.rewrites, find_deviation) if left > 1 else compilation
        if fewer is compilation:
            raise NotEquivalentError(notes.explain_not_equivalent(equivalence), report)
        return fewer

    def _race(
        self, pair: Pair, report: Report, seconds: float, protos: tuple[onnx.ModelProto, onnx.ModelProto],
        peaks: tuple[float, float] | None,
    ) -> tuple[Report, Race]:  # fmt: skip
        """Race both models, and profile them for the report; `peaks` is their peak memory in megabytes, if known."""
        small = pair.environment.use_small_pages()
        if small is not None and small.worker is not None and not small.worker.ready:  # nothing may start in a race
            LOG.info("no process has pages of 4 KiB: %s", small.worker.problem)
        with turn.exclusive():
            race = self._race_whole(pair, seconds)
            longer, first = self.budget.for_open_race(), replace(report, latency=Latency.from_race(race))
            if self._is_open(first) and longer > seconds:
                # one disturbed pair among few makes the interval wide
                precise = PRECISE if self._will_retry(first) else NARROW
                more = self._race_whole(pair, longer, race.pairs, precise)
                race = Race((*race.pairs, *more.pairs), min(race.own, more.own))
        figures = race.speedup(), *race.interval(), len(race.pairs)
        LOG.info("the whole model: %.3f× [%.3f, %.3f] over %d pairs of sessions", *figures)
        latency = Latency.from_race(race)
        report = replace(report, latency=latency)
        if self._will_retry(report):
            return report, race
        if latency.start is not None:
            report = replace(report, latency=replace(latency, start=replace(latency.start, memory_mb=peaks)))
        if self.request.measuring.layers:
            self.request.progress("profiling", 1.0)
            report = pair.profile(report, protos, self.problem.source)
        report = report.add_notes(
            *filter(None, [latency.contradiction()]),
            *notes.explain_disturbance(latency, race.own),
            *notes.explain_launches(report, pair.environment.provider.kind),
        )
        return report, race

    def _race_whole(
        self, pair: Pair, seconds: float, earlier: tuple[timing.SessionPair, ...] = (), precise: float = PRECISE
    ) -> Race:
        """Race the original, the candidate, and a copy of the original; or continue a race of them."""
        models = [pair.original, pair.candidate, pair.original]
        rules = replace(final_rules(measured=bool(self.selection.allowed)), earlier=earlier, precise=precise)
        return pair.environment.race(models, seconds, self.request.progress, rules)

    def _is_open(self, report: Report) -> bool:
        """Whether measured rewrites seem to pay, but not beyond doubt, or the interval says little about the result."""
        latency = report.latency
        if latency is None or not self._will_retry(report):
            return latency is not None and is_vague(*latency.interval)
        return latency.speedup > WORTH

    def _will_retry(self, report: Report) -> bool:
        """Whether measured rewrites did not pay, so that this result will not be returned (`choose_result`)."""
        latency, measured = report.latency, self.selection.allowed or frozenset()
        if latency is None or latency.faster or self.request.insists:
            return False
        return any(r.site in measured for r in report.rewrites)

    def _race_elsewhere(
        self, races: ConditionRaces, pair: Pair, report: Report, first: Race
    ) -> tuple[Report, list[tuple[Environment, ConditionLatency]]]:
        """Race under all other conditions; also return those under which the result is slower.

        `first` is the race under the first condition.
        """
        slower = report.latency is None or report.latency.slower
        if (slower and not self.request.insists) or self._will_retry(report):
            return report, []  # the result will not be returned
        others = other_environments(self.problem.environment, self.request.thread_counts)
        with turn.exclusive():
            raced = [(environment, races.run(pair.candidate, environment)) for environment in others]
        found = [(environment, *result) for environment, result in raced if result is not None]
        alike = [race for e, _, race in found if e.small_pages and min(len(race.pairs), len(first.pairs)) > 1]
        pages = next((compare_page_sizes(race, first) for race in alike), None)
        report = replace(report, conditions=tuple(t for _, t, _ in found), huge_pages=pages)
        return report, [(e, t) for e, t, _ in found if t.slower]


def final_rules(*, measured: bool) -> timing.Rules:
    """When the final race may end early: as soon as `fallback.choose_result` has a clear answer.

    A result with measured rewrites must be faster, so the race also ends when there is hardly anything to gain. Another
    result must not be slower.
    """
    if measured:
        return timing.Rules(timing.CONFIDENCE, WORTH, precise=PRECISE, roughly=ROUGHLY)
    return timing.Rules(timing.CONFIDENCE, precise=PRECISE, margin=NEGLIGIBLE_SLOWDOWN, roughly=ROUGHLY)


@dataclass(frozen=True)
class Pair:
    """The original and its rewritten candidate in one environment."""

    original: Path
    candidate: Path
    environment: Environment

    def compare_outputs(self, limits: Limits) -> Equivalence:
        """Compare the outputs of both on every sample."""
        where = self.environment
        return compare_in_sessions(
            self.original, self.candidate, where.samples, where.provider, where.threads, limits.rtol, limits.atol,
            together=where.together,
        )  # fmt: skip

    def compare(self, limits: Limits) -> Equivalence:
        """Compare the outputs of both, and find the operators that ran on another provider."""
        equivalence, where = self.compare_outputs(limits), self.environment
        elsewhere = find_placements({"candidate": self.candidate}, where.provider, where.threads, where.samples[0])
        return replace(equivalence, elsewhere=elsewhere)

    def measure_memory(self) -> tuple[float, float] | None:
        """Measure the peak memory in megabytes of a session of each in a process of its own, if both run there."""
        where, paths = self.environment, (self.original, self.candidate)
        try:
            cold = measure_cold_starts(paths, where.provider, where.threads, where.samples[0].feeds)
        except (PwoptError, OSError) as error:
            LOG.info("the peak memory is not known: %s", error)
            return None
        return cold[0]["memory"] / 1e6, cold[1]["memory"] / 1e6

    def profile(self, report: Report, protos: tuple[onnx.ModelProto, onnx.ModelProto], source: Model) -> Report:
        """Add the times of both models to a report, by operator and by layer."""
        folder = self.candidate.parent
        files = [save_marked(proto, folder / f"marked{k}.onnx", source) for k, proto in enumerate(protos)]
        provider, threads, feeds = (
            self.environment.provider,
            self.environment.threads,
            self.environment.samples[0].feeds,
        )
        fewest, most = PROFILED_RUNS
        latency = report.latency
        each = (latency.before_ms + latency.after_ms) / 1e3 if latency is not None else PROFILING_SECONDS
        runs = max(fewest, min(most, int(PROFILING_SECONDS / each)))
        before, after = bench.time_nodes(files, provider, threads, feeds, runs, together=self.environment.together)
        operators = {"before": bench.sum_by_operator(before), "after": bench.sum_by_operator(after)}
        return replace(report, operators=operators, layers=compare_layers(*protos, report.rewrites, (before, after)))
