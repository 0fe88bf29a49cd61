"""Prepare an optimisation: find sizes and inputs, start a worker, and make the model that passes will rewrite."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from pwopt.errors import UsageError
from pwopt.evidence.certify import certify, skip_certificate
from pwopt.evidence.declared_shapes import drop_declarations, find_wrong_declarations
from pwopt.graph.files import fix_inputs, from_proto
from pwopt.graph.model import Model
from pwopt.graph.opset import convert_opset
from pwopt.graph.shapes import find_declared
from pwopt.graph.storage import count_bytes
from pwopt.inputs.input_specs import check_shapes, input_specs
from pwopt.inputs.samples import Sample, draw_samples, read_samples
from pwopt.optimizing.request import Request
from pwopt.optimizing.targets import find_kind, raise_opset
from pwopt.passes import PASSES
from pwopt.reporting import notes
from pwopt.rewriting.driver import Pass
from pwopt.rewriting.wording import suggest
from pwopt.running import huge_pages, installation, memory
from pwopt.running.size_trials import ChosenSizes, Sizes, choose_rounds, choose_sizes, explain_sizes
from pwopt.running.worker import Worker
from pwopt.selecting.compilation import Compilation
from pwopt.selecting.environment import Environment
from pwopt.selecting.inlining import inline_functions
from pwopt.selecting.pass_list import resolve_passes
from pwopt.selecting.plugins import find_installed
from pwopt.selecting.shape_folding import infer_ranks


@dataclass(frozen=True)
class Problem:
    """A model, and the inputs and the environment in which its rewrites are judged.

    Attributes
    ----------
    source : Model
    original : Path
        The model's file, perhaps a temporary one.
    samples : list of Sample
        Empty if no model is run.
    sizes : mapping of input name to sizes
        The input sizes of all figures.
    guessed : bool
        Whether the sizes are guesses.
    why : tuple of str
        Notes for the report on how the sizes were chosen.
    environment : Environment or None
        Where models run; None if no model is run.
    """

    source: Model
    original: Path
    samples: list[Sample]
    sizes: Sizes
    guessed: bool
    why: tuple[str, ...]
    environment: Environment | None

    def start_worker(self, stack: contextlib.ExitStack, *, races: bool) -> Problem:
        """Add a worker process that runs each candidate first; it lives until the stack is closed.

        Where programs can have huge pages or small ones, add one with each. They start in the background, one after the
        other; the second one only for races, and not if the model is large.
        """
        environment = self.environment
        if environment is None:
            return self
        setting = self.original, environment.provider, environment.threads, environment.samples[0].feeds
        together = environment.together
        worker = stack.enter_context(contextlib.closing(Worker(*setting, together=together)))
        pool = ThreadPoolExecutor(1)
        worker.start_early(pool)
        small = None
        if environment.provider.kind == "cpu" and huge_pages.system_mode() == "madvise":
            small = stack.enter_context(contextlib.closing(Worker(*setting, huge=False, together=together)))
            if races and together:
                small.start_early(pool)
        pool.shutdown(wait=False)
        return replace(self, environment=replace(environment, worker=worker, small_worker=small))


def resolve(request: Request, path: Path | None) -> tuple[Pass, ...]:
    """Resolve the passes of a request, without those that it denies. Modules of plugins may lie beside the model.

    Raises
    ------
    UsageError
        If there is no pass of a denied name; see also `resolve_passes`.
    """
    passes, denied = resolve_passes(request.passes, request.plugins, path), request.denied_passes
    if denied:
        known = {p.name for p in (*PASSES, *find_installed())} | {p.name for p in passes}
    for name in denied:
        if name not in known:
            hint = suggest(name, sorted(known))
            raise UsageError(f"there is no pass {name!r} to leave out (a place is PASS:TENSOR); {hint}")
    return tuple(p for p in passes if p.name not in denied)


def check_output(request: Request, path: Path | None) -> None:
    """Refuse to replace the model's file without `force`.

    Raises
    ------
    UsageError
    """
    output = request.output
    if output is not None and path is not None and not request.writing.force and same_file(output, path):
        raise UsageError(f"the output {str(output)!r} is the input; choose another, or force it")


def same_file(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    """Whether two paths name the same existing file."""
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def define_problem(source: Model, original: Path, request: Request) -> Problem:
    """Take the given sizes and inputs, or choose likely ones.

    Raises
    ------
    UsageError, ModelError, ProviderError
        If they do not fit the model, or the model does not run.
    """
    specs, given = input_specs(source.proto), request.rounds
    first = given[0] if given else None
    for shapes in given:
        check_shapes(specs, shapes)
    if request.inputs is not None and len(given) > 1:
        raise UsageError("given inputs have their own sizes; use several --shape with random inputs only")
    if request.verify and request.measured:
        installation.import_onnxruntime()
    runs = request.verify and installation.is_available()
    samples = [] if request.inputs is None else read_samples(request.inputs, specs, first)
    request.progress("choosing inputs", 0.0)
    if samples:
        chosen = [ChosenSizes({name: value.shape for name, value in samples[0].feeds.items()})]
    elif runs:
        chosen = choose_rounds(specs, source.proto, original, request.execution_provider, given, request.progress)
        samples = draw_samples(specs, [c.sizes for c in (chosen[:1] if request.static else chosen)])
    else:
        chosen = [choose_sizes(specs, source.proto, shapes=first)]
    guessed = not given and request.inputs is None and bool(specs)
    together = count_bytes(source.proto) < memory.LARGE_MODEL
    settings = request.execution_provider, request.first_threads, samples
    environment = Environment(*settings, together=together) if runs else None
    why = tuple(explain_sizes(chosen[0]))
    return _check_declarations(Problem(source, original, samples, chosen[0].sizes, guessed, why, environment))


def _check_declarations(problem: Problem) -> Problem:
    """Note which declared shapes pwopt trusts. If the model runs, ignore those that are wrong."""
    proto, where = problem.source.proto, problem.environment
    trusted = {v.name for v in find_declared(proto)}
    if not trusted:
        return problem
    wrong = None
    if where is not None:
        wrong = find_wrong_declarations(proto, problem.original, where.samples, where.provider, where.threads)
    source = problem.source
    if wrong:
        source = from_proto(drop_declarations(proto, wrong), source.folder)
    makers = {
        node.op_type: None for node in proto.graph.node if trusted.difference(wrong or ()).intersection(node.output)
    }
    sentences = notes.describe_declarations(list(makers), wrong)
    return replace(problem, source=source, why=(*problem.why, *sentences))


def start_compilation(problem: Problem, passes: tuple[Pass, ...], request: Request, folder: Path) -> Compilation:
    """Convert the model to the requested opset, fix its inputs if requested, and inline functions.

    Raises
    ------
    UsageError
        If the model cannot be converted.
    """
    target = source = problem.source
    if request.opset is not None and request.opset != source.opset:
        ranks = infer_ranks(source.proto, problem.sizes)
        target = from_proto(convert_opset(source, request.opset, ranks), source.folder)
    if request.static:
        target = from_proto(fix_inputs(target.proto, problem.sizes), source.folder)
    if request.opset is None:
        target = raise_opset(target, request.target, problem.sizes)
    target = inline_functions(target, passes, request.denied, problem.sizes)
    kind = find_kind(request.target, request.execution_provider.kind)
    return Compilation(
        target, source, passes, request.denied, problem.sizes, folder, kind,
        request.limits.max_growth, certifier=certify if request.verify else skip_certificate,
    )  # fmt: skip
