"""pwopt profile"""

from __future__ import annotations

from pwopt.cli import options
from pwopt.optimizing.request import Request


def profile(
    models: options.Recorded,
    output: options.ProfileOutput,
    provider: options.Provider = Request.provider,
    provider_option: options.ProviderOptions = None,
    threads: options.Threads = 1,
    shape: options.Shapes = None,
    budget: options.ModelBudget = Request.budget,
    debug: options.Debug = False,
) -> None:
    """Record which measured rewrites pay on this machine, for `optimize --target-profile` on another."""
    from pwopt.cli import output as said
    from pwopt.optimizing.profile import profile as record

    provider = options.placed(provider, provider_option)
    said.check_report(output, *models)
    shapes = options.one_round(shape)
    with said.telling_progress(debug=debug) as progress:
        found = record(models, provider=provider, threads=threads, shapes=shapes, budget=budget, progress=progress)
    found.save(output)
    paying = sum(e.low > 1 for e in found.entries)
    said.console(wide=True).print(
        f"{paying} of {len(found.entries)} kinds of rewrites pay here; wrote {said.plain(str(output))}"
    )
