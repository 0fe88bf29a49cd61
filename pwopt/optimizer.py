"""A model goes in, a faster verified one comes out."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from pwopt import cache as decisions_on_disk
from pwopt import runtime, timing, tune
from pwopt.compiler import convert_opset, run_pipeline, select_passes
from pwopt.cost import Cost
from pwopt.errors import ModelError, NotEquivalentError, UsageError
from pwopt.model import Model, as_file, blaming, from_proto, load, save, with_fixed_inputs
from pwopt.report import Latency, Report
from pwopt.rewrite import Outcome, Rewrite, Skip
from pwopt.runtime import Feeds, Session
from pwopt.verify import Equivalence, compare, likely_sizes, samples_for

Progress = Callable[[str, float], None]

#: Seconds to race the result against the original.
RACE_SECONDS = 8.0
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
    inputs: str | os.PathLike[str] | Feeds | None = None,
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
    inputs : path of an .npz (or .npy, for one input), or dict of arrays, optional
        Inputs to verify and time on, instead of random ones.
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
    specs = runtime.input_specs(source.proto)
    runtime.check_shapes(specs, shapes or {})
    if check and cost_model == "measured":
        runtime.onnxruntime()
    can_run = check and runtime.available()

    with contextlib.ExitStack() as stack:
        stack.enter_context(blaming(source.proto))
        original = stack.enter_context(as_file(path or source))
        feeds = None if inputs is None else runtime.as_feeds(inputs, specs, shapes)
        progress("choosing inputs", 0.0)
        if feeds is not None:
            sizes = {name: value.shape for name, value in feeds.items()}
        elif can_run:
            sizes = likely_sizes(specs, original, provider, shapes)
        else:
            sizes = likely_sizes(specs, original, shapes=shapes, must_run=False)

        target = source
        if opset is not None and opset != source.opset:
            target = from_proto(convert_opset(source, opset), source.folder)
        if static:
            target = from_proto(with_fixed_inputs(target.proto, sizes), source.folder)
        work = _Work(target, source, _names(passes), denied, sizes, stack.enter_context(_workspace(output)))
        samples = samples_for(specs, sizes, feeds) if can_run else []
        allowed: frozenset[str] | None = None
        dropped: list[Skip] = []
        if can_run and cost_model == "measured" and passes is None:
            allowed, dropped = _tuned(work, _Arena(provider, threads, samples), budget, cache, progress)
        progress("rewriting", 0.0)
        before, outcome, after, proto = work.rewrite(allowed)
        report = Report(
            model=str(path) if path is not None else "<model in memory>",
            output=None if output is None else str(output),
            provider=provider,
            environment=runtime.environment(provider, threads),
            shapes=sizes,
            rewrites=outcome.rewrites,
            skips=(*outcome.skips, *dropped),
            before=before,
            after=after,
        )
        guessed = static and not shapes and inputs is None and specs
        report = _noted(report, *_notes(report, source.proto, denied, guessed))

        if not can_run:
            report = _noted(report, f"Not verified ({'onnxruntime is not installed' if check else 'as asked'}).")
        elif proto is not source.proto:
            trial = _Trial(original, work.file(proto), _Arena(provider, threads, samples))
            progress("verifying", 0.0)
            report = replace(report, equivalence=trial.verify(rtol, atol))
            if not report.equivalence or not report.equivalence.passed:
                raise _not_equivalent(report)
            report = _noted(report, *trial.placement())
            if cost_model == "measured":
                report = replace(report, latency=trial.race(race_seconds, lambda done: progress("racing", done)))
        latency = report.latency
        if latency is not None and latency.interval[0] <= 1.0 <= latency.interval[1]:
            report = _noted(report, f"Not faster beyond doubt. {_why_little(report)}")
        if latency is not None and latency.interval[1] < 1.0 and (static or opset is not None):
            asked = "--static" if static else f"--opset {opset}"
            report = _noted(report, f"Measured slower ({latency.speedup:.2f}×), and kept since {asked} was asked for.")
        elif latency is not None and latency.interval[1] < 1.0:
            proto, report = source.proto, _back_to_original(report, latency.speedup)
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
class _Arena:
    """Where models run: a provider, threads, and inputs."""

    provider: str
    threads: int
    samples: list[Feeds]

    def session(self, model: Path, **options: bool) -> Session:
        return Session(model, self.provider, self.threads, **options)

    def race(
        self,
        models: Sequence[Path],
        seconds: float,
        progress: Callable[[float], None] = lambda _: None,
        decided: float | None = None,
    ) -> timing.Race:
        """As users run them: on CUDA, that is with TF32."""
        sessions = [self.session(m, tf32=True) for m in models]
        return timing.race(sessions, self.samples[0], seconds, progress, decided=decided)


@dataclass
class _Work:
    """A model to rewrite, as often as needed, and a folder for the results."""

    target: Model
    source: Model
    passes: tuple[str, ...] | None
    denied: tuple[str, ...]
    sizes: Mapping[str, Sequence[int]]
    folder: Path
    files: int = 0

    def rewrite(self, allowed: frozenset[str] | None) -> tuple[Cost, Outcome, Cost, onnx.ModelProto]:
        """The model with measured rewrites at the `allowed` sites; None for those that a shape alone decides."""
        fresh = from_proto(self.target.proto, self.target.folder)
        chosen = select_passes(self.passes)
        for p in chosen:
            p.eager = p.eager or allowed is not None
        before, outcome, after = run_pipeline(fresh, chosen, self.denied, self.sizes, allowed)
        return before, outcome, after, fresh.to_proto()

    def opportunities(self) -> tuple[list[Rewrite], list[Skip]]:
        """Everything that each measured pass could do by itself, and what it refuses."""
        found: list[Rewrite] = []
        refused: list[Skip] = []
        for i, p in enumerate(select_passes(None)):
            if p.policy == "measured":
                fresh = from_proto(self.target.proto, self.target.folder)
                chosen = [q for j, q in enumerate(select_passes(None)) if q.policy != "measured" or i == j]
                for q in chosen:
                    q.eager = True
                _, outcome, _ = run_pipeline(fresh, chosen, self.denied, self.sizes)
                found += [r for r in outcome.rewrites if r.pass_name == p.name]
                refused += [s for s in outcome.skips if s.pass_name == p.name]
        return found, refused

    def file(self, proto: onnx.ModelProto) -> Path:
        self.files += 1
        path = self.folder / f"candidate{self.files}.onnx"
        save(proto, path, self.source)
        return path


def _tuned(
    work: _Work, arena: _Arena, budget: float, cache: bool, progress: Progress
) -> tuple[frozenset[str], list[Skip]]:
    """Sites of the measured rewrites that pay, and why the others were dropped."""
    progress("looking for rewrites to measure", 0.0)
    found, refused = work.opportunities() if budget > 0 else ([], [])
    groups = tune.groups(found)
    where = decisions_on_disk.place(arena.provider, arena.threads)

    def remembered(group: tune.Group) -> tune.Decision | None:
        entry = decisions_on_disk.look_up(group.pass_name, group.signature, where) if cache else None
        return None if entry is None else tune.Decision(group, entry.speedup, (entry.low, entry.high), remembered=True)

    decisions = tune.choose(
        groups,
        lambda sites: work.file(work.rewrite(sites)[3]),
        lambda a, b, seconds: arena.race([a, b], seconds, decided=tune.CONFIDENCE),
        budget,
        progress,
        remembered,
    )
    for d in decisions if cache else ():
        if not d.remembered:
            decisions_on_disk.store(
                decisions_on_disk.Entry(d.group.pass_name, d.group.signature, where, d.speedup, *d.interval)
            )
    kept = frozenset(site for d in decisions if d.kept for site in d.group.sites)
    undecided = [
        Skip(f"{g.signature}: no time was left to measure it; --budget gives more", g.pass_name, site)
        for g in groups[len(decisions) :]
        for site in g.sites
    ]
    return kept, [*refused, *(s for d in decisions for s in d.skips()), *undecided]


@dataclass(frozen=True)
class _Trial:
    """The original and its rewritten candidate in one arena."""

    original: Path
    candidate: Path
    arena: _Arena

    def verify(self, rtol: float | None, atol: float | None) -> Equivalence:
        return compare(
            self.arena.session(self.original),
            self.arena.session(self.original, optimise=False),
            self.arena.session(self.candidate),
            self.arena.samples,
            rtol,
            atol,
        )

    def race(self, seconds: float, progress: Callable[[float], None]) -> Latency:
        race = self.arena.race([self.original, self.candidate], seconds, progress)
        return Latency(
            race.median(0) * 1e3, race.median(1) * 1e3, race.speedup(), race.interval(),
            race.minimum(0) * 1e3, race.minimum(1) * 1e3, race.rounds,
        )  # fmt: skip

    def placement(self) -> Iterator[str]:
        """Which nodes the provider left to another one; on the CPU provider there is nothing to leave."""
        if runtime.provider_name(self.arena.provider) == "CPUExecutionProvider":
            return
        session = self.arena.session(self.candidate, profile=True)
        session.run(self.arena.samples[0])
        placed = session.placement()
        total = sum(map(len, placed.values()))
        for other, names in runtime.elsewhere(placed, self.arena.provider).items():
            some = ", ".join(sorted(names)[:5]) + (" and more" if len(names) > 5 else "")
            yield f"{len(names)} of {total} nodes ran on {other}, not on {self.arena.provider}: {some}."


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


def _back_to_original(report: Report, speedup: float) -> Report:
    """The report of a run whose rewrites were all taken back."""
    taken = tuple(Skip(f"measured slower in the whole model: {r.reason}", r.pass_name, r.site) for r in report.rewrites)
    back = replace(report, rewrites=(), skips=(*report.skips, *taken), after=report.before)
    return _noted(back, f"The rewritten model was measured slower ({speedup:.2f}×): the original is returned.")


def _not_equivalent(report: Report) -> NotEquivalentError:
    worst = report.equivalence.worst() if report.equivalence is not None else None
    what = f"output {worst.name!r} {worst.explain()}; " if worst is not None else ""
    hint = "nothing was written; leave rewrites out with --deny, or allow more with --rtol and --atol"
    return NotEquivalentError(what + hint, report)


@contextlib.contextmanager
def _workspace(output: str | os.PathLike[str] | None) -> Iterator[Path]:
    """A folder for the candidate, gone afterwards; beside the output, if there is one, where space is needed."""
    where = None if output is None else Path(output).resolve().parent
    try:
        folder = tempfile.TemporaryDirectory(prefix=".pwopt-", dir=where)
    except OSError as error:
        raise ModelError(f"nothing can be written in {str(where)!r}: {error.strerror}") from error
    with folder:
        yield Path(folder.name)
