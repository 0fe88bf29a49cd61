"""`pwopt.optimize`: optimise, verify and measure a model."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
from threadpoolctl import threadpool_limits

from pwopt.graph.files import Source, as_file, blame_model, load, save, save_temporary
from pwopt.graph.model import Model
from pwopt.graph.moved_weights import has_moved, load_moved
from pwopt.graph.names import name_nodes
from pwopt.graph.shapes import format_shape
from pwopt.graph.sources import unwrap
from pwopt.graph.storage import count_bytes, workspace
from pwopt.inputs.feeds import Feeds
from pwopt.optimizing.attempt import Attempt, Attempts
from pwopt.optimizing.budget import Budget
from pwopt.optimizing.denied_sites import check_sites
from pwopt.optimizing.fallback import choose_result
from pwopt.optimizing.layer_times import add_operator_times
from pwopt.optimizing.other_conditions import other_environments
from pwopt.optimizing.preparation import Problem, check_output, define_problem, resolve, start_compilation
from pwopt.optimizing.request import CostModel, Limits, Measuring, Request, Target, Writing
from pwopt.passes import PASSES
from pwopt.reporting import notes
from pwopt.reporting.report import Report
from pwopt.rewriting.driver import Pass
from pwopt.rewriting.records import Site
from pwopt.rewriting.wording import format_count
from pwopt.running import installation, memory, turn
from pwopt.running.progress import Progress, ignore_progress
from pwopt.selecting.compilation import Compilation
from pwopt.selecting.plugins import find_installed, fingerprint
from pwopt.selecting.rewrite_selection import Selection, decide, find_candidates
from pwopt.selecting.tuning_database import TuningDatabase
from pwopt.selecting.tuning_records import CachedTuningRecords, NoTuningRecords, TuningRecords

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """The result of `optimize`.

    Attributes
    ----------
    model : onnx.ModelProto
        The optimised model; external data is not loaded into it.
    report : Report
    """

    model: onnx.ModelProto
    report: Report

    def __repr__(self) -> str:
        from pwopt.reporting.brief import describe_in_one_line

        return f"Result({describe_in_one_line(self.report)})"

    def _repr_html_(self) -> str:
        """Render the head of the report for notebooks."""
        from pwopt.reporting.brief import render_summary

        return render_summary(self.report)


def optimize(
    model: Source, output: str | os.PathLike[str] | None = None, *, provider: str = "cpu",
    cost: CostModel = "measured",
    shapes: Mapping[str, Sequence[int]] | Sequence[Mapping[str, Sequence[int]]] | None = None,
    inputs: str | os.PathLike[str] | Feeds | Sequence[Any] | None = None,
    passes: Sequence[str | type[Pass] | Pass] | None = None, plugins: Sequence[str | type[Pass] | Pass] = (),
    deny: Iterable[str | Site] = (), threads: int | Sequence[int] = (), static: bool = False,
    target: Target = "portable", opset: int | None = None,
    verify: bool = True, cache: bool = True, measuring: Measuring = Request.measuring,
    limits: Limits = Request.limits, writing: Writing = Request.writing, progress: Progress = ignore_progress,
) -> Result:  # fmt: skip
    """Optimise a model, verify it against the original, and measure both.

    Parameters
    ----------
    model : path, bytes, onnx.ModelProto, torch.onnx.ONNXProgram, onnx_ir.Model or Model
    output, provider, cost, shapes, inputs, passes, plugins, deny, threads, static, target, opset, verify, cache,
    progress
        See the attributes of `Request`.
    measuring : Measuring
        How long to measure, and which earlier measurements to use.
    limits : Limits
        By how much the result may differ from the original and grow.
    writing : Writing
        How the result is written.

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
    >>> result = pwopt.optimize("models/linear_sequence.onnx", cost="analytic", verify=False)
    >>> result.report.before.nodes, result.report.after.nodes
    (4, 1)
    """
    request = Request(
        output, provider=provider, cost=cost, shapes=shapes, inputs=inputs, passes=passes, plugins=plugins, deny=deny,
        threads=threads, static=static, target=target, opset=opset, verify=verify, cache=cache, measuring=measuring,
        limits=limits,
        writing=writing, progress=progress,
    )  # fmt: skip
    return run_request(model, request)


@memory.collect_rarely()
def run_request(model: Source, request: Request) -> Result:
    """Optimise a model for a request.

    NumPy uses one thread meanwhile. Most matrices are small, and threads that wait for each other took two thirds of
    the processor time of large models.
    """
    model = unwrap(model)
    path = model if isinstance(model, Path) else None
    check_output(request, path)
    passes = resolve(request, path)
    dry_run = request.writing.dry_run
    if dry_run:
        request = replace(request, output=None, cost="analytic", verify=False)
    request.progress("reading", 0.0)
    names = dict.fromkeys([*(p.name for p in (*PASSES, *find_installed())), *(p.name for p in passes)])
    with contextlib.ExitStack() as stack:
        stack.enter_context(threadpool_limits(limits=1, user_api="blas"))
        folder = stack.enter_context(workspace(request.output))
        source = load(model, folder)
        memory.release_freed()
        renamed = request.opset is not None or bool(source.proto.functions)
        check_sites(request.denied, source.proto, tuple(names), renamed=renamed)
        stack.enter_context(blame_model(source.proto))
        original = _find_file(source, path, folder, stack)
        problem = define_problem(source, original, request).start_worker(stack, races=request.measured)
        LOG.info("%s", _describe_problem(problem, request))
        compilation = start_compilation(problem, passes, request, folder)
        request.progress("rewriting", 0.0)
        compilation.snapshot(tuple(compilation.denied))
        conditions = len(other_environments(problem.environment, request.thread_counts))
        budget = Budget(problem, request.measuring, conditions)
        selection = select_rewrites(compilation, problem, request, budget)
        memory.collect_garbage(count_bytes(source.proto))
        blank = _begin_report(path, problem, passes, request)
        attempts = Attempts(problem, selection, budget, request, blank)
        done = _finish(attempts, compilation).add_notes(*notes.describe_worker(_worker_problem(problem)))
        if dry_run:
            candidates = find_candidates(compilation, NoTuningRecords())
            races = request.measuring.target_profile is None
            done = done.add_notes(*notes.describe_dry_run(candidates.groups, races=races))
        elif done.report.rewrites and request.untimed:
            done = done.add_notes(f"Nothing was timed: {request.untimed}.")
        if request.writing.name_nodes:
            done = replace(done, proto=name_nodes(done.proto))
        if request.output is not None:
            request.progress("writing", 1.0)
            save(done.proto, request.output, source)
        memory.release_freed()
        return Result(load_moved(done.proto, source.folder), done.report)


def _find_file(source: Model, path: Path | None, folder: Path, stack: contextlib.ExitStack) -> Path:
    """Return the file that onnxruntime loads as the original: the model's own, or a temporary one."""
    if not has_moved(source.proto):
        return stack.enter_context(as_file(source if path is None else path))
    original = folder / ("model.onnx" if path is None else path.name)
    save_temporary(source.proto, original, source)
    return original


def _begin_report(path: Path | None, problem: Problem, passes: Sequence[Pass], request: Request) -> Report:
    return Report(
        model="<model in memory>" if path is None else str(path),
        output=None if request.output is None else str(request.output),
        provider=request.provider,
        environment={
            **installation.describe_machine(request.execution_provider, request.first_threads),
            "huge_pages_mb": None if problem.environment is None else problem.environment.huge_pages_mb,
        },
        shapes=problem.sizes,
        passes={p.name: p.identity() for p in passes},
    )


def _finish(attempts: Attempts, compilation: Compilation) -> Attempt:
    """Run the attempts, and choose the model to return."""
    measured = {p.name for p in compilation.passes if p.needs_measuring}
    done = attempts.run(compilation)

    def try_unmeasured() -> Attempt | None:
        if measured.isdisjoint(r.pass_name for r in done.report.rewrites):
            return None
        unmeasured = replace(attempts, selection=replace(attempts.selection, allowed=frozenset()))
        if not attempts.budget.allows_retry:  # verified without a race
            unmeasured = replace(unmeasured, request=replace(attempts.request, cost="analytic"))
        return unmeasured.run(compilation)

    result = choose_result(done, try_unmeasured, attempts.problem.source.proto, attempts.request.insists)
    if not result.report.rewrites:
        result = replace(result, report=add_operator_times(result.report, attempts.problem, attempts.request))
    sites = attempts.selection.allowed or ()
    first = [*notes.explain_additions(result.report, {site.pass_name for site in sites})]
    if attempts.problem.environment is not None:
        first += notes.explain_threads(attempts.request.thread_counts)
    result = replace(result, report=replace(result.report, notes=(*first, *result.report.notes)))
    spent = notes.explain_time(result.report, attempts.problem.source.proto)
    return result.add_notes(*spent, *attempts.problem.why)


def _worker_problem(problem: Problem) -> str:
    worker = None if problem.environment is None else problem.environment.worker
    return "" if worker is None else worker.problem


def _describe_problem(problem: Problem, request: Request) -> str:
    """Describe the inputs and the environment of the measurements, and how they were chosen."""
    sizes = ", ".join(f"{name} {format_shape(shape)}" for name, shape in problem.sizes.items())
    given = "likely sizes, since none were given" if problem.guessed else "the model's own, or given"
    if problem.environment is None:
        return f"sizes for costs: {sizes} ({given}); nothing is run"
    held = "the inputs given" if request.inputs is not None else "random inputs"
    count = format_count(len(problem.samples), "sample")
    return f"sizes for costs, verification and timing: {sizes} ({given}); {count} of {held}"


def select_rewrites(compilation: Compilation, problem: Problem, request: Request, budget: Budget) -> Selection:
    """Select the measured rewrites that pay, according to a tuning database or to races."""
    measuring, chosen = request.measuring, compilation.candidates()
    if not any(p.needs_measuring for p in chosen):
        return Selection()
    if measuring.target_profile is not None:
        database = TuningDatabase.load(measuring.target_profile)
        return _decide(compilation, replace(problem, environment=None), database, request, 0.0)
    if problem.environment is None or not request.measured:
        return Selection()
    if measuring.seconds <= 0:
        return Selection(frozenset())
    marks = {p.name: fingerprint(p) for p in chosen if not p.builtin}
    provider, threads, name = request.execution_provider, request.first_threads, problem.original.name
    cached = CachedTuningRecords(provider, threads, compilation.digest(), marks, name)
    LOG.info("measured rewrites are raced in the whole model; all measurements have %g s", measuring.seconds)
    request.progress("waiting for a turn to measure", 0.0)
    problem.environment.await_workers()
    with turn.exclusive():  # from the first race to the last, since waiting would use up the budget
        records = cached if request.cache else NoTuningRecords()
        return _decide(compilation, problem, records, request, budget.for_selection())


def _decide(
    compilation: Compilation, problem: Problem, records: TuningRecords, request: Request, seconds: float
) -> Selection:
    request.progress("looking for rewrites to measure", 0.0)
    candidates = find_candidates(compilation, records, thorough=request.measuring.effort == "thorough")
    decisions = decide(compilation, candidates, problem.environment, seconds, records, request.progress)
    return Selection.from_decisions(candidates, decisions, records)
