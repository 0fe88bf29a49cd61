"""A model goes in, a faster verified one comes out."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Concatenate, ParamSpec

import onnx

from pwopt.graph.files import Source, as_file, blaming, load, save
from pwopt.graph.model import Model
from pwopt.graph.storage import workspace
from pwopt.optimizing.request import Request
from pwopt.optimizing.subject import Subject, check_request, check_sites, gather, plan
from pwopt.optimizing.trial import Attempt, attempt
from pwopt.optimizing.verdict import returned
from pwopt.reporting.report import Report
from pwopt.running import runtime
from pwopt.selecting.selection import Choice, Disk, Forgetful, Work, select
from pwopt.selecting.targets import Profile

Options = ParamSpec("Options")


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
        taking.__doc__ = (inspect.getdoc(run) or "").replace("OPTIONS\n", f"{described}\n", 1)
        return taking

    return decorate


@_taking(Request)
def optimize(model: Source, request: Request) -> Result:
    """Optimise a model, verify it against the original, measure both.

    Parameters
    ----------
    model : path, onnx.ModelProto or Model
    OPTIONS

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
    return optimized(model, request)


def optimized(model: Source, request: Request) -> Result:
    """What `optimize` returns, for a request that is written already."""
    path = None if isinstance(model, (onnx.ModelProto, Model)) else Path(model)
    check_request(request, path)
    request.progress("reading", 0.0)
    source = load(model)
    check_sites(request.deny, source.proto, renamed=request.opset is not None or bool(source.proto.functions))
    with contextlib.ExitStack() as stack:
        stack.enter_context(blaming(source.proto))
        original = stack.enter_context(as_file(source if path is None else path))
        subject = gather(source, original, request)
        subject = subject.guarded(stack)
        work = plan(subject, request, stack.enter_context(workspace(request.output)))
        choice = choose(work, subject, request)
        blank = Report(
            model="<model in memory>" if path is None else str(path),
            output=None if request.output is None else str(request.output),
            provider=request.provider,
            environment=runtime.environment(request.provider, request.first_threads),
            shapes=subject.sizes,
        )

        def tried(always_only: bool) -> Attempt:
            return attempt(subject, replace(work, always_only=always_only), choice, request, blank)

        done = returned(tried, source.proto, request).noted(*subject.why)
        if request.output is not None:
            request.progress("writing", 1.0)
            save(done.proto, request.output, source)
    return Result(done.proto, done.report)


def choose(work: Work, subject: Subject, request: Request) -> Choice:
    """Which measured rewrites are made: those that a profile, or a race here, says pay."""
    if request.passes is not None:
        return Choice()
    if request.target_profile is not None:
        return select(work, None, 0.0, Profile.load(request.target_profile), request.progress)
    if subject.arena is None or not request.measured:
        return Choice()
    if request.budget <= 0:
        return Choice(frozenset())
    memory = Disk(request.provider, request.first_threads, work.digest()) if request.cache else Forgetful()
    return select(work, subject.arena, request.budget, memory, request.progress)
