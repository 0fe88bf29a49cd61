"""A model goes in, a faster verified one comes out."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from pwopt import bench, runtime
from pwopt.certify import certify, unchecked
from pwopt.compiler import convert_opset, select_passes
from pwopt.equivalence import Equivalence, compare
from pwopt.errors import NotEquivalentError, UsageError
from pwopt.inputs import check_shapes, input_specs
from pwopt.localise import localise
from pwopt.model import Model, as_file, blaming, from_proto, load, save, with_fixed_inputs
from pwopt.report import Latency, Report
from pwopt.rewrite import Skip
from pwopt.runtime import Feeds
from pwopt.samples import given_samples, random_samples
from pwopt.selection import DEFECT, Arena, Disk, Forgetful, Memory, Progress, Work, select
from pwopt.sizes import likely_sizes, rounds
from pwopt.storage import workspace
from pwopt.targets import Profile
from pwopt.verify import placements

#: Seconds to race the result against the original.
RACE_SECONDS = 8.0
#: A speed-up below this is explained.
LITTLE = 1.05
#: Seconds to spend on choosing measured rewrites.
BUDGET = 60.0


@dataclass(frozen=True)
class Result:
    """What `optimize` returns.

    Attributes
    ----------
    model : onnx.ModelProto
        The optimised model; external data is not loaded into it.
    report : Report
    """

    model: onnx.ModelProto
    report: Report


def optimize(
    model: str | os.PathLike[str] | onnx.ModelProto | Model,
    output: str | os.PathLike[str] | None = None,
    *,
    provider: str = "cpu",
    cost_model: str = "measured",
    shapes: Mapping[str, Sequence[int]] | None = None,
    inputs: str | os.PathLike[str] | Feeds | Sequence[Any] | None = None,
    passes: Sequence[str] | None = None,
    deny: Iterable[str] = (),
    threads: int = 1,
    static: bool = False,
    opset: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    check: bool = True,
    race_seconds: float = RACE_SECONDS,
    budget: float = BUDGET,
    cache: bool = True,
    target_profile: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress = lambda _stage, _done: None,
) -> Result:
    """Optimise a model, verify it against the original, measure both.

    Parameters
    ----------
    model : path, onnx.ModelProto or Model
    output : path, optional
        Where to write the result, atomically; never if verification fails. Nothing is written without it.
    provider : str
        Execution provider: cpu, cuda, openvino…, or onnxruntime's full name. Never replaced by another.
    cost_model : {"measured", "analytic"}
        "measured" races the result against the original, and returns the original if that is faster; rewrites
        that only a clock can judge are raced one kind after another, and kept where they are clearly faster.
        "analytic" decides from shapes alone and is deterministic. It verifies if it finds an onnxruntime,
        and says in the report's notes if it does not.
    shapes : mapping of input name to sizes, optional
        Sizes for dynamic inputs, for costs, verification and timing; the model stays dynamic.
    inputs : path, dict of arrays, or a sequence of those, optional
        Inputs to verify on, and to time on the first of, instead of random ones; see `pwopt.samples.given_samples`.
    passes : sequence of str, optional
        Names of passes to run; all by default. Measured passes that are named are not raced, but applied wherever
        they are exact.
    deny : iterable of str
        Sites (from a report) that must not be rewritten.
    threads : int
        Intra-operator threads for verification and timing.
    static : bool
        Fix the inputs to their shapes in the result, which settles shape arithmetic. There is no going back to
        the original then: a slower result is returned with a note.
    opset : int, optional
        Convert to this opset first; as with `static`, a slower result is returned with a note.
    rtol, atol : float, optional
        Tolerances instead of the defaults for each type.
    check : bool
        Verify and measure. Without, the result is what the algebra says; the original may still be run to find
        sizes for dynamic inputs.
    race_seconds : float
        Time to spend on the final race.
    budget : float
        Seconds at most to spend on racing measured rewrites; 0 leaves them out.
    cache : bool
        Use the decisions of earlier races on this machine (`pwopt.cache`), and remember those of this one.
    target_profile : path, optional
        What `pwopt.profile` recorded on the machine that the model is for: it decides on measured rewrites, and nothing
        is timed here.
    force : bool
        Allow `output` to be the file that the model came from.
    progress : callable, optional
        Called with (stage, fraction done).

    Returns
    -------
    Result

    Raises
    ------
    NotEquivalentError
        If the result deviates beyond tolerance and noise floor; nothing is written.
    UsageError, ModelError, ProviderError
        See `pwopt.errors`.

    Examples
    --------
    >>> import pwopt
    >>> result = pwopt.optimize("models/linear_sequence.onnx", cost_model="analytic", check=False)
    >>> result.report.before.nodes, result.report.after.nodes
    (4, 1)
    """
    if target_profile is not None:
        cost_model = "analytic"  # a race on this machine says nothing about that one
    if cost_model not in ("measured", "analytic"):
        raise UsageError(f"the cost model {cost_model!r} is not one of: measured, analytic")
    runtime.check_settings(threads, rtol, atol)
    select_passes(_names(passes))  # unknown names are told before any work is done
    denied = _names(deny) or ()
    path = None if isinstance(model, (onnx.ModelProto, Model)) else Path(model)
    if output is not None and path is not None and not force and same_file(output, path):
        raise UsageError(f"the output {str(output)!r} is the input; choose another, or force it")
    progress("reading", 0.0)
    source = load(model)
    specs = input_specs(source.proto)
    check_shapes(specs, shapes or {})
    if check and cost_model == "measured":
        runtime.onnxruntime()
    can_run = check and runtime.available()

    with contextlib.ExitStack() as stack:
        stack.enter_context(blaming(source.proto))
        original = stack.enter_context(as_file(path or source))
        samples = [] if inputs is None else given_samples(inputs, specs, shapes)
        progress("choosing inputs", 0.0)
        if can_run and not samples:
            chosen = rounds(specs, original, provider, [shapes] if shapes else [])
            samples = random_samples(specs, chosen[:1] if static else chosen)
        if samples:
            sizes = {name: value.shape for name, value in samples[0].feeds.items()}
        else:
            sizes = likely_sizes(specs, original, shapes=shapes, must_run=False)

        target = source
        if opset is not None and opset != source.opset:
            target = from_proto(convert_opset(source, opset), source.folder)
        if static:
            target = from_proto(with_fixed_inputs(target.proto, sizes), source.folder)
        work = Work(target, source, _names(passes), denied, sizes, stack.enter_context(workspace(output)))
        allowed: frozenset[str] | None = None
        dropped: list[Skip] = []
        arena = Arena(provider, threads, samples) if can_run else None
        if target_profile is not None and passes is None:
            allowed, dropped = select(work, None, 0.0, Profile.load(target_profile), progress)
        elif arena is not None and cost_model == "measured" and passes is None:
            memory: Memory = Disk(provider, threads, work.digest()) if cache else Forgetful()
            allowed, dropped = select(work, arena, budget, memory, progress) if budget > 0 else (frozenset(), [])
        blank = Report(
            model=str(path) if path is not None else "<model in memory>",
            output=None if output is None else str(output),
            provider=provider,
            environment=runtime.environment(provider, threads),
            shapes=sizes,
        )
        guessed = static and not shapes and inputs is None and bool(specs)

        def attempt(always_only: bool = False) -> _Attempt:
            """Rewrite; verify and race what came out."""
            progress("rewriting", 0.0)
            tried = replace(work, always_only=always_only)
            before, outcome, after, proto, refused = tried.certified(allowed, certify if check else unchecked)
            left = (*(s for s in outcome.skips if s.site not in refused), *refused.values(), *dropped)
            report = replace(blank, rewrites=outcome.rewrites, skips=left, before=before, after=after)
            if refused:
                report = _noted(report, f"{len(refused)} rewrites were refused by their certificates: {DEFECT}.")
            report = _noted(report, *_notes(report, source.proto, denied, guessed))
            if arena is None:
                report = _noted(report, f"Not verified ({'onnxruntime is not installed' if check else 'as asked'}).")
            elif proto is not source.proto:
                trial = _Trial(original, work.file(proto), arena)
                progress("verifying", 0.0)
                report = replace(report, equivalence=trial.verify(rtol, atol))
                if not report.equivalence or not report.equivalence.passed:
                    raise _not_equivalent(trial.located(report))
                report = _noted(report, *_placed(report))
                if cost_model == "measured":
                    report = replace(report, latency=trial.race(race_seconds, lambda done: progress("racing", done)))
                    report = replace(report, operators=trial.operators())
            return _Attempt(proto, report)

        done = attempt()
        asked = f"--opset {opset}" if opset is not None else "--static" if static else "--passes" if passes else ""
        if not done.faster:
            policy = {p.name: p.policy for p in select_passes(None)}
            more = any(policy[r.pass_name] != "always" for r in done.report.rewrites)
            done = _kept(done, asked) if asked else _best(done, attempt(True) if more else done, source.proto)
        proto, report = done.proto, done.report
        if done.faster and report.latency is not None and report.latency.speedup < LITTLE and not asked:
            report = _noted(report, f"Little was gained. {_why_little(report)}")
        if output is not None:
            progress("writing", 1.0)
            save(proto, output, source)
    return Result(proto, report)


def same_file(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    """Whether two paths name one existing file."""
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def _names(given: Iterable[str] | None) -> tuple[str, ...] | None:
    return None if given is None else (given,) if isinstance(given, str) else tuple(given)


@dataclass(frozen=True)
class _Trial:
    """The original and its rewritten candidate in one arena."""

    original: Path
    candidate: Path
    arena: Arena

    def verify(self, rtol: float | None, atol: float | None) -> Equivalence:
        arena = self.arena
        equivalence = compare(
            arena.session(self.original),
            arena.session(self.original, optimise=False),
            arena.session(self.candidate),
            arena.samples,
            rtol,
            atol,
        )
        return replace(
            equivalence,
            elsewhere=placements({"candidate": self.candidate}, arena.provider, arena.threads, arena.samples[0]),
        )

    def located(self, report: Report) -> Report:
        """The report of a failure, with the place where the models begin to differ and the rewrites that made it."""
        failed, arena = report.equivalence, self.arena
        if failed is None:
            return report
        difference = localise(
            self.original, self.candidate, failed, arena.samples, arena.provider, arena.threads, report.rewrites
        )
        return replace(report, equivalence=replace(failed, difference=difference))

    def race(self, seconds: float, progress: Callable[[float], None]) -> Latency:
        race = self.arena.race([self.original, self.candidate], seconds, progress)
        return Latency(
            race.median(0) * 1e3, race.median(1) * 1e3, race.speedup(), race.interval(),
            race.minimum(0) * 1e3, race.minimum(1) * 1e3, race.rounds,
        )  # fmt: skip

    def operators(self) -> dict[str, dict[str, float]]:
        """Where the time goes in both, by operator, in milliseconds per run."""
        models = {"before": self.original, "after": self.candidate}
        provider, threads, feeds = self.arena.provider, self.arena.threads, self.arena.samples[0].feeds
        return {name: bench.operator_times(path, provider, threads, feeds) for name, path in models.items()}


def _placed(report: Report) -> Iterator[str]:
    """Which operators the provider left to another one."""
    for places in report.equivalence.elsewhere.values() if report.equivalence is not None else ():
        for other, names in places.items():
            some = ", ".join(names[:5]) + (" and more" if len(names) > 5 else "")
            yield f"{len(names)} operators ran on {other}, not on {report.provider}: {some}."


#: Operators on integers that stand for reals, besides those called QLinear….
QUANTISED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger")


def _notes(report: Report, proto: onnx.ModelProto, denied: Iterable[str], guessed: object) -> Iterator[str]:
    unknown = report.before.unknown
    if unknown:
        yield f"Multiply-adds leave out {unknown} operators whose sizes are not known; --shape may settle them."
    found = Counter(n.op_type for n in proto.graph.node if n.op_type in QUANTISED or n.op_type.startswith("QLinear"))
    if found:
        listed = ", ".join(f"{count} {op}" for op, count in found.most_common())
        yield f"Not touched, since folding would round integers once more: {listed}, and the weights that they hold."
    if guessed:
        yield "Inputs fixed to likely sizes, since none were given; --shape chooses them."
    seen = {r.site for r in report.rewrites} | {s.site for s in report.skips}
    for site in denied:
        if site not in seen:
            yield f"No place is called {site!r}; sites look like fold-chains:TENSOR and are listed by --details."


def _why_little(report: Report) -> str:
    """One sentence on what is left to gain."""
    before, after = report.before.macs, report.after.macs
    if after < before:
        return f"Multiply-adds fell by {1 - after / before:.1%}, but the rest of the model takes the time."
    folded = report.before.nodes - report.after.nodes
    went = f"most of the {folded} operators that went are ones that onnxruntime fuses itself"
    return f"The multiply-adds are all needed, and {went if folded else 'there was nothing to fold'}."


def _noted(report: Report, *notes: str) -> Report:
    return replace(report, notes=(*report.notes, *notes))


@dataclass(frozen=True)
class _Attempt:
    """A rewritten model and the report on it."""

    proto: onnx.ModelProto
    report: Report

    @property
    def faster(self) -> bool:
        """Whether it was measured faster beyond doubt, or nothing was measured."""
        return self.report.latency is None or self.report.latency.interval[0] > 1.0


def _kept(done: _Attempt, asked: str) -> _Attempt:
    """What is not faster, and stays since it was asked for."""
    latency = done.report.latency
    assert latency is not None
    slower = latency.interval[1] < 1.0
    found = f"Measured slower ({latency.speedup:.2f}×)" if slower else f"Not faster beyond doubt{_within(latency)}"
    return replace(done, report=_noted(done.report, f"{found}, and kept since {asked} was asked for."))


def _best(tried: _Attempt, always: _Attempt, original: onnx.ModelProto) -> _Attempt:
    """The original, or the model with nothing but rewrites that always pay if that is faster than it beyond doubt."""
    latency = tried.report.latency
    assert latency is not None
    which = "slower" if latency.interval[1] < 1.0 else "no faster beyond doubt"
    reason = f"measured {which} in the whole model{_within(latency)}"
    better = always.report.latency is not None and always.faster
    kept = always.report.rewrites if better else ()
    sites = {r.site for r in kept}
    taken = tuple(
        Skip(f"{reason}: {r.reason}", r.pass_name, r.site) for r in tried.report.rewrites if r.site not in sites
    )
    skips = (*tried.report.skips, *taken)
    told = f"The rewritten model was measured {which}{_within(latency)}"
    if better:
        note = f"{told}: only the rewrites that always pay were kept."
        return replace(always, report=_noted(replace(always.report, skips=skips), note))
    report = replace(tried.report, rewrites=(), skips=skips, after=tried.report.before)
    return _Attempt(original, _noted(report, f"{told}: the original is returned. {_why_little(tried.report)}"))


def _within(latency: Latency) -> str:
    return f" ({latency.speedup:.3f}× [{latency.interval[0]:.3f}, {latency.interval[1]:.3f}])"


def _not_equivalent(report: Report) -> NotEquivalentError:
    worst = report.equivalence.worst() if report.equivalence is not None else None
    where = report.equivalence.difference if report.equivalence is not None else None
    what = f"output {worst.name!r} {worst.explain()}; " if worst is not None else ""
    what += f"{where.explain()}; " if where is not None else ""
    hint = "nothing was written; leave rewrites out with --deny, or allow more with --rtol and --atol"
    return NotEquivalentError(what + hint, report)
