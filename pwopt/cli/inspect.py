"""pwopt inspect"""

from __future__ import annotations

from dataclasses import asdict

from pwopt.cli import options
from pwopt.errors import UsageError


def inspect(
    model: options.ModelPath,
    shape: options.Shapes = None,
    json: options.Json = False,
    every: options.Every = False,
    weights: options.Weights = False,
    report: options.Spectra = None,
    plugin: options.Plugins = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """List every pointwise map of MODEL: its size, its chain, what would be done with it and why not more."""
    from pwopt.cli import output as said
    from pwopt.reporting import terminal
    from pwopt.reporting.document import check_available, kind_of, spectra
    from pwopt.reporting.report import to_json
    from pwopt.selecting.inspection import Inspection
    from pwopt.selecting.inspection import inspect as decisions
    from pwopt.selecting.weight_properties import Properties, properties

    if weights:
        said.check_report(report, model)
        check_available(report)
    elif report is not None:
        raise UsageError("only --properties are written to a file; add it, or use --json")
    shapes = options.one_round(shape)
    with said.telling_progress(debug=debug, quiet=quiet, verbose=verbose) as progress:
        progress("looking at every linear map", 0.0)
        found = properties(model, shapes=shapes) if weights else decisions(model, shapes=shapes, plugins=plugin or ())
    if isinstance(found, Inspection) and not every:
        found = found.pointwise()
    records = to_json([asdict(m) for m in found])
    if isinstance(found, Properties) and report is not None:
        said.write(report, spectra(found, model) if kind_of(report) == "html" else records)
    if json:
        said.as_json(records)
    elif isinstance(found, Properties):
        terminal.render_properties(found, said.console(quiet=quiet))
    else:
        terminal.render_maps(found, said.console(wide=True, quiet=quiet))
