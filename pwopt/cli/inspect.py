"""`pwopt inspect`: list the linear maps of a model."""

from __future__ import annotations

from dataclasses import asdict

from pwopt.cli import options
from pwopt.errors import UsageError


def inspect(
    model: options.ModelPath,
    shape: options.SingleShapes = None,
    json: options.Json = False,
    every: options.Every = False,
    weights: options.Weights = False,
    report: options.Spectra = None,
    plugin: options.Plugins = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """List the pointwise maps of MODEL: size, chain, which rewrites apply, and why others do not."""
    from pwopt.cli.output import check_report, open_console, print_json, show_progress, write_text
    from pwopt.reporting import terminal
    from pwopt.reporting.document import render_properties_page
    from pwopt.reporting.formats import check_available, parse_format
    from pwopt.reporting.report import to_json
    from pwopt.selecting.inspection import Inspection
    from pwopt.selecting.inspection import inspect as decisions
    from pwopt.selecting.weight_properties import Properties, properties

    if weights:
        check_report(report, model)
        check_available(report)
    elif report is not None:
        raise UsageError("--report needs --properties; add it, or print the list with --json")
    shapes = options.parse_single_round(shape)
    with show_progress(debug=debug, quiet=quiet, verbose=verbose) as progress:
        progress("inspecting linear maps", 0.0)
        found = properties(model, shapes=shapes) if weights else decisions(model, shapes=shapes, plugins=plugin or ())
    if isinstance(found, Inspection) and not every:
        found = found.pointwise()
    records = to_json([asdict(m) for m in found])
    if isinstance(found, Properties) and report is not None:
        write_text(report, render_properties_page(found, model) if parse_format(report) == "html" else records)
    if json:
        print_json(records)
    elif isinstance(found, Properties):
        terminal.render_properties(found, open_console(quiet=quiet))
    else:
        terminal.render_maps(found, open_console(wide=True, quiet=quiet))
