"""`pwopt profile`: record which measured rewrites are faster on this machine."""

from __future__ import annotations

import re

from pwopt.cli import options
from pwopt.cli.many import connect_fleet
from pwopt.optimizing.request import EFFORTS, Measuring, Request


def profile(
    models: options.Recorded,
    output: options.ProfileOutput,
    provider: options.Provider = Request.provider,
    provider_option: options.ProviderOptions = None,
    provider_library: options.ProviderLibrary = None,
    threads: options.Threads = 1,
    shape: options.SingleShapes = None,
    budget: options.ModelBudget = EFFORTS["normal"],
    plugin: options.Plugins = None,
    scheduler: options.Scheduler = None,
    worker_label: options.WorkerLabel = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Record which measured rewrites are faster on this machine, for `optimize --target-profile` on another one."""
    from pwopt.cli.output import check_report, escape_text, open_console, print_json, show_progress
    from pwopt.optimizing.record_tuning import profile as record
    from pwopt.rewriting.wording import format_count

    placed = options.parse_provider(provider, provider_option, provider_library)
    shapes = options.parse_single_round(shape)
    cluster = connect_fleet(scheduler, worker_label)
    if cluster is None:
        check_report(output, *models, suffix=output.suffix.lower())
    with show_progress(debug=debug, quiet=quiet, verbose=verbose) as progress:
        if cluster is None:
            own = record(
                models, provider=placed, threads=threads, shapes=shapes, budget=budget, plugins=plugin or (),
                progress=progress,
            )  # fmt: skip
            found = {output: own}
        else:
            request = Request(
                provider=placed.text,
                threads=threads,
                shapes=shapes,
                measuring=Measuring(budget=budget),
                plugins=plugin or (),
            )
            named = cluster.record_profiles(models, request, progress)
            found = {output / f"{re.sub('[^A-Za-z0-9._-]+', '-', label)}.json": p for label, p in named.items()}
    console = open_console(wide=True, quiet=quiet or json)
    for path, each in found.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        each.save(path)
        verdicts, kinds = [e.verdict for e in each.entries], format_count(len(each.entries), "kind")
        faster, slower, doubted = (verdicts.count(verdict) for verdict in ("kept", "dropped", "in doubt"))
        where = escape_text(str(each.environment["cpu"]))
        console.print(
            f"{kinds} of rewrites on {where}: {faster} faster, {slower} not faster, {doubted} in doubt; "
            f"wrote {escape_text(str(path))}"
        )
    if json:
        texts = [each.to_json() for each in found.values()]
        print_json(texts[0] if cluster is None else f"[{', '.join(texts)}]")
