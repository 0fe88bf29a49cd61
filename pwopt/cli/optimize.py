"""pwopt optimize"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import typer

from pwopt.cli import options
from pwopt.cli.many import Manner, fleet, many
from pwopt.errors import NotEquivalentError, UsageError
from pwopt.optimizing.request import Request


def optimize(
    context: typer.Context,
    models: options.Models,
    output: options.Output = None,
    directory: options.Folder = None,
    provider: options.Provider = Request.provider,
    provider_option: options.ProviderOptions = None,
    cost: options.Cost = Request.cost,
    shape: options.Rounds = None,
    inputs: options.Inputs = None,
    passes: options.Passes = None,
    plugin: options.Plugins = None,
    deny: options.Deny = None,
    threads: options.ThreadCounts = None,
    effort: options.Effort = Request.effort,
    budget: options.Budget = Request.budget,
    no_cache: options.NoCache = not Request.cache,
    target_profile: options.TargetProfile = None,
    max_growth: options.MaxGrowth = None,
    static: options.Static = Request.static,
    opset: options.Opset = None,
    name_nodes: options.NameNodes = Request.name_nodes,
    report: options.Document = None,
    rtol: options.Rtol = None,
    atol: options.Atol = None,
    no_verify: options.NoVerify = not Request.verify,
    force: options.Force = Request.force,
    dry_run: options.DryRun = Request.dry_run,
    workers: options.Workers = 1,
    scheduler: options.Scheduler = None,
    target: options.Target = None,
    details: options.RewriteDetails = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Optimise MODEL, verify the result against it, and write it only if equivalent."""
    request = Request(
        output, provider=options.placed(provider, provider_option), cost=cost, shapes=options.rounds(shape),
        inputs=inputs or None, passes=None if passes is None else options.words(passes), deny=deny or (),
        threads=options.thread_counts(threads), static=static, max_growth=max_growth, opset=opset, rtol=rtol,
        atol=atol, verify=not no_verify, effort=effort, budget=budget, cache=not no_cache,
        target_profile=target_profile, force=force, plugins=plugin or (), dry_run=dry_run,
        name_nodes=name_nodes,
    )  # fmt: skip
    manner = Manner(details, json, quiet, verbose, debug, context.obj)
    if directory is not None:
        many(models, directory, request, manner, workers=workers, report=report, runner=fleet(scheduler, target))
        return
    if len(models) > 1:
        raise UsageError("several models need a folder for their results; add -d OUT")
    if workers > 1 or scheduler is not None or target is not None:
        raise UsageError("--workers, --scheduler and --target are for many models, which need a folder; add -d OUT")
    _one(models[0], request, report, manner)


def _one(model: Path, request: Request, report: Path | None, manner: Manner) -> None:
    """Optimise one model and say what was done."""
    from pwopt.cli import output as said
    from pwopt.optimizing.optimizer import optimized
    from pwopt.optimizing.preparation import same_file
    from pwopt.reporting import terminal
    from pwopt.reporting.document import check_available

    out = model.parent / f"{model.stem}.pwopt.onnx" if request.output is None else Path(request.output)
    if not request.force and same_file(out, model):
        raise UsageError(f"the output {str(out)!r} is the input; choose another -o, or pass --force")
    said.check_report(report, model, out)
    check_available(report)
    console = said.console(quiet=manner.quiet or manner.json)
    try:
        with said.telling_progress(debug=manner.debug, quiet=manner.quiet, verbose=manner.verbose) as progress:
            result = optimized(model, replace(request, output=out, progress=progress))
    except NotEquivalentError as error:
        terminal.render_equivalence(error.report.equivalence, console)
        terminal.render_difference(error.report.equivalence, console)
        failed = replace(error.report, command=manner.command)
        said.write_document(report, failed)
        if manner.json:
            said.as_json(failed.to_json())
        raise
    told = replace(result.report, command=manner.command)
    terminal.render(told, console, manner.details)
    said.write_document(report, told)
    if manner.json:
        said.as_json(told.to_json())
    written = [str(p) for p in (None if request.dry_run else out, report) if p is not None]
    if written:
        console.print(f"wrote {said.plain(' and '.join(written))}", soft_wrap=True)
