"""A model goes in, a faster verified one comes out."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Concatenate, ParamSpec

import onnx

from pwopt.graph.files import Source, as_file, blaming, load, save
from pwopt.graph.names import with_named_nodes
from pwopt.graph.shapes import written
from pwopt.graph.sources import handed, renamed
from pwopt.graph.storage import workspace
from pwopt.optimizing.attempt import Attempt, attempt
from pwopt.optimizing.budget import Budget
from pwopt.optimizing.fallback import returned
from pwopt.optimizing.preparation import Problem, check_request, check_sites, gather, plan
from pwopt.optimizing.request import Request
from pwopt.reporting.brief import render_summary
from pwopt.reporting.report import Report
from pwopt.rewriting.wording import counted
from pwopt.running import installation, timing
from pwopt.selecting.autotuning import groups
from pwopt.selecting.plugins import fingerprint, resolved
from pwopt.selecting.rewrite_selection import CachedTuningRecords, Compilation, NoTuningRecords, Selection, select
from pwopt.selecting.snapshot import select_passes
from pwopt.selecting.tuning_database import TuningDatabase

Options = ParamSpec("Options")
LOG = logging.getLogger(__name__)


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

    def _repr_html_(self) -> str:
        """The top of the report, for notebooks."""
        return render_summary(self.report)


def _taking(
    request: Callable[Options, Request],
) -> Callable[[Callable[[Source, Request], Result]], Callable[Concatenate[Source, Options], Result]]:
    """Let a function of a request take its options as arguments: they are written once, in `Request`."""

    def decorate(run: Callable[[Source, Request], Result]) -> Callable[Concatenate[Source, Options], Result]:
        model, options = inspect.signature(run).parameters["model"], inspect.signature(request).parameters
        signature = inspect.Signature([model, *options.values()], return_annotation=Result)

        @functools.wraps(run)
        def taking(*args: object, **kwargs: object) -> Result:
            given = signature.bind(*args, **kwargs).arguments  # says which option there is not
            return run(given.pop("model"), Request(**given))

        taking.__signature__ = signature  # type: ignore[attr-defined]
        described = (inspect.getdoc(request) or "").partition("----------\n")[2]
        before, _, rest = (inspect.getdoc(run) or "").partition("request : Request\n")
        taking.__doc__ = f"{before}{described.rstrip()}\n\n{rest.partition(chr(10) * 2)[2]}"
        return taking

    return decorate


@renamed(cost_model="cost", check="verify")
@_taking(Request)
def optimize(model: Source, request: Request) -> Result:
    """Optimise a model, verify it against the original, measure both.

    Parameters
    ----------
    model : path, bytes, onnx.ModelProto, torch.onnx.ONNXProgram, onnx_ir.Model or Model
    request : Request
        Its fields, each as an argument of its own: `optimize(model, output="fast.onnx", cost="analytic")`.

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
    return optimized(model, request)


def optimized(model: Source, request: Request) -> Result:
    """What `optimize` returns, for a request that is written already."""
    model = handed(model)
    path = model if isinstance(model, Path) else None
    request = replace(request, plugins=resolved(request.plugins, path))
    check_request(request, path)
    if request.dry_run:
        request = replace(request, output=None, cost="analytic", verify=False)
    request.progress("reading", 0.0)
    source = load(model)
    renames = request.opset is not None or bool(source.proto.functions)
    check_sites(request.denied, source.proto, renamed=renames, more=select_passes(request.passes, request.plugins))
    with contextlib.ExitStack() as stack:
        stack.enter_context(blaming(source.proto))
        original = stack.enter_context(as_file(source if path is None else path))
        subject = gather(source, original, request)
        subject = subject.guarded(stack)
        LOG.info("%s", _on_what(subject, request))
        work = plan(subject, request, stack.enter_context(workspace(request.output)))
        request.progress("rewriting", 0.0)
        work.settled(tuple(work.denied))
        allowance = Budget(subject, request)
        choice = choose(work, subject, request, allowance)
        blank = Report(
            model="<model in memory>" if path is None else str(path),
            output=None if request.output is None else str(request.output),
            provider=request.provider,
            environment=installation.describe_machine(request.execution_provider, request.first_threads),
            shapes=subject.sizes,
            passes={p.name: p.identity() for p in select_passes(work.passes)},
        )

        def tried(always_only: bool) -> Attempt:
            return attempt(subject, replace(work, always_only=always_only), choice, allowance, blank)

        done = returned(tried, source.proto, request, allowance).noted(*subject.why)
        if request.dry_run:
            done = done.noted(*_outlook(work, request.target_profile is None))
        if request.name_nodes:
            done = replace(done, proto=with_named_nodes(done.proto))
        if request.output is not None:
            request.progress("writing", 1.0)
            save(done.proto, request.output, source)
    return Result(done.proto, done.report)


def _on_what(subject: Problem, request: Request) -> str:
    """What the model will be judged on, and why."""
    sizes = ", ".join(f"{name} {written(shape)}" for name, shape in subject.sizes.items())
    given = "likely ones, since none were given" if subject.guessed else "the model's own, or given"
    if subject.arena is None:
        return f"sizes for costs: {sizes} ({given}); nothing is run"
    held = "the inputs given" if request.inputs is not None else "random inputs"
    count = counted(len(subject.samples), "sample")
    return f"sizes for costs, verification and timing: {sizes} ({given}); {count} of {held}"


def _outlook(work: Compilation, races: bool) -> Iterator[str]:
    """What a dry run says of the races that it leaves out."""
    yield "A dry run: nothing was raced, verified or written."
    waiting = groups(work.opportunities()[0])
    if waiting:
        how = "raced, unless earlier races said enough" if races else "decided by the profile"
        listed = "; ".join(f"{g.pass_name}: {g.signature}" for g in waiting)
        yield f"{counted(len(waiting), 'kind')} of rewrites would be {how}: {listed}."


def choose(work: Compilation, subject: Problem, request: Request, allowance: Budget) -> Selection:
    """Which measured rewrites are made: those that a profile, or a race here, says pay."""
    chosen = work.candidates()
    if not any(p.needs_measuring for p in chosen):
        return Selection()
    if request.target_profile is not None:
        return select(work, None, 0.0, TuningDatabase.load(request.target_profile), request.progress)
    if subject.arena is None or not request.measured:
        return Selection()
    if request.seconds <= 0:
        return Selection(frozenset())
    marks = {p.name: fingerprint(p) for p in chosen if not p.builtin}
    threads, name = request.first_threads, subject.original.name
    memory = (
        CachedTuningRecords(request.execution_provider, threads, work.digest(), marks, name)
        if request.cache
        else NoTuningRecords()
    )
    LOG.info(
        "rewrites that only a clock can judge are raced in the whole model; all measuring has %g s", request.seconds
    )
    request.progress("waiting for the clock", 0.0)
    with timing.exclusive():  # from the first race to the last, since waiting would use up the budget
        return select(work, subject.arena, allowance.for_choosing, memory, request.progress)
