"""`pwopt verify`: compare two models."""

from __future__ import annotations

import typer

from pwopt.cli import options
from pwopt.errors import ModelError, NotEquivalentError

#: Colour and exit code of each verdict.
VERDICT_STYLES = {
    "equivalent": ("green", 0),
    "not equivalent": ("red", NotEquivalentError.exit_code),
    "not comparable": ("yellow", ModelError.exit_code),
}


def verify(
    context: typer.Context,
    original: options.Original,
    candidate: options.Candidate,
    provider: options.Provider = "cpu",
    provider_option: options.ProviderOptions = None,
    provider_library: options.ProviderLibrary = None,
    shape: options.Rounds = None,
    inputs: options.Inputs = None,
    kinds: options.Kinds = "normal,uniform,normal",
    ranges: options.Ranges = None,
    invariants: options.Invariants = None,
    rewrites: options.Rewrites = None,
    details: options.FigureDetails = False,
    no_locate: options.NoLocate = False,
    threads: options.Threads = 1,
    rtol: options.Rtol = None,
    atol: options.Atol = None,
    report: options.Document = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Compare two models from any source. Exit code 0: equivalent; 1: not equivalent; 3: not comparable."""
    from pwopt.cli.output import check_report, open_console, print_json, show_progress, write_document
    from pwopt.evidence.laws import parse_law
    from pwopt.evidence.verify import verify as compare_models
    from pwopt.inputs import samples
    from pwopt.reporting import terminal
    from pwopt.reporting.formats import check_available
    from pwopt.reporting.report import Comparison, read_rewrites
    from pwopt.running import installation

    placed = options.parse_provider(provider, provider_option, provider_library)
    check_report(report, original, candidate)
    check_available(report)
    records = () if rewrites is None else read_rewrites(rewrites)
    asked = [parse_law(text) for text in invariants or ()]
    console = open_console(quiet=quiet or json)
    with show_progress(debug=debug, quiet=quiet, verbose=verbose) as progress:
        equivalence = compare_models(
            original, candidate, provider=placed, threads=threads, shapes=options.parse_rounds(shape),
            inputs=inputs or None, samples=options.split_list(kinds),
            ranges=dict(map(samples.parse_range, ranges or ())),
            rtol=rtol, atol=atol, locate=not no_locate, rewrites=records, invariants=asked,
            progress=progress,
        )  # fmt: skip
    colour, code = VERDICT_STYLES[equivalence.verdict]
    console.print(f"[{colour}]{equivalence.verdict}[/{colour}]")
    terminal.render_comparison(equivalence, placed, console, details)
    environment = installation.describe_machine(placed, threads)
    content = Comparison(str(original), str(candidate), placed.text, environment, equivalence, context.obj)
    write_document(report, content)
    if json:
        print_json(content.to_json())
    raise typer.Exit(code)
