"""`pwopt optimize`: optimise, verify and measure a model."""

from __future__ import annotations

import filecmp
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from pwopt.cli import options
from pwopt.cli.many import Verbosity, connect_fleet, optimize_folder
from pwopt.errors import NotEquivalentError, UsageError
from pwopt.optimizing.request import CostModel, Effort, Limits, Measuring, Request, Target, Writing

if TYPE_CHECKING:
    from rich.console import Console


def optimize(
    context: typer.Context,
    models: options.Models,
    output: options.Output = None,
    directory: options.Folder = None,
    provider: options.Provider = Request.provider,
    provider_option: options.ProviderOptions = None,
    provider_library: options.ProviderLibrary = None,
    cost: options.Cost = Request.cost,
    shape: options.Rounds = None,
    inputs: options.Inputs = None,
    passes: options.Passes = None,
    plugin: options.Plugins = None,
    deny: options.Deny = None,
    threads: options.ThreadCounts = None,
    effort: options.Effort = Measuring.effort,
    budget: options.Budget = Measuring.budget,
    no_cache: options.NoCache = not Request.cache,
    target_profile: options.TargetProfile = None,
    max_growth: options.MaxGrowth = None,
    static: options.Static = Request.static,
    target: options.Target = Request.target,
    opset: options.Opset = None,
    name_nodes: options.NameNodes = Writing.name_nodes,
    report: options.Document = None,
    rtol: options.Rtol = None,
    atol: options.Atol = None,
    no_verify: options.NoVerify = not Request.verify,
    force: options.Force = Writing.force,
    dry_run: options.DryRun = Writing.dry_run,
    workers: options.Workers = 1,
    scheduler: options.Scheduler = None,
    worker_label: options.WorkerLabel = None,
    details: options.RewriteDetails = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Optimise MODEL, compare the result with it, and write the result only if both are equivalent."""
    placed = options.parse_provider(provider, provider_option, provider_library)
    reported = json or report is not None or directory is not None
    request = Request(
        output, provider=placed.text, cost=cast(CostModel, cost), shapes=options.parse_rounds(shape),
        inputs=inputs or None, passes=None if passes is None else options.split_list(passes), plugins=plugin or (),
        deny=deny or (), threads=options.parse_thread_counts(threads), static=static,
        target=cast(Target, target), opset=opset, verify=not no_verify, cache=not no_cache,
        measuring=Measuring(cast(Effort, effort), budget, target_profile=target_profile, layers=reported),
        limits=Limits(rtol, atol, max_growth), writing=Writing(force, name_nodes, dry_run),
    )  # fmt: skip
    verbosity = Verbosity(details, json, quiet, verbose, debug)
    if directory is not None:
        runner = connect_fleet(scheduler, worker_label)
        optimize_folder(models, directory, request, verbosity, workers=workers, report=report, runner=runner)
        return
    if len(models) > 1:
        raise UsageError("several models need a folder for the results; add -d OUT")
    if workers > 1 or scheduler is not None or worker_label is not None:
        raise UsageError("--workers, --scheduler and --worker-label need a folder for the results; add -d OUT")
    _optimize_one(models[0], request, report, verbosity, context.obj)


def _optimize_one(model: Path, request: Request, report: Path | None, verbosity: Verbosity, command: str) -> None:
    """Optimise one model and report the result."""
    from pwopt.cli.output import check_report, escape_text, open_console, print_json, show_progress, write_document
    from pwopt.graph.storage import name_beside
    from pwopt.optimizing.optimizer import run_request
    from pwopt.optimizing.preparation import same_file
    from pwopt.reporting import terminal
    from pwopt.reporting.formats import check_available
    from pwopt.running.progress import TimeLeft, track_run

    out = name_beside(model, ".pwopt.onnx") if request.output is None else Path(request.output)
    if not request.writing.force and same_file(out, model):
        raise UsageError(f"the output {str(out)!r} is the input file; choose another file with -o, or pass --force")
    check_report(report, model, out)
    check_available(report)
    console = open_console(quiet=verbosity.quiet or verbosity.json)
    try:
        timed = request.measured and request.verify and not request.writing.dry_run
        left = TimeLeft(request.measuring.seconds if timed else 0.0)
        debug, quiet, verbose = verbosity.debug, verbosity.quiet, verbosity.verbose
        with show_progress(debug=debug, quiet=quiet, verbose=verbose, left=left) as progress:
            result = run_request(model, replace(request, output=out, progress=track_run(progress)))
    except NotEquivalentError as error:
        terminal.render_equivalence(error.report.equivalence, console)
        terminal.render_difference(error.report.equivalence, console)
        failed = replace(error.report, command=command)
        write_document(report, failed)
        if verbosity.json:
            print_json(failed.to_json())
        raise
    final = replace(result.report, command=command)
    terminal.render(final, console, verbosity.details)
    write_document(report, final)
    if verbosity.json:
        print_json(final.to_json())
    written = [str(p) for p in (None if request.writing.dry_run else out, report) if p is not None]
    if written:
        console.print(f"wrote {escape_text(' and '.join(written))}", soft_wrap=True)
    if not request.writing.dry_run:
        _print_next_steps(model, out, report, request, console)


def _print_next_steps(model: Path, out: Path, report: Path | None, request: Request, console: Console) -> None:
    """Print what users do next: check the result on their own inputs, read the report, run the model fast."""
    from pwopt.cli.output import escape_text, quote_path
    from pwopt.reporting.formats import can_render

    if out.suffix != ".onnx":
        console.print(f"Some tools refuse {escape_text(repr(out.name))}, because its name does not end in .onnx.")
    original, result, steps = quote_path(model), quote_path(out), []
    copied = filecmp.cmp(model, out, shallow=False)
    if request.inputs is None and not copied:
        steps.append(f"pwopt verify {original} {result} --input FOLDER   # check it on your own inputs")
    if report is None and can_render():
        steps.append(f"pwopt optimize {original} --report report.html   # see every rewrite and refusal")
    if request.cost == "measured" and not copied:
        steps.append(f"pwopt bench {original} {result}   # time both, start-up and memory too")
    for i, step in enumerate(steps):
        console.print(f"[dim]{'next:' if i == 0 else '     '} {escape_text(step)}[/dim]", soft_wrap=True)
