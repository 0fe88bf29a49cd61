"""pwopt bench"""

from __future__ import annotations

from pwopt.cli import options
from pwopt.errors import UsageError

#: To race the models, per batch size.
SECONDS = 8.0


def bench(
    models: options.Raced,
    provider: options.Provider = "cpu",
    provider_option: options.ProviderOptions = None,
    threads: options.Threads = 1,
    shape: options.Shapes = None,
    batch: options.Batch = None,
    seconds: options.Seconds = SECONDS,
    report: options.JsonReport = None,
    plot: options.Plot = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Time models side by side: latency, cold start, memory, and where the time goes."""
    from pwopt.cli import output as said
    from pwopt.reporting.document import check_available, kind_of, latencies
    from pwopt.reporting.report import benchmark_json
    from pwopt.reporting.terminal import render_benchmark
    from pwopt.running import runtime
    from pwopt.running.bench import benchmark

    provider = options.placed(provider, provider_option)
    said.check_report(report, *models)
    if report is not None and kind_of(report) != "json":
        raise UsageError(f"bench reports in JSON only; call it {str(report.with_suffix('.json'))!r}")
    said.check_report(plot, *models, suffix="" if plot is None else plot.suffix.lower())
    if plot is not None and plot.suffix.lower() != ".svg":
        raise UsageError(f"the plot is an SVG; call it {str(plot.with_suffix('.svg'))!r}")
    check_available(plot)
    try:
        batches = [int(b) for b in batch.split(",")] if batch else []
    except ValueError as error:
        raise UsageError(f"the batch sizes {batch!r} are not of the form 1,8,32") from error
    with said.telling_progress(debug=debug, quiet=quiet, verbose=verbose) as progress:
        rows = benchmark(
            models, provider=provider, threads=threads, shapes=options.one_round(shape), batch=batches,
            seconds=seconds, progress=progress,
        )  # fmt: skip
    render_benchmark(rows, said.console(quiet=quiet or json))
    content = benchmark_json(rows, runtime.environment(provider, threads))
    said.write(report, content)
    if json:
        said.as_json(content)
    if plot is not None:
        said.write(plot, latencies(rows))
