"""pwopt optimize"""

from __future__ import annotations

from dataclasses import replace

import typer

from pwopt.cli import options
from pwopt.errors import NotEquivalentError, UsageError
from pwopt.optimizing.request import Request


def optimize(
    context: typer.Context,
    model: options.ModelPath,
    output: options.Output = None,
    provider: options.Provider = Request.provider,
    provider_option: options.ProviderOptions = None,
    cost: options.Cost = Request.cost_model,
    shape: options.Rounds = None,
    inputs: options.Inputs = None,
    passes: options.Passes = None,
    deny: options.Deny = None,
    threads: options.ThreadCounts = None,
    budget: options.Budget = Request.budget,
    no_cache: options.NoCache = not Request.cache,
    target_profile: options.TargetProfile = None,
    max_growth: options.MaxGrowth = None,
    static: options.Static = Request.static,
    opset: options.Opset = None,
    report: options.Document = None,
    rtol: options.Rtol = None,
    atol: options.Atol = None,
    no_verify: options.NoVerify = not Request.check,
    force: options.Force = Request.force,
    details: options.RewriteDetails = False,
    debug: options.Debug = False,
) -> None:
    """Optimise MODEL, verify the result against it, and write it only if equivalent."""
    from pwopt.cli import output as said
    from pwopt.optimizing.optimizer import optimized
    from pwopt.optimizing.subject import same_file
    from pwopt.reporting import terminal
    from pwopt.reporting.document import check_available

    out = output if output is not None else model.parent / f"{model.stem}.pwopt.onnx"
    if not force and same_file(out, model):
        raise UsageError(f"the output {str(out)!r} is the input; choose another -o, or pass --force")
    said.check_report(report, model, out)
    check_available(report)
    request = Request(
        out, provider=options.placed(provider, provider_option), cost_model=cost, shapes=options.rounds(shape),
        inputs=inputs or None, passes=None if passes is None else options.words(passes), deny=deny or (),
        threads=options.thread_counts(threads), static=static, opset=opset, rtol=rtol, atol=atol, check=not no_verify,
        budget=budget, cache=not no_cache, target_profile=target_profile,
        max_growth=max_growth, force=force,
    )  # fmt: skip
    console = said.console()
    try:
        with said.telling_progress(debug=debug) as progress:
            result = optimized(model, replace(request, progress=progress))
    except NotEquivalentError as error:
        terminal.render_equivalence(error.report.equivalence, console)
        terminal.render_difference(error.report.equivalence, console)
        said.write_document(report, replace(error.report, command=context.obj))
        raise
    terminal.render(result.report, console, details)
    said.write_document(report, replace(result.report, command=context.obj))
    wrote = f"wrote {said.plain(str(out))}" + (f" and {said.plain(str(report))}" if report else "")
    console.print(wrote, soft_wrap=True)
