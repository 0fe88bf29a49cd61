"""A model goes in, a faster verified one comes out."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from pwopt import runtime, timing
from pwopt.cost import Cost, measure
from pwopt.errors import ModelError, NotEquivalentError, UsageError
from pwopt.graph import View
from pwopt.model import Model, annotate, from_proto, load, save, with_fixed_inputs
from pwopt.passes import PASSES, CleanUp
from pwopt.report import Latency, Report
from pwopt.rewrite import Outcome, Pass, Pipeline, Rewrite
from pwopt.runtime import Feeds
from pwopt.shapes import infer, known, skeleton
from pwopt.verify import choose_inputs, compare

Progress = Callable[[str, float], None]

#: Seconds to race the result against the original.
RACE_SECONDS = 8.0


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


def select_passes(names: Sequence[str] | None) -> list[Pass]:
    """Passes by name, in pipeline order; all by default.

    Raises
    ------
    UsageError
        If a name is unknown.
    """
    known = {p.name: p for p in PASSES}
    unknown = [n for n in names or () if n not in known]
    if unknown:
        raise UsageError(f"there is no pass {unknown[0]!r}; there are {', '.join(known)}")
    return [p() for p in PASSES if names is None or p.name in names]


def convert_opset(model: Model, target: int) -> onnx.ModelProto:
    """The model in another opset, by onnx's own converter, keeping what the converter drops.

    Raises
    ------
    UsageError
        If onnx cannot convert it.
    """
    newest = onnx.defs.onnx_opset_version()
    if not model.opset <= target <= newest:
        raise UsageError(f"--opset {target} is not between the model's {model.opset} and onnx's {newest}")
    light = skeleton(model.proto)
    try:
        converted = onnx.version_converter.convert_version(light, target)
    except Exception as error:
        raise UsageError(
            f"onnx cannot convert this model to opset {target} ({type(error).__name__}); leave --opset out"
        ) from error
    out = onnx.ModelProto()
    out.CopyFrom(model.proto)
    originals = {(n.op_type, *n.output): n for n in model.proto.graph.node}
    names = {n.name for n in originals.values()}
    del out.graph.node[:]
    for node in converted.graph.node:
        old = originals.get((node.op_type, *node.output))
        if old is not None:  # the converter keeps neither metadata nor documentation
            node.name, node.doc_string = old.name, old.doc_string
            node.metadata_props.extend(old.metadata_props)
        elif node.name in names:
            node.name = ""  # it splits operators into several of one name, which onnxruntime refuses
        out.graph.node.append(node)
    have = {t.name for t in out.graph.initializer}
    out.graph.initializer.extend(t for t in converted.graph.initializer if t.name not in have)
    for entry in out.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = target
    out.ir_version = max(out.ir_version, onnx.helper.find_min_ir_version_for(list(out.opset_import)))
    return out


def optimize(
    model: str | os.PathLike[str] | onnx.ModelProto,
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
    progress: Progress = lambda _stage, _done: None,
) -> Result:
    """Optimise a model, verify it against the original, measure both.

    Parameters
    ----------
    model : path or onnx.ModelProto
    output : path, optional
        Where to write the result, atomically and only if it is equivalent. Nothing is written without it.
    provider : str
        Execution provider: cpu, cuda, openvino…, or onnxruntime's full name. Never replaced by another.
    cost_model : {"measured", "analytic"}
        "measured" races the result against the original and returns the original if that is faster;
        "analytic" decides from shapes alone, needs no onnxruntime, and is deterministic.
    shapes : mapping of input name to sizes, optional
        Sizes for dynamic inputs, for costs, verification and timing; the model stays dynamic.
    inputs : path of an .npz, or dict of arrays, optional
        Inputs to verify and time on, instead of random ones.
    passes : sequence of str, optional
        Names of passes to run; all by default.
    deny : iterable of str
        Sites (from a report) that must not be rewritten.
    threads : int
        Intra-operator threads for verification and timing.
    static : bool
        Fix the inputs to their shapes in the result, which settles shape arithmetic.
    opset : int, optional
        Convert to this opset first.
    rtol, atol : float, optional
        Tolerances instead of the defaults for each type.
    check : bool
        Verify with onnxruntime; needs one installed unless the cost is analytic.
    race_seconds : float
        Time to spend on the final race.
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
        raise UsageError(f"--cost {cost_model!r} is not one of: measured, analytic")
    chosen = select_passes(passes)
    progress("reading", 0.0)
    source = load(model)
    specs = runtime.input_specs(source.proto)
    runtime.check_shapes(specs, shapes or {})
    if cost_model == "measured":
        runtime.onnxruntime()
    can_run = check and (cost_model == "measured" or runtime.available())

    with contextlib.ExitStack() as stack:
        original = stack.enter_context(_as_file(model, source)) if can_run else None
        samples: list[Feeds] = []
        sizes: dict[str, tuple[int, ...]]
        if original is not None:
            progress("choosing inputs", 0.0)
            sizes, samples = choose_inputs(source.proto, original, provider, shapes, inputs)
        else:
            sizes = next(runtime.candidate_shapes(specs, shapes))

        target = source
        if opset is not None and opset != source.opset:
            target = from_proto(convert_opset(source, opset), source.folder)
        if static:
            target = from_proto(with_fixed_inputs(target.proto, sizes), source.folder)
        progress("rewriting", 0.0)
        before, outcome, after = run_pipeline(target, chosen, deny, sizes)
        proto = target.to_proto()
        notes = list(_coverage_notes(before))

        equivalence, latency = None, None
        folder = stack.enter_context(_workspace(output))
        candidate = folder / "candidate.onnx"
        rewritten = proto is not source.proto
        if original is not None and rewritten:
            save(proto, candidate, source)
            progress("verifying", 0.0)
            sessions = (
                runtime.Session(original, provider, threads),
                runtime.Session(original, provider, threads, optimise=False),
                runtime.Session(candidate, provider, threads),
            )
            equivalence = compare(*sessions, samples, rtol, atol)
            notes.extend(_placement_notes(candidate, provider, threads, samples[0]))
            if equivalence.passed and cost_model == "measured":
                fast = (sessions[0], sessions[2])
                race = timing.race(fast, samples[0], race_seconds, lambda done: progress("racing", done))
                latency = _latency(race)
        elif not check or not can_run:
            why = "as asked" if not check else "onnxruntime is not installed"
            notes.append(f"Not verified ({why}).")

        report = Report(
            str(model) if not isinstance(model, onnx.ModelProto) else "<model in memory>",
            None if output is None else str(output),
            provider,
            runtime.environment(provider, threads),
            sizes,
            outcome.rewrites,
            outcome.skips,
            before,
            after,
            equivalence,
            latency,
            tuple(notes),
        )
        if equivalence is not None and not equivalence.passed:
            raise _not_equivalent(report)
        if latency is not None and latency.interval[1] < 1.0:
            if static or opset is not None:  # asked for, so there is no going back to the original
                report = _noted(report, f"The result was measured slower than the original ({latency.speedup:.2f}×).")
            else:
                proto, report = source.proto, replace(report, after=report.before)
                report = _noted(
                    report,
                    f"The rewritten model was measured slower ({latency.speedup:.2f}×): the original is returned.",
                )
        if output is not None:
            progress("writing", 1.0)
            save(proto, output, source)
    return Result(proto, report)


def _not_equivalent(report: Report) -> NotEquivalentError:
    worst = report.equivalence.worst() if report.equivalence is not None else None
    what = (
        ""
        if worst is None
        else (
            f"output {worst.name!r} deviates by {worst.max_abs:.3g} (noise floor {worst.floor:.3g}): {worst.reason}; "
        )
    )
    hint = "nothing was written; leave rewrites out with --deny, or allow more with --rtol and --atol"
    return NotEquivalentError(what + hint, report)


def _noted(report: Report, note: str) -> Report:
    return replace(report, notes=(*report.notes, note))


def _latency(race: timing.Race) -> Latency:
    return Latency(
        race.median(0) * 1e3, race.median(1) * 1e3, race.speedup(), race.interval(),
        race.minimum(0) * 1e3, race.minimum(1) * 1e3, race.rounds,
    )  # fmt: skip


def _coverage_notes(before: Cost) -> Iterator[str]:
    if before.unknown:
        yield f"Multiply-adds leave out {before.unknown} operators whose sizes are not known; --shape may settle them."


def _placement_notes(path: Path, provider: str, threads: int, feeds: Feeds) -> Iterator[str]:
    """Which nodes the provider left to another one; on the CPU provider there is nothing to leave."""
    if runtime.PROVIDERS.get(provider, provider) == "CPUExecutionProvider":
        return
    session = runtime.Session(path, provider, threads, profile=True)
    session.run(feeds)
    placed = session.placement()
    total = sum(map(len, placed.values()))
    for other, names in runtime.elsewhere(placed, provider).items():
        some = ", ".join(sorted(names)[:5]) + (" and more" if len(names) > 5 else "")
        yield f"{len(names)} of {total} nodes ran on {other}, not on {provider}: {some}."


def settle(model: Model, deny: Iterable[str] = ()) -> tuple[Rewrite, ...]:
    """Clean up and infer shapes in turn until neither has news: each constant computed may settle more shapes."""
    rewrites: list[Rewrite] = []
    while done := CleanUp().run(model.graph, denied=deny, reserved=model.names()).rewrites:
        rewrites.extend(done)
        annotate(model, infer(model.to_proto()))
    return tuple(rewrites)


def concrete_sizes(proto: onnx.ModelProto, sizes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Shapes in numbers of every tensor for inputs of the given sizes, as far as they follow."""
    model = from_proto(skeleton(proto, sizes))
    found: dict[str, tuple[int, ...]] = {}
    while True:
        types = infer(model.to_proto())
        annotate(model, types)
        found.update((name, numbers) for name, (_, shape) in types.items() if (numbers := known(shape)) is not None)
        if not CleanUp().run(model.graph).rewrites:
            return found


def run_pipeline(
    model: Model, passes: Sequence[Pass], deny: Iterable[str], sizes: Mapping[str, Sequence[int]]
) -> tuple[Cost, Outcome, Cost]:
    """Run passes over a model in place; returns its cost before, what was done, and its cost after."""
    concrete = concrete_sizes(model.proto, sizes)
    before = measure(View(model.graph, concrete))
    settled = settle(model, deny) if any(isinstance(p, CleanUp) for p in passes) else ()
    outcome = Pipeline(passes).run(model.graph, denied=deny, sizes=concrete, reserved=model.names())
    after = measure(View(model.graph, concrete))
    return before, Outcome((*settled, *outcome.rewrites), outcome.skips), after


@contextlib.contextmanager
def _as_file(model: str | os.PathLike[str] | onnx.ModelProto, source: Model) -> Iterator[Path]:
    if not isinstance(model, onnx.ModelProto):
        yield Path(model)
        return
    with tempfile.TemporaryDirectory(prefix="pwopt-") as folder:
        path = Path(folder) / "original.onnx"
        save(source.proto, path, source)
        yield path


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
