"""`pwopt bench`: time models side by side."""

from __future__ import annotations

from pwopt.cli import options
from pwopt.errors import UsageError

#: Seconds of timing per batch size.
DEFAULT_SECONDS = 8.0


def bench(
    models: options.Raced,
    provider: options.Provider = "cpu",
    provider_option: options.ProviderOptions = None,
    provider_library: options.ProviderLibrary = None,
    threads: options.Threads = 1,
    shape: options.SingleShapes = None,
    batch: options.Batch = None,
    seconds: options.Seconds = DEFAULT_SECONDS,
    report: options.JsonReport = None,
    plot: options.Plot = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Time models side by side: latency, loading, memory, and time per operator."""
    from pwopt.cli.output import check_report, escape_text, open_console, print_json, show_progress, write_text
    from pwopt.reporting.document import render_latencies
    from pwopt.reporting.formats import check_available, parse_format
    from pwopt.reporting.notes import explain_threads
    from pwopt.reporting.report import format_benchmark_json
    from pwopt.reporting.terminal import print_line, render_benchmark
    from pwopt.running import installation
    from pwopt.running.bench import benchmark

    placed = options.parse_provider(provider, provider_option, provider_library)
    check_report(report, *models)
    if report is not None and parse_format(report) != "json":
        raise UsageError(f"bench writes JSON reports only; name the file {str(report.with_suffix('.json'))!r}")
    check_report(plot, *models, suffix="" if plot is None else plot.suffix.lower())
    if plot is not None and plot.suffix.lower() != ".svg":
        raise UsageError(f"the plot is an SVG file; name it {str(plot.with_suffix('.svg'))!r}")
    check_available(plot)
    try:
        batches = [int(b) for b in batch.split(",")] if batch else []
    except ValueError as error:
        raise UsageError(f"--batch takes numbers separated by commas, such as 1,8,32, not {batch!r}") from error
    with show_progress(debug=debug, quiet=quiet, verbose=verbose) as progress:
        rows = benchmark(
            models, provider=placed, threads=threads, shapes=options.parse_single_round(shape), batch=batches,
            seconds=seconds, progress=progress,
        )  # fmt: skip
    console, notes = open_console(quiet=quiet or json), list(explain_threads([threads]))
    render_benchmark(rows, console)
    for note in notes:
        print_line(f"[bold]{escape_text(note)}[/bold]", console)
    environment = installation.describe_machine(placed, threads) | {"huge_pages_mb": rows[0].huge_pages_mb}
    content = format_benchmark_json(rows, environment, notes)
    write_text(report, content)
    if json:
        print_json(content)
    if plot is not None:
        write_text(plot, render_latencies(rows))
