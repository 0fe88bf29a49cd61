"""`pwopt optimize` for many models, and how much a command prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pwopt.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from pwopt.optimizing.batch import BatchRow, Runner
    from pwopt.optimizing.cluster import Fleet
    from pwopt.optimizing.request import Request


@dataclass(frozen=True)
class Verbosity:
    """How much a command prints, and in which form."""

    details: bool
    json: bool
    quiet: bool
    verbose: bool
    debug: bool


def connect_fleet(scheduler: str | None, label: str | None) -> Fleet | None:
    """Return the cluster that --scheduler names, or None without one."""
    if scheduler is None:
        if label is not None:
            raise UsageError("--worker-label selects workers of a cluster; add --scheduler ADDRESS")
        return None
    from pwopt.optimizing.cluster import Fleet, import_distributed

    import_distributed()
    return Fleet(scheduler, label)


def optimize_folder(
    models: Sequence[Path],
    folder: Path,
    request: Request,
    verbosity: Verbosity,
    *,
    workers: int,
    report: Path | None,
    runner: Runner | None = None,
) -> None:
    """Optimise many models and print one line for each result.

    Raises
    ------
    typer.Exit
        At the end, with the largest exit code of all models.
    """
    from pwopt.cli.output import escape_text, open_console, print_json, show_progress
    from pwopt.optimizing.batch import find_jobs, format_index, optimize_many
    from pwopt.running.progress import TimeLeft

    for given, name in ((request.output, "-o"), (report, "--report")):
        if given is not None:
            raise UsageError(f"{name} applies to a single model; with -d, results and reports go into the folder")
    console = open_console(quiet=verbosity.quiet or verbosity.json)
    if request.writing.dry_run:
        for job in find_jobs(models, folder, request):
            console.print(f"{escape_text(str(job.model))} → {escape_text(str(job.output))}", soft_wrap=True)
        return
    debug, quiet, verbose = verbosity.debug, verbosity.quiet, verbosity.verbose
    with show_progress(debug=debug, quiet=quiet, verbose=verbose, left=TimeLeft()) as progress:

        def report_row(row: BatchRow) -> None:
            silent = verbosity.quiet or verbosity.json
            _print_row(row, open_console(stderr=True) if silent and row.status == "failed" else console)

        rows = optimize_many(
            models, folder, request, workers=workers, runner=runner, progress=progress, report_row=report_row
        )
    if verbosity.json:
        print_json(format_index(rows))
    done = [r for r in rows if r.status != "failed"]
    console.print(f"{len(done)} of {len(rows)} models in {escape_text(str(folder))}", soft_wrap=True)
    raise typer.Exit(max(r.code for r in rows))


def _print_row(row: BatchRow, console: Console) -> None:
    """Print the result of one model on one line, and below it why it is not faster, if it is not."""
    from rich.padding import Padding

    from pwopt.reporting.text import escape_text
    from pwopt.rewriting.ratios import is_vague, name_ratio

    name = escape_text(Path(row.model).name)
    if row.status == "failed":
        text = f"[red]failed[/red]     {name}: {escape_text(row.sentence)}"
        console.print(text, soft_wrap=not console.is_terminal)
        return
    faster = " " * 12
    if row.speedup is not None:
        low, high = row.low or 0.0, row.high or 0.0
        figure = f"{row.speedup:5.2f}× [dim]±{(high - low) / 2:4.2f}[/dim]"
        faster = f"{name_ratio(row.speedup, low, high):<12}" if is_vague(low, high) else figure
    faster += _format_ratio("with pages of 4 KiB", row.small_pages) + _format_ratio("session creation", row.start)
    nodes = f"{row.nodes[0]:>6,} → {row.nodes[1]:<6,}"
    colour = "green" if row.status == "done" else "dim"
    took = f"{row.seconds:5.0f} s"
    console.print(f"[{colour}]{row.status:<9}[/{colour}]  {faster}  {nodes} {took}  {name}", soft_wrap=True)
    if row.sentence and not row.faster:
        console.print(Padding(f"[dim]{escape_text(row.sentence)}[/dim]", (0, 0, 0, 11), expand=False))


def _format_ratio(label: str, measured: tuple[float, float, float] | None) -> str:
    """Format another ratio of a row, without its interval; "" if it was not measured."""
    from pwopt.rewriting.ratios import name_ratio

    return "" if measured is None else f"  [dim]{label}[/dim] {name_ratio(*measured)}"
